"""Builds the Keras models of the catalogue's backbones, up to a cut point and with their preprocessing.

The weights of a network are stored as one safetensors file, in the order of the Keras attribute `weights`. They do not
depend on the image size. Weights files from other sources are read array by array, so that code in a file is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from errors import WeightsRefused
from recipes.catalogue import CATALOGUE, BackboneName, Preprocessing

_BUILDERS: Mapping[BackboneName, Callable[..., Any]] = {
    BackboneName.VGG16: keras.applications.VGG16,
    BackboneName.VGG19: keras.applications.VGG19,
    BackboneName.RESNET50: keras.applications.ResNet50,
    BackboneName.INCEPTION_V3: keras.applications.InceptionV3,
    BackboneName.XCEPTION: keras.applications.Xception,
}

# The means of blue, green and red in ImageNet, as in the Caffe models that VGG and ResNet50 were converted from.
_CAFFE_MEANS = (103.939, 116.779, 123.68)

RANDOM_SEED = 0


def build_network(name: BackboneName, size: int) -> Any:
    """Return the Keras network without its top, with random weights, for preprocessed images [N, size, size, 3]."""
    return _BUILDERS[name](include_top=False, weights=None, input_shape=(size, size, 3))


def random_weights(name: BackboneName) -> bytes:
    """Return random weights as `dump_weights` does. They are the same on every call, so that models share them."""
    keras.utils.set_random_seed(RANDOM_SEED)
    return dump_weights(build_network(name, CATALOGUE[name].minimum_size))


def dump_weights(model: Any) -> bytes:
    """Return the weights of a network as safetensors.

    The arrays are named by their number in the network. Keras' own names depend on which networks were built before.
    """
    arrays = {
        f"{number:04d}": np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        for number, variable in enumerate(model.weights)
    }
    return save_tensors(arrays)


def load_weights(model: Any, data: bytes) -> None:
    """Set the weights of a network from the bytes that `dump_weights` returned.

    Raises:
        WeightsRefused: the bytes are not safetensors, or the number or shapes of the arrays differ from the network's.
    """
    try:
        arrays = load_tensors(data)
    except SafetensorError as error:
        raise WeightsRefused(f"The weights cannot be read as safetensors: {error}.") from error
    _set(model, [arrays[name] for name in sorted(arrays)])


def import_weights(name: BackboneName, file: Path) -> bytes:
    """Read a weights file from another source, check every shape, and return the weights as `dump_weights` does.

    Args:
        name: the network that the weights belong to; the weights of its top are not included.
        file: Keras weights (`.weights.h5`, or the older `.h5` of `save_weights`), or safetensors.

    Raises:
        WeightsRefused: the file contains more than weights, or does not fit the network.
    """
    model = build_network(name, CATALOGUE[name].minimum_size)
    with file.open("rb") as stream:
        head = stream.read(8)
    if head == b"\x89HDF\r\n\x1a\n":
        _load_hdf5(model, file)
    elif len(head) == 8 and int.from_bytes(head, "little") < min(file.stat().st_size, 100_000_000):
        load_weights(model, file.read_bytes())
    else:
        raise WeightsRefused(
            "The file is neither .weights.h5, .h5 nor .safetensors. Whole models, .keras files and pickles are not "
            "accepted, because they can contain code. Save the weights alone, with model.save_weights()."
        )
    return dump_weights(model)


def _load_hdf5(model: Any, file: Path) -> None:
    try:
        with h5py.File(file, "r") as content:
            if "model_config" in content.attrs or _has(content, "model_weights"):
                raise WeightsRefused(
                    "The file is a whole model, which can contain code. Save the weights alone, with "
                    "model.save_weights()."
                )
            is_legacy = "layer_names" in content.attrs
            _set(model, _legacy_arrays(content) if is_legacy else _keras3_arrays(model, content))
    except WeightsRefused:
        raise
    except Exception as error:  # h5py raises many kinds: OSError, KeyError, RuntimeError, MemoryError
        raise WeightsRefused(f"The file cannot be read as HDF5: {str(error) or type(error).__name__}.") from error


def _legacy_arrays(content: Any) -> list[Any]:
    """Return the arrays of the older HDF5 layout, in network order.

    The attribute `layer_names` lists the layers, and the attribute `weight_names` of each layer lists its arrays.
    """
    arrays = []
    for layer in content.attrs["layer_names"]:
        group = _inside(content, layer)
        arrays += [_array(group, weight) for weight in group.attrs["weight_names"]]
    return arrays


def _keras3_arrays(model: Any, content: Any) -> list[Any]:
    """Return the arrays of a `.weights.h5` file, in network order.

    Array i of a layer is at `layers/<class>/vars/<i>`. Further layers of the same class are `<class>_1`, `<class>_2`
    and so on.
    """
    counts: dict[str, int] = {}
    arrays = []
    root = _inside(content, "layers") if _has(content, "layers") else content
    for layer in model.layers:
        kind = snake_case(type(layer).__name__)
        number = counts[kind] = counts.get(kind, -1) + 1
        key = kind if number == 0 else f"{kind}_{number}"
        for index in range(len(layer.weights)):
            path = f"{key}/vars/{index}"
            try:
                arrays.append(_array(root, path))
            except KeyError as error:
                raise WeightsRefused(
                    f"The file has no weights for layer {layer.name!r} at {path}. It may belong to another network."
                ) from error
    groups = [_inside(root, name) for name in root]
    found = sum(len(_inside(group, "vars")) for group in groups if _has(group, "vars"))
    if found != len(arrays):
        raise WeightsRefused(
            f"Expected {len(arrays)} arrays for this network. Received {found}. The file may belong to another network."
        )
    return arrays


def snake_case(name: str) -> str:
    """Return a class name as Keras writes it in files: `conv2d` for `Conv2D`, or `batch_normalization`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _has(group: Any, name: str) -> bool:
    """Return whether an HDF5 group has an entry. Unlike `in`, this never opens another file through a link."""
    return bool(group.id.links.exists(name.encode()))


