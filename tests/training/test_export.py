from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from artifacts.catalogue import CATALOGUE, BackboneName
from artifacts.recipe import Precision
from inference.engine import OpenVinoEngine
from training import backbones
from training.export import Exported, export

QUICK = [("vgg16", "block1"), ("resnet50", "conv2")]
SLOW = [(name.value, entry.last_cut) for name, entry in CATALOGUE.items()]


def exported(name: str, cut: str) -> tuple[BackboneName, Exported, keras.Model]:
    network = BackboneName(name)
    weights = backbones.random_weights(network)
    model = backbones.backbone(network, cut, CATALOGUE[network].minimum_size, weights)
    return network, export(model, threads=2), model


@pytest.mark.parametrize(("name", "cut"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_an_exported_network_answers_as_keras_does_at_any_batch_size(name: str, cut: str, tmp_path: Path) -> None:
    network, result, model = exported(name, cut)
    assert result.width == CATALOGUE[network].cuts[cut]
    assert result.largest_relative_difference < 1e-4
    path = tmp_path / "network.onnx"
    path.write_bytes(result.onnx)
    engine = OpenVinoEngine(path, Precision.FLOAT32, threads=2)
    size = CATALOGUE[network].minimum_size
    images = np.random.default_rng(7).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    expected = keras.ops.convert_to_numpy(model(images)["features"])
    together = engine.features(images)
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    alone = np.concatenate([engine.features(images[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_network_cut_early_weighs_less() -> None:
    whole = sum(weight.size for weight in backbones.network(BackboneName.VGG16, 32).get_weights())
    _, result, _ = exported("vgg16", "block1")
    assert result.parameters == 38_720 < whole / 100
    assert len(result.onnx) < 200_000
