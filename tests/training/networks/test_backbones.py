from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import load, save

from errors import WeightsRefused
from recipes.catalogue import CATALOGUE, BackboneName
from training.networks import backbones

PREPROCESS = {
    BackboneName.VGG16: keras.applications.vgg16.preprocess_input,
    BackboneName.VGG19: keras.applications.vgg19.preprocess_input,
    BackboneName.RESNET50: keras.applications.resnet50.preprocess_input,
    BackboneName.INCEPTION_V3: keras.applications.inception_v3.preprocess_input,
    BackboneName.XCEPTION: keras.applications.xception.preprocess_input,
}


@pytest.fixture(scope="module")
def vgg16() -> Any:
    keras.utils.set_random_seed(3)
    return backbones.build_network(BackboneName.VGG16, 32)


@pytest.fixture(scope="module")
def weights(vgg16: Any) -> bytes:
    return backbones.dump_weights(vgg16)


@pytest.mark.parametrize("name", list(BackboneName))
def test_every_cut_point_exists_and_is_as_wide_as_the_catalogue_says(name: BackboneName) -> None:
    entry = CATALOGUE[name]
    network = backbones.build_network(name, entry.minimum_size)
    widths = {cut: backbones.cut_layer(network, name, cut).output.shape[-1] for cut in entry.cuts}
    assert widths == dict(entry.cuts)
    assert backbones.cut_layer(network, name, entry.last_cut) is network.layers[-1]


@pytest.mark.parametrize("name", list(BackboneName))
def test_pixels_are_prepared_as_keras_prepares_them(name: BackboneName) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = PREPROCESS[name](images.astype(np.float32).copy())
    found = backbones.preprocess(keras.ops.convert_to_tensor(images), CATALOGUE[name].preprocessing)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-6, atol=1e-5)


def test_a_backbone_gives_maps_at_its_cut_and_their_mean(vgg16: Any, weights: bytes) -> None:
    model = backbones.build_backbone(BackboneName.VGG16, "block2", 32, weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = {name: keras.ops.convert_to_numpy(value) for name, value in model(images).items()}
    pixels = keras.applications.vgg16.preprocess_input(images.astype(np.float32))
    expected = keras.Model(vgg16.input, vgg16.get_layer("block2_pool").output)(pixels)
    np.testing.assert_allclose(found["maps"], keras.ops.convert_to_numpy(expected), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["features"], found["maps"].mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)
    assert model.count_params() < vgg16.count_params() / 50, "later layers must be left out"
    assert not model.trainable_weights


def test_random_weights_are_the_same_every_time() -> None:
    one = backbones.random_weights(BackboneName.VGG16)
    keras.utils.set_random_seed(99)
    assert one == backbones.random_weights(BackboneName.VGG16)


def test_weights_do_not_depend_on_the_image_size(weights: bytes) -> None:
    larger = backbones.build_network(BackboneName.VGG16, 48)
    backbones.load_weights(larger, weights)
    assert backbones.dump_weights(larger) == weights


def test_weights_of_keras_3_are_imported(vgg16: Any, weights: bytes, tmp_path: Path) -> None:
    file = tmp_path / "vgg16.weights.h5"
    vgg16.save_weights(file)
    assert backbones.import_weights(BackboneName.VGG16, file) == weights


def test_weights_in_the_older_layout_of_published_files_are_imported(
    vgg16: Any, weights: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "vgg16_notop.h5"
    with h5py.File(file, "w") as content:
        layers = [layer for layer in vgg16.layers if layer.weights]
        content.attrs["layer_names"] = [layer.name.encode() for layer in vgg16.layers]
        for layer in vgg16.layers:
            group = content.create_group(layer.name)
            group.attrs["weight_names"] = [f"{layer.name}_{i}".encode() for i in range(len(layer.weights))]
            for index, variable in enumerate(layer.weights):
                group[f"{layer.name}_{index}"] = keras.ops.convert_to_numpy(variable)
    assert len(layers) == 13
    assert backbones.import_weights(BackboneName.VGG16, file) == weights


def test_weights_that_were_exported_here_are_imported(weights: bytes, tmp_path: Path) -> None:
    file = tmp_path / "vgg16.safetensors"
    file.write_bytes(weights)
    assert backbones.import_weights(BackboneName.VGG16, file) == weights


def damaged(file: Path, kind: str) -> None:
    """Harm a file of weights as `.weights.h5` in one way."""
    place = "layers/conv2d/vars"
    other = file.with_name("other.h5")
    if kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
        return
    with h5py.File(file, "a") as content:
        kernel = np.asarray(content[place]["0"])
        if kind == "a group in place of an array":
            del content[place]["0"]
            content[place].create_group("0")
        elif kind == "an array in place of a group":
            del content[place]
            content[place] = kernel
        elif kind == "text":
            del content[place]["0"]
            content[place]["0"] = np.full(kernel.shape, b"text")
        elif kind == "layer names of nothing":
            content.attrs["layer_names"] = [b"block1_conv1"]
        elif kind == "layer names that are numbers":
            content.attrs["layer_names"] = 5
        elif kind == "huge":
            del content[place]["0"]
            content[place].create_dataset("0", (2**16, 2**16), "f4", chunks=(64, 64))
        elif kind == "external link":
            with h5py.File(other, "w") as elsewhere:
                elsewhere["kernel"] = kernel
            del content[place]["0"]
            content[place]["0"] = h5py.ExternalLink(str(other), "/kernel")
        elif kind == "external group":
            with h5py.File(other, "w") as elsewhere:
                content.copy("layers", elsewhere)
            del content["layers"]
            content["layers"] = h5py.ExternalLink(str(other), "/layers")
        elif kind == "external storage":
            other.write_bytes(kernel.tobytes())
            del content[place]["0"]
            content[place].create_dataset("0", kernel.shape, "f4", external=[(str(other), 0, h5py.h5f.UNLIMITED)])
        elif kind == "virtual":
            with h5py.File(other, "w") as elsewhere:
                elsewhere["kernel"] = kernel
            layout = h5py.VirtualLayout(kernel.shape, "f4")
            layout[...] = h5py.VirtualSource(str(other), "kernel", kernel.shape)
            del content[place]["0"]
            content[place].create_virtual_dataset("0", layout)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "cannot be read as HDF5"),
        ("a group in place of an array", "no array with values of its own"),
        ("an array in place of a group", "cannot be read as HDF5"),
        ("text", "of |S4"),
        ("layer names of nothing", "cannot be read as HDF5"),
        ("layer names that are numbers", "cannot be read as HDF5"),
        ("huge", "Received (65536, 65536)"),
        ("external link", "a link instead of weights"),
        ("external group", "a link instead of weights"),
        ("external storage", "no array with values of its own"),
        ("virtual", "no array with values of its own"),
    ],
)
def test_a_file_that_is_damaged_or_reaches_into_others_is_refused(
    vgg16: Any, tmp_path: Path, kind: str, reason: str
) -> None:
    file = tmp_path / "vgg16.weights.h5"
    vgg16.save_weights(file)
    damaged(file, kind)
    with pytest.raises(WeightsRefused, match=re.escape(reason)):
        backbones.import_weights(BackboneName.VGG16, file)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name is BackboneName.VGG16 else pytest.mark.slow) for name in BackboneName],
)
def test_every_layer_is_found_under_the_name_that_keras_gives_it(name: BackboneName, tmp_path: Path) -> None:
    network = backbones.build_network(name, CATALOGUE[name].minimum_size)
    network.save_weights(tmp_path / "whole.weights.h5")
    assert backbones.import_weights(name, tmp_path / "whole.weights.h5") == backbones.dump_weights(network)


