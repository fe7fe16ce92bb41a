"""Keras to ONNX, checked against Keras. The only room for it, since exporting needs TensorFlow."""

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
from inference.engine import TOLERANCE, OpenVinoEngine
from recipes.recipe import Precision
from training.networks import freed_memory

# Part of a backbone's key: a change in how networks are exported makes new backbones and leaves the old ones in use.
EXPORT_VERSION = 1

_CHECKED_IMAGES = 4


@dataclass(frozen=True)
class ExportedNetwork:
    """An ONNX network and how far its engine is from Keras on some images, absolute and relative to the largest."""

    onnx: bytes
    width: int
    parameters: int
    largest_difference: float
    largest_relative_difference: float

    def facts(self) -> dict[str, Any]:
        """Return all but the network itself."""
        return {name: value for name, value in vars(self).items() if name != "onnx"}


def export(model: Any, threads: int, images: Pixels | None = None) -> ExportedNetwork:
    """Export a network from uint8 images [N, H, W, 3] to `features` and `maps`, and check it.

    Args:
        model: the Keras network.
        threads: threads for the check.
        images: uint8 [n, H, W, 3] to check it on; by default random ones.

    Raises:
        EspalierError: the engine's features differ from Keras' by more than the engine's tolerance.
    """
    with tempfile.TemporaryDirectory() as folder, _collecting():
        path = Path(folder) / "network.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tf2onnx' own use of old NumPy names
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
            f"The exported network differs from Keras: expected at most {TOLERANCE[Precision.FLOAT32]:g} relative. "
            f"Received {relative:g}. This is a bug."
        )
    return ExportedNetwork(onnx, expected.shape[1], int(model.count_params()), difference, relative)


@contextmanager
def _collecting(every: int = 200) -> Iterator[None]:
    """Collect garbage every so many objects: the exporter leaves copies of the weights in cycles, ResNet50 took 8 GB.

    By number and not by time: a busy machine takes no more memory than an idle one (2.9 GB both; by time up to 5).
    """
    gc.freeze()  # what is here already is not looked through each time, which would take longer than the export
    freed_memory.give_back_freed()
    gc.collect()  # nothing is old now: Python looks through the old only when the new comes to a quarter of it
    usual = gc.get_threshold()
    gc.set_threshold(every, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()  # what the exporter left; before all the rest can be looked through again, which takes seconds
        gc.unfreeze()
        freed_memory.give_back_freed()
