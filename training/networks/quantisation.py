"""Quantises ONNX networks to int8 with NNCF, calibrated on images. Knows no store, no heads and no scores.

Weights and activations become integers. The range of the activations is measured on the calibration images. The inputs
(uint8 images) and the outputs (`features` and `maps`, float32) stay the same.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx

from artifacts.images import Pixels
from recipes.layers import Sides, sides
from training.data.arrays import ReportProgress

CALIBRATED_ON = 300
_CALIBRATION_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class QuantisedNetwork:
    """A quantised ONNX network, the number of images that it was calibrated on, and the tool that made it."""

    onnx: bytes
    images: int
    made_with: str

    def facts(self) -> dict[str, Any]:
        """Return all attributes except the file, as JSON values that are stored with the network."""
        return {name: value for name, value in vars(self).items() if name != "onnx"}


def calibration_size(size: Sides) -> int:
    """Return the number of images to calibrate on: 300, or fewer if images of this size would take too much memory."""
    return max(1, min(CALIBRATED_ON, _CALIBRATION_BYTES // (3 * prod(sides(size)))))


def quantise(network: bytes, images: Pixels, report: ReportProgress) -> QuantisedNetwork:
    """Quantise an exported network.

    Args:
        network: ONNX with one input, uint8 [N, H, W, 3].
        images: the calibration images, uint8 [n, H, W, 3].
        report: called with (done, total) images.
    """
    nncf = _nncf()
    model = onnx.load_from_string(network)
    name = model.graph.input[0].name

    def one_by_one() -> Iterator[Pixels]:
        for number in range(len(images)):
            report(number + 1, len(images))
            yield images[number : number + 1]

    made = nncf.quantize(
        model,
        nncf.Dataset(_Repeatable(one_by_one), lambda image: {name: image}),
        # Symmetric weights and asymmetric activations, because activations without a ReLU can be negative.
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    return QuantisedNetwork(made.SerializeToString(), len(images), f"nncf {importlib.metadata.version('nncf')}")


class _Repeatable:
    """An iterable that can be iterated several times, which NNCF needs."""

    def __init__(self, images: Callable[[], Iterator[np.ndarray]]) -> None:
        self._images = images

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._images()


def _nncf() -> Any:
    """Import NNCF, and with it ONNX Runtime."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