def test_weights_of_another_network_are_refused(vgg16: Any, tmp_path: Path) -> None:
    file = tmp_path / "vgg16.weights.h5"
    vgg16.save_weights(file)
    with pytest.raises(WeightsRefused, match="another network"):
        backbones.import_weights(BackboneName.VGG19, file)


def test_a_network_with_its_top_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "top.weights.h5"
    keras.applications.VGG16(weights=None, include_top=True, classes=2, input_shape=(32, 32, 3)).save_weights(file)
    with pytest.raises(WeightsRefused, match="Expected 26 arrays"):
        backbones.import_weights(BackboneName.VGG16, file)


def test_a_wrong_shape_is_refused_by_name(weights: bytes, tmp_path: Path) -> None:
    arrays = load(weights)
    first = sorted(arrays)[0]
    file = tmp_path / "wrong.safetensors"
    file.write_bytes(save({**arrays, first: np.zeros((1, 1), np.float32)}))
    with pytest.raises(WeightsRefused, match=r"block1_conv1/kernel as \(3, 3, 3, 64\). Received \(1, 1\)"):
        backbones.import_weights(BackboneName.VGG16, file)


def test_values_that_are_no_numbers_are_refused(weights: bytes, tmp_path: Path) -> None:
    arrays = load(weights)
    first = sorted(arrays)[0]
    file = tmp_path / "nan.safetensors"
    file.write_bytes(save({**arrays, first: np.full_like(arrays[first], np.nan)}))
    with pytest.raises(WeightsRefused, match="Expected finite weights"):
        backbones.import_weights(BackboneName.VGG16, file)


class Harmful:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("kind", ["pickle", "keras", "model.h5", "text", "empty"])
def test_what_could_hold_code_is_refused_unread(kind: str, tmp_path: Path) -> None:
    file, trace = tmp_path / f"file.{kind}", tmp_path / "trace"
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    match kind:
        case "pickle":
            file.write_bytes(pickle.dumps(Harmful(trace)))
        case "keras":
            model.save(file)
        case "model.h5":
            with h5py.File(file, "w") as content:
                content.attrs["model_config"] = b"{}"
                content.create_group("model_weights")
        case "text":
            file.write_text("these are no weights at all")
        case "empty":
            file.touch()
    with pytest.raises(WeightsRefused, match=r"whole model|safetensors"):
        backbones.import_weights(BackboneName.VGG16, file)
    assert not trace.exists()
