"""Bundles, format 3: a safetensors file with everything that predictions of one model version need but the backbone.

Format 2 adds the unit of numbers to format 1, and format 3 the bit depth of images. A bundle is written in the first
format that can hold it, so that earlier versions of Espalier read it if they can. The metadata of the file is the
manifest. The tensors are the weights of the head, and a golden input with its output. The manifest
names the backbone by digest, so that bundles can share it. A bundle contains arrays and text, never code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from artifacts.bit_depths import BIT_DEPTHS, FULL_DEPTH
from artifacts.images import Pixels
from artifacts.store import Digest, parse_digest
from artifacts.tensors import UNREADABLE, dump, load_values
from artifacts.tensors import load as load_tensors
from errors import BundleRefused
from recipes.layers import Activation, Sides, sides
from recipes.recipe import Precision, Resize, Task

FORMAT, FORMAT_WITH_UNIT, FORMAT_WITH_BIT_DEPTH = FORMATS = 1, 2, 3

Float32 = npt.NDArray[np.float32]
Logits = npt.NDArray[np.floating[Any]]
"""The outputs of a head, [N, outputs]: float32, or float64 for the numbers of a regression, see `Unit`."""


@dataclass(frozen=True)
class Unit:
    """The unit of the numbers that a regression answers: `output * scale + mean`, computed in float64.

    Both are float64 [outputs]. They are not merged into the layer, since float32 has seven digits: numbers that vary
    little around a large mean, such as times in seconds since 1970, would lose what varies.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dense:
    """One dense layer: `activation((x - offset) @ kernel + bias)`, converted to `unit` if that is not None.

    kernel is float32 [inputs, units], bias float32 [units], and offset float32 [inputs] or None. The offset is not
    merged into the bias: for features that vary little around a large mean, the result would lose precision in float32.
    Only the last layer can have a unit.
    """

    kernel: Float32
    bias: Float32
    activation: Activation
    offset: Float32 | None = None
    unit: Unit | None = None


@dataclass(frozen=True)
class Bundle:
    """Everything that predictions of one model version need, except for the backbone.

    Attributes:
        task: what the model predicts, for example one of several classes.
        labels: class names in the order of the outputs; a binary bundle has two labels and one output.
        backbone: digest of the network that turns images into features.
        image_rule: number of the rule for decoding images (see `artifacts.images`).
        bit_depth: number of bits from which 16-bit images are scaled (see `artifacts.bit_depths`).
        layers: the head, from features [N, D] to logits [N, outputs]; the last activation is linear.
        temperature: logits are divided by it before they become probabilities.
        threshold: minimum probability for the second class of a binary task, and for each label of a multi-label task.
        size: size of the images in pixels: the side of a square, or height and width.
        golden_input: images for testing the bundle, uint8 [N, H, W, 3].
        golden_output: the logits that the model must compute for `golden_input`, [N, outputs]: float64 if the last
            layer has a unit, else float32.
        neighbours: digest of the file with training images to show as neighbours; None if the run has kept none.
    """

    task: Task
    labels: tuple[str, ...]
    backbone: Digest
    engine: str
    precision: Precision
    image_rule: int
    size: Sides
    resize: Resize
    layers: tuple[Dense, ...]
    golden_input: Pixels
    golden_output: Logits
    temperature: float = 1.0
    threshold: float = 0.5
    neighbours: Digest | None = None
    bit_depth: int = FULL_DEPTH

    @property
    def _format(self) -> int:
        if self.bit_depth != FULL_DEPTH:
            return FORMAT_WITH_BIT_DEPTH
        return FORMAT if self.layers[-1].unit is None else FORMAT_WITH_UNIT

    def dump(self) -> bytes:
        """Return the bytes of the bundle's file. Equal bundles give equal bytes."""
        manifest = {
            "format": self._format,
            "task": self.task,
            "labels": self.labels,
            "backbone": self.backbone,
            "engine": self.engine,
            "precision": self.precision,
            "image_rule": self.image_rule,
            "size": self.size,
            "resize": self.resize,
            "layers": [{"type": "dense", "activation": layer.activation} for layer in self.layers],
            "temperature": self.temperature,
            "threshold": self.threshold,
        }
        if self.neighbours is not None:
            manifest["neighbours"] = self.neighbours
        if self._format == FORMAT_WITH_BIT_DEPTH:
            manifest["bit_depth"] = self.bit_depth
        tensors: dict[str, npt.NDArray[Any]] = {
            "golden_input": self.golden_input,
            "golden_output": self.golden_output,
        }
        for number, layer in enumerate(self.layers):
            tensors[f"layers.{number}.kernel"] = layer.kernel
            tensors[f"layers.{number}.bias"] = layer.bias
            if layer.offset is not None:
                tensors[f"layers.{number}.offset"] = layer.offset
            if layer.unit is not None:
                tensors |= {f"layers.{number}.mean": layer.unit.mean, f"layers.{number}.scale": layer.unit.scale}
        return dump(manifest, tensors)


