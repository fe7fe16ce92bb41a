"""Exports Keras networks to ONNX and checks the result against Keras. The only module that needs TensorFlow itself."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from artifacts.images import Pixels
from errors import EspalierError
from inference import freed_memory
from inference.engine import TOLERANCE, OpenVinoEngine
from recipes.recipe import Precision

# Part of a backbone's key. Count it up when the export changes: new backbones are made, and old ones stay in use.
EXPORT_VERSION = 1

_CHECKED_IMAGES = 4


@dataclass(frozen=True)
class ExportedNetwork:
    """An ONNX network, and how far its features differ from Keras' on some images.

    Attributes:
        onnx: the file.
        width: number of features, D.
        parameters: number of weights.
        largest_difference: the largest absolute difference of a feature.
        largest_relative_difference: the same as a share of the largest feature.
    """

    onnx: bytes
    width: int
    parameters: int
    largest_difference: float
    largest_relative_difference: float

    def facts(self) -> dict[str, Any]:
        """Return everything but the file, as it is stored with the backbone."""
        return {name: value for name, value in vars(self).items() if name != "onnx"}


def export(model: Any, threads: int, images: Pixels | None = None) -> ExportedNetwork:
    """Export a network from uint8 images [N, H, W, 3] to `features` and `maps`, and check it.

    Args:
        model: the Keras network.
        threads: number of threads of the engine that checks it.
        images: uint8 [n, H, W, 3] to check it on; random ones by default.

    Raises:
        EspalierError: the engine's features differ from Keras' by more than the engine's tolerance.
    """
    with tempfile.TemporaryDirectory() as folder, _frequent_garbage_collection():
        path = Path(folder) / "network.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tf2onnx uses deprecated NumPy names
            model.export(str(path), format="onnx", verbose=False)
        engine = OpenVinoEngine(path, Precision.FLOAT32, threads)
        onnx = path.read_bytes()
    if images is None:
        shape = (_CHECKED_IMAGES, *model.input_shape[1:])
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = keras.ops.convert_to_numpy(model(images)["features"])
    difference = float(np.abs(engine.features(images) - expected).max())
    relative = difference / max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    if not relative <= TOLERANCE[Precision.FLOAT32]:
        raise EspalierError(
            "Expected an exported network whose features differ from Keras' by at most "
            f"{TOLERANCE[Precision.FLOAT32]:g}, relative to the largest. Received {relative:g}. This is a bug."
        )
    return ExportedNetwork(onnx, expected.shape[1], int(model.count_params()), difference, relative)


@contextmanager
def _frequent_garbage_collection(every: int = 200) -> Iterator[None]:
    """Collect garbage after every `every` new objects.

    The exporter leaves copies of the weights in reference cycles, so that ResNet50 took 8 GB. With this it takes
    2.9 GB. Collecting at fixed intervals of time instead took up to 5 GB on a busy machine.
    """
    gc.freeze()  # the collector skips existing objects; to scan them each time would take longer than the export
    freed_memory.give_back_freed()
    gc.collect()  # empties the old generation, which Python scans only when the new objects are a quarter of it
    usual = gc.get_threshold()
    gc.set_threshold(every, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()  # before `unfreeze`: after it, a collection scans all objects, which takes seconds
        gc.unfreeze()
        freed_memory.give_back_freed()
