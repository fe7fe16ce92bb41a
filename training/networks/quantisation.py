"""Quantises ONNX networks to int8 with NNCF, calibrated on images. Knows no store, no heads and no scores.

Weights become integers, and so do activations, within the bounds that they have on the calibration images. Inputs and
outputs stay as they were exported: uint8 images in, `features` and `maps` out in float32.
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
        """Return everything but the file, as it is stored with the network."""
        return {name: value for name, value in vars(self).items() if name != "onnx"}


def calibration_size(size: Sides) -> int:
    """Return the largest number of images of `size` pixels to calibrate on. It is bounded by their memory."""
    return max(1, min(CALIBRATED_ON, _CALIBRATION_BYTES // (3 * prod(sides(size)))))


def quantise(network: bytes, images: Pixels, report: ReportProgress) -> QuantisedNetwork:
    """Quantise an exported network.

    Args:
        network: ONNX with one input, uint8 [N, H, W, 3].
        images: uint8 [n, H, W, 3] to calibrate it on.
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
        # Symmetric weights and asymmetric activations, since activations without a rectifier can be negative.
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    return QuantisedNetwork(made.SerializeToString(), len(images), f"nncf {importlib.metadata.version('nncf')}")


class _Repeatable:
    """An iterable that starts again on each iteration, since NNCF iterates over the images more than once."""

    def __init__(self, images: Callable[[], Iterator[np.ndarray]]) -> None:
        self._images = images

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._images()


def _nncf() -> Any:
    """Import NNCF, and with it ONNX Runtime."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
