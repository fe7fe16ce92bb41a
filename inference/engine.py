"""Runs an exported backbone: images in, features out, for training and prediction alike.

Knows no heads, batching or decoding of images.
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

# An int8 file holds its quantised operations itself; the others, such as the global mean, run in float32.
_HINTS = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16", Precision.INT8: "f32"}

# Allowed difference of one network on different processors, relative to the largest value.
# int8: a value halfway between two integers may be rounded either way.
TOLERANCE = {Precision.FLOAT32: 1e-3, Precision.BFLOAT16: 3e-2, Precision.INT8: 5e-2}


class Engine(Protocol):
    """A network that computes features of images."""

    name: str

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]. May be called from several threads."""
        ...

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, the maps float32 [N, h, w, D] that they average."""
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
                f"precision: The processor of this machine has no {precision.value} arithmetic (Intel processors have "
                "it since Sapphire Rapids, AMD processors since Zen 4). Use such a processor, or train with float32, "
                "int8 or auto."
            )

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load an ONNX file. Raises PrecisionUnsupported."""
        self.check(precision)
        core = openvino.Core()
        # By default OpenVINO uses bfloat16 if the processor has it, which would change the score.
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # A pinned thread waits for other work on its processor, and the other threads wait for it.
            "ENABLE_CPU_PINNING": False,
        }
        self._network = core.compile_model(core.read_model(str(network)), "CPU", options)
        self._local = threading.local()

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def maps(self, images: Pixels) -> Features:
        """Return the maps that the features average, float32 [N, h, w, D], for uint8 images [N, H, W, 3]."""
        maps = self.run(images, wants_maps=True)[1]
        assert maps is not None
        return maps

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return features float32 [N, D] and, with `wants_maps`, the maps float32 [N, h, w, D] that they average."""
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
        """Return float32 [N, cells * cells * 3] for uint8 images [N, H, W, 3] with H and W divisible by `cells`."""
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, with `wants_maps`, the same values as maps [N, 1, 1, cells * cells * 3]."""
        self.images_seen += len(images)
        count, height, width, _ = images.shape
        grid = images.reshape(count, self._cells, height // self._cells, self._cells, width // self._cells, 3)
        means: Features = grid.mean(axis=(2, 4), dtype=np.float32).reshape(count, -1)
        return means, means[:, None, None, :] if wants_maps else None
