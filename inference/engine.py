"""Runs exported backbones with OpenVINO: pixels in, features out. Training and prediction use the same engine.

Knows no heads, no batching and no image files.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino

from artifacts.features import Features
from artifacts.images import Pixels
from errors import PrecisionUnsupported
from recipes.recipe import Precision

# An int8 file contains quantised operations; its other operations, such as the global average, run in float32.
_HINTS = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16", Precision.INT8: "f32"}

# How much the outputs of a network may differ between processors, relative to the largest output. For int8 it is more,
# because a value halfway between two integers may be rounded up or down.
TOLERANCE = {Precision.FLOAT32: 1e-3, Precision.BFLOAT16: 3e-2, Precision.INT8: 5e-2}


class Engine(Protocol):
    """A loaded network that computes features of images."""

    name: str

    def features(self, images: Pixels) -> Features:
        """Return features float32 [N, D] for images uint8 [N, H, W, 3]. May be called from several threads."""
        ...

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, maps float32 [N, h, w, D].

        The features are the mean of the maps over height and width. Without `wants_maps`, the second value is None.
        """
        ...


class OpenVinoEngine:
    """An ONNX network run by OpenVINO on the processor."""

    name = "openvino"

    @staticmethod
    def precisions() -> list[Precision]:
        """Return the precisions that this machine's processor supports."""
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return [precision for precision in Precision if precision is not Precision.BFLOAT16 or "BF16" in able]

    @classmethod
    def check(cls, precision: Precision) -> None:
        """Raise PrecisionUnsupported if this machine's processor does not support a precision."""
        if precision not in cls.precisions():
            raise PrecisionUnsupported(
                f"precision: The processor of this machine has no {precision.value} arithmetic. Intel processors have "
                "it since Sapphire Rapids, and AMD processors since Zen 4. Use such a processor, or train with "
                "float32, int8 or auto."
            )

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load an ONNX file.

        Args:
            network: the file; its input is uint8 [N, H, W, 3], its outputs are `features` and `maps`.
            precision: the arithmetic to use.
            threads: number of threads for one call.

        Raises:
            PrecisionUnsupported: the processor of this machine does not support the precision.
        """
        self.check(precision)
        core = openvino.Core()
        # Always set, because by default OpenVINO uses bfloat16 if the processor has it, which would change scores.
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # Off, because a pinned thread cannot leave a processor that other work keeps busy, and all threads wait.
            "ENABLE_CPU_PINNING": False,
        }
        self._network = core.compile_model(core.read_model(str(network)), "CPU", options)
        self._local = threading.local()

    def features(self, images: Pixels) -> Features:
        """Return features float32 [N, D] for images uint8 [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def maps(self, images: Pixels) -> Features:
        """Return the feature maps, float32 [N, h, w, D] for images uint8 [N, H, W, 3]."""
        maps = self.run(images, wants_maps=True)[1]
        assert maps is not None
        return maps

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, maps float32 [N, h, w, D].

        The features are the mean of the maps over height and width. Without `wants_maps`, the second value is None.
        """
        if not hasattr(self._local, "request"):
            self._local.request = self._network.create_infer_request()
        request: Any = self._local.request
        request.infer([np.ascontiguousarray(images)])
        outputs = ("features", "maps") if wants_maps else ("features",)
        features, *maps = (np.array(request.get_tensor(output).data, dtype=np.float32) for output in outputs)
        return features, maps[0] if maps else None


class FlatEngine:
    """An engine without a network: features are the mean colours of grid cells. For tests and benchmarks."""

    name = "flat"

    def __init__(self, cells: int = 4) -> None:
        self._cells = cells
        self.images_seen = 0

    def features(self, images: Pixels) -> Features:
        """Return features float32 [N, cells * cells * 3] for images uint8 [N, H, W, 3].

        H and W must be divisible by `cells`.
        """
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, with `wants_maps`, the same values as maps float32 [N, 1, 1, cells * cells * 3]."""
        self.images_seen += len(images)
        count, height, width, _ = images.shape
        grid = images.reshape(count, self._cells, height // self._cells, self._cells, width // self._cells, 3)
        means: Features = grid.mean(axis=(2, 4), dtype=np.float32).reshape(count, -1)
        return means, means[:, None, None, :] if wants_maps else None
