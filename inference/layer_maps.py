"""What the layers of a network see, read out of the very file that answers. Knows no Keras, no store and no HTTP.

The export keeps the names that Keras gave the layers in those of its tensors: `…/block1_conv1_1/Relu:0`, where the last
number counts the calls of the layer. Layers that it has merged with others are not there: a convolution before a
BatchNorm is only seen behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from artifacts.features import Features
from artifacts.images import Pixels

CHANNELS = 64
"""That are drawn of a layer, the strongest ones."""

_CALLED = re.compile(r"(?P<layer>.+)_\d+")
# Parts of a layer whose output is not the layer's own, by the end of their names.
_INNER = "/separable_conv2d/depthwise"
# These number places anew, so that nobody knows any more which is which.
_RESHAPING = {"Squeeze", "Unsqueeze", "Gather", "Expand", "Broadcast", "ShapeOf", "ReduceMean"}
# What stands between layers and belongs to none.
_BETWEEN = {"Transpose", "Reshape", "Convert", "FakeQuantize", "Constant"}
_IMAGE_AXES = "NHWC"


@dataclass(frozen=True)
class Layer:
    """A layer whose output has a place for each part of the image: `channels` maps of `height` times `width`."""

    name: str
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class _Output:
    """What a layer gives, and which of its axes is which: some order of NHWC."""

    output: Any
    axes: str


class LayerReader:
    """A network, exported from Keras, whose layers can be looked at; computes in float32."""

    def __init__(self, network: Path, threads: int) -> None:
        """Read an ONNX file whose input is uint8 [N, H, W, 3]."""
        self._core = openvino.Core()
        self._threads = threads
        self._model = self._core.read_model(str(network))
        _, height, width, depth = (dimension.get_max_length() for dimension in self._model.inputs[0].partial_shape)
        self._model.reshape([1, height, width, depth])
        self._outputs: dict[str, _Output] = {}
        self.layers: list[Layer] = []
        for name, (output, axes) in _layers(self._model).items():
            sides = dict(zip(axes, output.get_shape(), strict=True))
            self._outputs[name] = _Output(output, axes)
            self.layers.append(Layer(name, sides["H"], sides["W"], sides["C"]))

    def maps(self, pixels: Pixels, layer: str) -> Features:
        """Return what a layer makes of an image uint8 [H, W, 3], float32 [h, w, channels]."""
        wanted = self._outputs[layer]
        # What comes after the layer is neither compiled nor computed.
        model = openvino.Model([wanted.output], self._model.get_parameters(), layer)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self._threads}
        network = self._core.compile_model(model, "CPU", options)
        found = network(np.ascontiguousarray(pixels)[None])[network.output(0)]
        order = [wanted.axes.index(axis) for axis in _IMAGE_AXES]
        maps: Features = np.asarray(found, dtype=np.float32).transpose(order)[0]
        return maps


def _layers(model: Any) -> Mapping[str, tuple[Any, str]]:
    """Return the output of each layer that has places, and the order of its axes, in the order of the network."""
    axes: dict[str, str] = {}
    found: dict[str, tuple[Any, str]] = {}
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        order = _axes(operation, kind, axes)
        if order is None:
            continue
        for output in operation.outputs():
            axes[_key(output)] = order
            tensor = _name(output)
            name = _layer(tensor)
            if name is not None and kind not in _BETWEEN and not tensor.removesuffix(":0").endswith(_INNER):
                found.pop(name, None)  # the last of its parts is what the layer gives
                found[name] = (output, order)
    return found


def _axes(operation: Any, kind: str, known: Mapping[str, str]) -> str | None:
    """Return the order of the axes of what an operation gives, or None if it has no places or nobody knows."""
    if kind == "Parameter":
        return _IMAGE_AXES
    if kind in _RESHAPING or any(output.get_partial_shape().rank != 4 for output in operation.outputs()):
        return None
    sources = operation.input_values()
    source = next((source for source in sources if _key(source) in known), None)
    if source is None:
        return None
    order = known[_key(source)]
    if kind == "Transpose":
        return "".join(order[axis] for axis in sources[1].get_node().get_data().tolist())
    if kind == "Reshape":
        return _reshaped(dict(zip(order, source.get_shape(), strict=True)), operation.output(0).get_shape())
    return order


def _reshaped(sides: Mapping[str, int], shape: Sequence[int]) -> str | None:
    """Return the order of the axes after maps of one place were turned, which the export writes as a reshape."""
    if sides["H"] * sides["W"] > 1:
        return None
    return next((order for order in (_IMAGE_AXES, "NCHW") if [sides[axis] for axis in order] == list(shape)), None)


def _key(output: Any) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"


def _name(output: Any) -> str:
    """Return the name of a tensor by which the network is asked for it, or nothing."""
    return min(output.get_names(), key=len, default="")


def _layer(tensor: str) -> str | None:
    """Return the layer that a tensor belongs to: the innermost part of its path that counts calls."""
    for part in _path_parts(tensor):
        called = _CALLED.fullmatch(part)
        if called is not None:
            return called["layer"]
    return None


def _path_parts(tensor: str) -> Iterator[str]:
    """Yield the parts of a path from within, without the operation itself and without the network as a whole."""
    yield from reversed(tensor.split("/")[1:-1])