def _inside(group: Any, path: str | bytes) -> Any:
    """Return the entry at a path inside an HDF5 group.

    Raises:
        KeyError: there is no such entry.
        WeightsRefused: the entry is a link.
    """
    for name in (path if isinstance(path, str) else path.decode()).split("/"):
        if not _has(group, name):
            raise KeyError(f"no {name} in {group.name}")
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise WeightsRefused(f"The file has a link instead of weights at {group.name}/{name}.")
        group = group[name]
    return group


def _array(group: Any, path: str | bytes) -> Any:
    """Return an array of an HDF5 file without reading its values."""
    array = _inside(group, path)
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
        raise WeightsRefused(f"The file has no array with values of its own at {array.name!r}.")
    return array


def _set(model: Any, arrays: Sequence[Any]) -> None:
    """Set the weights of a network from NumPy or HDF5 arrays. All shapes are checked before HDF5 values are read."""
    if len(arrays) != len(model.weights):
        raise WeightsRefused(
            f"Expected the {len(model.weights)} arrays of {model.name} without its top. Received {len(arrays)}."
        )
    for variable, array in zip(model.weights, arrays, strict=True):
        if tuple(variable.shape) != array.shape or array.dtype.kind != "f":
            expected = f"{variable.path} as {tuple(variable.shape)}"
            raise WeightsRefused(f"Expected {expected}. Received {array.shape} of {array.dtype}.")
    values = [np.asarray(array) for array in arrays]
    for variable, value in zip(model.weights, values, strict=True):
        if not np.isfinite(value).all():
            raise WeightsRefused(f"Expected finite weights. Received infinite values or NaN in {variable.path}.")
    model.set_weights(values)


def build_backbone(name: BackboneName, cut: str, size: int, weights: bytes) -> Any:
    """Return the frozen network from pixels to features.

    Args:
        name: the network.
        cut: the cut point whose output becomes the features; later layers are left out.
        size: side of the images in pixels.
        weights: the weights of the whole network, as `dump_weights` returns them.

    Returns:
        a Keras model from `images` uint8 [N, size, size, 3] to `{"features": float32 [N, D], "maps": float32
        [N, h, w, D]}`. The features are the mean of the maps over height and width.
    """
    full = build_network(name, size)
    load_weights(full, weights)
    backbone = keras.Model(full.input, cut_layer(full, name, cut).output, name=f"{name}_{cut}")
    backbone.trainable = False
    images = keras.Input((size, size, 3), dtype="uint8", name="images")
    maps = backbone(preprocess(images, CATALOGUE[name].preprocessing), training=False)
    features = keras.layers.GlobalAveragePooling2D(name="features")(maps)
    model = keras.Model(images, {"features": features, "maps": maps})
    model(np.zeros((1, size, size, 3), np.uint8))  # the ONNX export fails for a model that was never called
    return model


