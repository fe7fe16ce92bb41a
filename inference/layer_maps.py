"""Computes the maps of single layers of an exported network. Knows no Keras, no store and no HTTP.

The ONNX export keeps the names of Keras layers in its tensor names, such as `…/block1_conv1_1/Relu:0`, where the last
number counts the calls of the layer. Layers that the export merged with others are missing. For example, a convolution
that was merged with its BatchNorm has no output of its own.
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
"""How many channels of a layer a picture shows at most: the strongest ones."""

_CALLED = re.compile(r"(?P<layer>.+)_\d+")
# Suffix of the name of an intermediate tensor, which is inside a layer but not its output.
_INNER = "/separable_conv2d/depthwise"
# Operations after which the order of the axes is unknown.
_RESHAPING = {"Squeeze", "Unsqueeze", "Gather", "Expand", "Broadcast", "ShapeOf", "ReduceMean"}
# Operations that are between layers and belong to no layer.
_BETWEEN = {"Transpose", "Reshape", "Convert", "FakeQuantize", "Constant"}
_IMAGE_AXES = "NHWC"


@dataclass(frozen=True)
class Layer:
    """A layer whose output is maps: `channels` maps of `height` × `width` positions."""

    name: str
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class _Output:
    """The OpenVINO output of a layer, and the order of its axes, such as `NHWC` or `NCHW`."""

    output: Any
    axes: str


class LayerReader:
    """Computes the output of single layers of a network exported from Keras, in float32."""

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
        """Return the maps of a layer for one image.

        Args:
            pixels: the image, uint8 [H, W, 3].
            layer: name of the layer.

        Returns:
            float32 [h, w, channels].

        Raises:
            KeyError: the network has no such layer.
        """
        chosen = self._outputs[layer]
        # A model that ends at this layer, so that later operations are neither compiled nor computed.
        model = openvino.Model([chosen.output], self._model.get_parameters(), layer)
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self._threads}
        network = self._core.compile_model(model, "CPU", options)
        found = network(np.ascontiguousarray(pixels)[None])[network.output(0)]
        order = [chosen.axes.index(axis) for axis in _IMAGE_AXES]
        maps: Features = np.asarray(found, dtype=np.float32).transpose(order)[0]
        return maps


def _layers(model: Any) -> Mapping[str, tuple[Any, str]]:
    """Return, for each layer whose output is maps, the output and the order of its axes; in network order."""
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
                found.pop(name, None)  # the last operation of a layer gives its output
                found[name] = (output, order)
    return found


def _axes(operation: Any, kind: str, known: Mapping[str, str]) -> str | None:
    """Return the order of the axes of an operation's output; None if the output is not maps or the order is unknown."""
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
    """Return the order of the axes after a reshape; None if it is unknown.

    It is known only for maps of 1×1 positions, because the export writes a transpose of such maps as a reshape.
    """
    if sides["H"] * sides["W"] > 1:
        return None
    return next((order for order in (_IMAGE_AXES, "NCHW") if [sides[axis] for axis in order] == list(shape)), None)


def _key(output: Any) -> str:
    return f"{output.get_node().get_name()}:{output.get_index()}"


def _name(output: Any) -> str:
    """Return the shortest of the names of an OpenVINO output, or an empty string if it has none."""
    return min(output.get_names(), key=len, default="")


def _layer(tensor: str) -> str | None:
    """Return the name of the layer that a tensor belongs to, or None.

    It is the innermost part of the tensor's path that ends with a call number.
    """
    for part in _path_parts(tensor):
        called = _CALLED.fullmatch(part)
        if called is not None:
            return called["layer"]
    return None


def _path_parts(tensor: str) -> Iterator[str]:
    """Yield the parts of a tensor path, the innermost first, without the network and the operation."""
    yield from reversed(tensor.split("/")[1:-1])
