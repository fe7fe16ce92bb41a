"""Runs an exported backbone: images in, features out. The same engine feeds training and answers predictions.

Knows nothing of heads, batching or files being decoded.
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

# What is quantised is so in the file; what is not, such as the mean over all places, is computed in float32.
_HINTS = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16", Precision.INT8: "f32"}

# How far two runs of one network on different processors may differ, relative to the largest value.
# Integers are rounded alike everywhere, but what lies just between two of them may fall to either side.
TOLERANCE = {Precision.FLOAT32: 1e-3, Precision.BFLOAT16: 3e-2, Precision.INT8: 5e-2}


class Engine(Protocol):
    """A network that turns images into features."""

    name: str

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]. May be called from several threads."""
        ...

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, if asked, the maps that they are the mean of, float32 [N, h, w, D]."""
        ...


class OpenVinoEngine:
    """An ONNX network run by OpenVINO on the processor."""

    name = "openvino"

    @staticmethod
    def precisions() -> list[Precision]:
        """Return those that this machine's processor computes in."""
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return [precision for precision in Precision if precision is not Precision.BFLOAT16 or "BF16" in able]

    @classmethod
    def check(cls, precision: Precision) -> None:
        """Raise PrecisionUnsupported for one that this machine's processor has not."""
        if precision not in cls.precisions():
            raise PrecisionUnsupported(
                f"precision: The processor of this machine has no {precision.value} arithmetic (Intel processors have "
                "it from Sapphire Rapids on, AMD's from Zen 4 on). Use one that has, or train with float32, int8 or "
                "auto."
            )

    def __init__(self, network: Path, precision: Precision, threads: int) -> None:
        """Load an ONNX file. Raises PrecisionUnsupported."""
        self.check(precision)
        core = openvino.Core()
        # OpenVINO would choose bfloat16 by itself where the processor has it, and the score would not be the same.
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            # A thread that may not leave its processor waits for whoever is on it, and all others wait for that thread.
            "ENABLE_CPU_PINNING": False,
        }
        self._network = core.compile_model(core.read_model(str(network)), "CPU", options)
        self._local = threading.local()

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, D] for uint8 images [N, H, W, 3]."""
        return self.run(images, wants_maps=False)[0]

    def maps(self, images: Pixels) -> Features:
        """Return what the features are the mean of, float32 [N, h, w, D], for uint8 images [N, H, W, 3]."""
        maps = self.run(images, wants_maps=True)[1]
        assert maps is not None
        return maps

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, if asked, the maps that they are the mean of, float32 [N, h, w, D]."""
        if not hasattr(self._local, "request"):
            self._local.request = self._network.create_infer_request()
        request: Any = self._local.request
        request.infer([np.ascontiguousarray(images)])
        outputs = ("features", "maps") if wants_maps else ("features",)
        features, *maps = (np.array(request.get_tensor(output).data, dtype=np.float32) for output in outputs)
        return features, maps[0] if maps else None


class FlatEngine:
    """A stand-in that needs no network: the mean colour of each cell of a grid over the image. For tests and trials."""

    name = "flat"

    def __init__(self, cells: int = 4) -> None:
        self._cells = cells
        self.images_seen = 0

    def features(self, images: Pixels) -> Features:
        """Return float32 [N, cells * cells * 3] for uint8 images [N, H, W, 3] with H and W divisible by `cells`."""
        return self.run(images, wants_maps=False)[0]

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        """Return the features and, if asked, maps [N, 1, 1, cells * cells * 3]: a feature is the mean of one place."""
        self.images_seen += len(images)
        count, height, width, _ = images.shape
        grid = images.reshape(count, self._cells, height // self._cells, self._cells, width // self._cells, 3)
        means: Features = grid.mean(axis=(2, 4), dtype=np.float32).reshape(count, -1)
        return means, means[:, None, None, :] if wants_maps else None