def build_multi_cut_network(name: BackboneName, cuts: Sequence[str], size: int, weights: bytes) -> Any:
    """Return a Keras model from uint8 images [N, size, size, 3] to a dict of the features [N, D] at each cut."""
    full = build_network(name, size)
    load_weights(full, weights)
    full.trainable = False
    backbone = keras.Model(full.input, {cut: cut_layer(full, name, cut).output for cut in cuts})
    images = keras.Input((size, size, 3), dtype="uint8")
    maps = backbone(preprocess(images, CATALOGUE[name].preprocessing), training=False)
    features = {cut: keras.layers.GlobalAveragePooling2D(name=cut)(maps[cut]) for cut in cuts}
    return keras.Model(images, features)


@dataclass(frozen=True)
class SplitNetwork:
    """A network that is split for fine-tuning into frozen and trainable layers.

    Attributes:
        full: the whole network without its top. It shares its layers with the two parts, so that training changes it.
        frozen: the frozen layers, a model from preprocessed images [N, size, size, 3] to maps; None if no layer is
            frozen.
        trainable: the other layers, a model from these maps (or from preprocessed images) to features [N, D]. All of
            them are trained except BatchNorm layers.
    """

    full: Any
    frozen: Any
    trainable: Any


def split_network(name: BackboneName, frozen_until: str | None, cut: str, size: int, weights: bytes) -> SplitNetwork:
    """Split a network into frozen and trainable layers.

    Args:
        name: the network.
        frozen_until: the last cut point of the frozen layers; None if no layer is frozen.
        cut: the cut point whose output becomes the features.
        size: side of the images in pixels.
        weights: the weights of the whole network, as `dump_weights` returns them.
    """
    full = build_network(name, size)
    load_weights(full, weights)
    for layer in full.layers:
        # Only `trainable = False` keeps BatchNorm's statistics: training=False has no effect inside a nested model.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    maps = cut_layer(full, name, cut).output
    features = keras.layers.GlobalAveragePooling2D(name="features")(maps)
    if frozen_until is None:
        return SplitNetwork(full, None, keras.Model(full.input, features))
    boundary = cut_layer(full, name, frozen_until).output
    frozen = keras.Model(full.input, boundary)
    trainable = keras.Model(boundary, features)
    frozen.trainable = False
    return SplitNetwork(full, frozen, trainable)


def preprocess(images: Any, preprocessing: Preprocessing) -> Any:
    """Return images [N, H, W, 3] with values from 0 to 255 as float32, normalised as the network expects."""
    pixels = keras.ops.cast(images, "float32")
    if preprocessing is Preprocessing.CAFFE:
        return keras.ops.flip(pixels, axis=-1) - np.array(_CAFFE_MEANS, np.float32)
    return pixels / 127.5 - 1.0


def cut_layer(full: Any, name: BackboneName, cut: str) -> Any:
    """Return the Keras layer whose output is the maps at a cut point."""
    match name:
        case BackboneName.VGG16 | BackboneName.VGG19:
            return full.get_layer(f"{cut}_pool")
        case BackboneName.RESNET50:
            blocks = {"conv2": 3, "conv3": 4, "conv4": 6, "conv5": 3}
            return full.get_layer(f"{cut}_block{blocks[cut]}_out")
        case BackboneName.INCEPTION_V3:
            return full.get_layer(cut)
        case BackboneName.XCEPTION:
            if cut == "block14":
                return full.get_layer("block14_sepconv2_act")
            # Blocks 2 to 13 end in an addition. Keras names additions by a global counter, so they are found by order.
            additions = [layer for layer in full.layers if isinstance(layer, keras.layers.Add)]
            return additions[int(cut.removeprefix("block")) - 2]
