"""Exports Keras networks to ONNX, and checks the result against Keras. The only module that needs TensorFlow."""

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

# Part of a backbone's key. Increase it if the export changes: new runs then export anew, and models keep their files.
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
        largest_relative_difference: that difference divided by the largest absolute feature.
    """

    onnx: bytes
    width: int
    parameters: int
    largest_difference: float
    largest_relative_difference: float

    def facts(self) -> dict[str, Any]:
        """Return all attributes except the file, as JSON values that are stored with the backbone."""
        return {name: value for name, value in vars(self).items() if name != "onnx"}


def export(model: Any, threads: int, images: Pixels | None = None) -> ExportedNetwork:
    """Export a Keras model to ONNX and check it. Input: uint8 images [N, H, W, 3]; outputs: `features` and `maps`.

    Args:
        model: the Keras network.
        threads: number of threads of the engine that checks the exported network.
        images: the images for the check, uint8 [n, H, W, 3]; by default random ones.

    Raises:
        EspalierError: the features of the exported network differ from those of Keras by more than the tolerance.
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
            f"The features of the exported network differ from those of Keras by {relative:g} of the largest feature. "
            f"At most {TOLERANCE[Precision.FLOAT32]:g} is allowed. This is a bug."
        )
    return ExportedNetwork(onnx, expected.shape[1], int(model.count_params()), difference, relative)


@contextmanager
def _frequent_garbage_collection(every: int = 200) -> Iterator[None]:
    """Make Python collect garbage after every `every` new objects, inside the `with` block.

    The ONNX exporter leaves copies of the weights in reference cycles. Exporting ResNet50 took 8 GB, and takes 2.9 GB
    with this. Collecting at fixed time intervals instead took up to 5 GB on a busy machine.
    """
    gc.freeze()  # makes the collector skip existing objects; scanning them each time takes longer than the export
    freed_memory.give_back_freed()
    gc.collect()  # empties the oldest generation, which Python scans only if a quarter of its objects are new
    usual = gc.get_threshold()
    gc.set_threshold(every, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.collect()  # before `unfreeze`, because a collection after it scans all objects, which takes seconds
        gc.unfreeze()
        freed_memory.give_back_freed()
