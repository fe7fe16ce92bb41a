"""What the training images of a model look like to its network, as one file: the nearest to a new image are among them.

Features are standardised, since some channels are a thousand times larger than others, and of unit length, so that a
product is the cosine of the angle between two images. Holds arrays and text, never code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from artifacts import tensors
from artifacts.features import Features
from artifacts.manifest import Row
from artifacts.store import Digest
from errors import Corrupt

MOST_BYTES = 256 * 1024 * 1024
"""What the features of one file may take; of more images a sample is kept."""

Directions = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Known:
    """A training image: its file, where it lay in the data set, and what it shows."""

    image: Digest
    path: str
    labels: tuple[str, ...]
    target: float | None


@dataclass(frozen=True)
class Neighbours:
    """Training images that may be shown.

    Attributes:
        known: the images.
        directions: float16 [N, D], their standardised features at unit length.
        mean, scale: float32 [D]; standardised features are (features - mean) * scale.
    """

    known: Sequence[Known]
    directions: Directions
    mean: Features
    scale: Features

    def dump(self) -> bytes:
        """Return it as a file."""
        values = {"known": [[one.image, one.path, one.labels, one.target] for one in self.known]}
        return tensors.dump(values, {"directions": self.directions, "mean": self.mean, "scale": self.scale})


def load(data: bytes) -> Neighbours:
    """Return what `dump` wrote. Raises Corrupt."""
    try:
        values, arrays = tensors.load(data)
        known = [Known(Digest(image), path, tuple(labels), target) for image, path, labels, target in values["known"]]
        return Neighbours(known, arrays["directions"], arrays["mean"], arrays["scale"])
    except tensors.UNREADABLE as error:
        raise Corrupt(f"The images that a model has kept cannot be read: {error}.") from error


def keep(rows: Sequence[Row], features: Features) -> Neighbours:
    """Return what is kept of training images: of all, or of a sample evenly over them.

    Args:
        rows: the images.
        features: float32 [len(rows), D].
    """
    most = max(1, MOST_BYTES // (2 * features.shape[1]))
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.intp))
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = features.std(axis=0, dtype=np.float64)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0).astype(np.float32)
    known = [Known(rows[row].sha256, rows[row].path, rows[row].labels, rows[row].target) for row in kept]
    return Neighbours(known, directions(features[kept], mean, scale).astype(np.float16), mean, scale)


def directions(features: Features, mean: Features, scale: Features) -> Any:
    """Return standardised features at unit length, float32 [N, D], for features float32 [N, D]."""
    standardised = (features - mean) * scale
    length = np.linalg.norm(standardised, axis=1, keepdims=True)
    return np.divide(standardised, length, out=np.zeros_like(standardised), where=length > 0)