def load(data: bytes) -> Bundle:
    """Return the bundle from the bytes of its file. Raises BundleRefused if it is not valid."""
    try:
        manifest = load_values(data)
        if manifest.get("format") not in FORMATS:
            raise BundleRefused(
                f"Expected a bundle of format {FORMAT} to {FORMATS[-1]}. Received format {manifest.get('format')}."
            )
        return _bundle(*load_tensors(data))
    except UNREADABLE as error:
        raise BundleRefused(f"The bundle cannot be read: {error}.") from error


def _bundle(manifest: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Bundle:
    layers = tuple(
        Dense(
            tensors[f"layers.{number}.kernel"],
            tensors[f"layers.{number}.bias"],
            Activation(layer["activation"]),
            tensors.get(f"layers.{number}.offset"),
            Unit(tensors[f"layers.{number}.mean"], tensors[f"layers.{number}.scale"])
            if f"layers.{number}.mean" in tensors
            else None,
        )
        for number, layer in enumerate(manifest["layers"])
    )
    bundle = Bundle(
        task=Task(manifest["task"]),
        labels=tuple(manifest["labels"]),
        backbone=parse_digest(manifest["backbone"]),
        engine=manifest["engine"],
        precision=Precision(manifest["precision"]),
        image_rule=manifest["image_rule"],
        size=_size(manifest["size"]),
        resize=Resize(manifest["resize"]),
        layers=layers,
        golden_input=tensors["golden_input"],
        golden_output=tensors["golden_output"],
        temperature=manifest["temperature"],
        threshold=manifest["threshold"],
        neighbours=parse_digest(manifest["neighbours"]) if "neighbours" in manifest else None,
        bit_depth=manifest.get("bit_depth", FULL_DEPTH),
    )
    _check(bundle)
    return bundle


def _size(value: int | list[int]) -> Sides:
    if isinstance(value, int):
        return value
    height, width = value
    return height, width


_F64, _F32, _U8 = np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.uint8)


def _check(bundle: Bundle) -> None:
    """Check that the arrays of a bundle fit each other, the labels and the image size. Raises BundleRefused."""
    units = [layer.kernel.shape[-1] for layer in bundle.layers]
    images, outputs = max(1, len(bundle.golden_input)), units[-1]
    for number, layer in enumerate(bundle.layers):
        inputs = units[number - 1] if number else layer.kernel.shape[0]
        _expect(f"layers.{number}.kernel", layer.kernel, _F32, (inputs, units[number]))
        _expect(f"layers.{number}.bias", layer.bias, _F32, (units[number],))
        if layer.offset is not None:
            _expect(f"layers.{number}.offset", layer.offset, _F32, (inputs,))
    unit = bundle.layers[-1].unit
    if any(layer.unit for layer in bundle.layers[:-1]) or (unit and bundle.task is not Task.REGRESSION):
        raise BundleRefused("Expected a unit only of the last layer of a regression. Received another.")
    if unit is not None:
        _expect("the unit's mean", unit.mean, _F64, (outputs,))
        _expect("the unit's scale", unit.scale, _F64, (outputs,))
    if bundle.layers[-1].activation is not Activation.LINEAR:
        raise BundleRefused(f"Expected a linear last layer. Received {bundle.layers[-1].activation}.")
    _expect("golden_input", bundle.golden_input, _U8, (images, *sides(bundle.size), 3))
    _expect("golden_output", bundle.golden_output, _F32 if unit is None else _F64, (images, outputs))
    if bundle.bit_depth not in BIT_DEPTHS:
        raise BundleRefused(f"Expected a bit depth of {', '.join(map(str, BIT_DEPTHS))}. Received {bundle.bit_depth}.")
    labels = len(bundle.labels)
    if (labels, outputs) != {Task.BINARY: (2, 1), Task.REGRESSION: (0, 1)}.get(bundle.task, (labels, labels)):
        raise BundleRefused(f"The labels do not fit the head of a {bundle.task} task: {labels} for {outputs} outputs.")


def _expect(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise BundleRefused(f"Expected {name} to be {dtype} {list(shape)}. Received {array.dtype} {list(array.shape)}.")
