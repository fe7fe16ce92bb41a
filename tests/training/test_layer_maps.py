"""What is read out of an exported network against what Keras computes in that layer."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from exporting import Exports

from inference.layer_maps import LayerReader
from recipes.catalogue import CATALOGUE, BackboneName
from training.networks import backbones, quantisation

QUICK = (BackboneName.VGG16, "block1")
# Layers without a name of their own, which Keras numbers by all that were built before.
NUMBERED = re.compile(r"(add|activation|batch_normalization|(max|average)_pooling2d|conv2d|concatenate)(_\d+)?")
# With residuals, with parallel branches, with separable convolutions.
SLOW = [(name, CATALOGUE[name].last_cut) for name in BackboneName if not name.startswith("vgg")]


def images(size: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "cut"), [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_layer_that_can_be_seen_is_as_keras_computes_it(
    exports: Exports, name: BackboneName, cut: str, tmp_path: Path
) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(exports.get(name, cut).onnx)
    insight = LayerReader(path, 2)
    size = CATALOGUE[name].minimum_size
    full = backbones.build_network(name, size)
    backbones.load_weights(full, exports.weights(name).read_bytes())
    layers = {layer.name: layer for layer in full.layers}
    named = [layer for layer in insight.layers if not NUMBERED.fullmatch(layer.name)]
    assert {layer.name for layer in named} <= layers.keys()
    assert insight.layers[-1].name == backbones.cut_layer(full, name, cut).name
    shown = [*named[:3], *named[3 : -1 : max(1, len(named) // 6)], named[-1]]
    pixels = images(size)
    prepared = backbones.preprocess(pixels, CATALOGUE[name].preprocessing)
    model = keras.Model(full.input, {layer.name: layers[layer.name].output for layer in shown})
    expected = {layer: keras.ops.convert_to_numpy(maps)[0] for layer, maps in model(prepared, training=False).items()}
    for layer in shown:
        maps = expected[layer.name]
        assert maps.shape == (layer.height, layer.width, layer.channels), layer.name
        found = insight.maps(pixels[0], layer.name)
        np.testing.assert_allclose(found, maps, rtol=1e-3, atol=1e-4 * np.abs(maps).max(), err_msg=layer.name)


@pytest.mark.slow
def test_a_quantised_network_has_the_same_layers(exports: Exports, tmp_path: Path) -> None:
    plain, path = exports.get(*QUICK).onnx, tmp_path / "network.onnx"
    path.write_bytes(plain)
    before = LayerReader(path, 2)
    path.write_bytes(quantisation.quantise(plain, images(32, 20), lambda done, total: None).onnx)
    after = LayerReader(path, 2)
    assert after.layers == before.layers
    for layer in before.layers:
        exact, rounded = (insight.maps(images(32)[0], layer.name) for insight in (before, after))
        assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
