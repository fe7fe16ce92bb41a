"""What the training images of a model look like to its network, as one file: the nearest to a new image are among them.

Features are standardised, since some channels are a thousand times larger than others, and of unit length, so that a
product is the cosine of the angle between two images. Holds arrays and text, never code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from artifacts import tensors
from artifacts.features import Features
from artifacts.manifest import Row
from artifacts.store import Digest
from errors import Corrupt

MOST_BYTES = 256 * 1024 * 1024
"""What the features of one file may take; of more images a sample is kept."""

# A digest, a path and labels, with the objects around them.
_KNOWN_BYTES = 512


@dataclass(frozen=True)
class TrainingImage:
    """A training image: its file, where it lay in the data set, and what it shows."""

    image: Digest
    path: str
    labels: tuple[str, ...]
    target: float | None


@dataclass(frozen=True)
class FeatureNormaliser:
    """How features become directions: standardised, (features - mean) * scale, then of unit length.

    mean and scale are float32 [D].
    """

    mean: Features
    scale: Features

    def of(self, features: Features) -> Features:
        """Return float32 [N, D] for features float32 [N, D]; features that are the mean have no direction: zeros."""
        standardised: Features = (features - self.mean) * self.scale
        length = np.linalg.norm(standardised, axis=1, keepdims=True)
        found: Features = np.divide(standardised, length, out=np.zeros_like(standardised), where=length > 0)
        return found


@dataclass(frozen=True)
class NeighbourIndex:
    """Training images that may be shown, and their directions, float16 [N, D]."""

    known: Sequence[TrainingImage]
    kept: npt.NDArray[np.float16]
    directions: FeatureNormaliser

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return self.kept.nbytes + _KNOWN_BYTES * len(self.known)

    def dump(self) -> bytes:
        """Return it as a file."""
        values = {"known": [[one.image, one.path, one.labels, one.target] for one in self.known]}
        arrays: tensors.Tensors = {"kept": self.kept, "mean": self.directions.mean, "scale": self.directions.scale}
        return tensors.dump(values, arrays)


def load(data: bytes) -> NeighbourIndex:
    """Return what `dump` wrote. Raises Corrupt."""
    try:
        values, arrays = tensors.load(data)
        known = [
            TrainingImage(Digest(image), path, tuple(labels), target) for image, path, labels, target in values["known"]
        ]
        return NeighbourIndex(known, arrays["kept"], FeatureNormaliser(arrays["mean"], arrays["scale"]))
    except tensors.UNREADABLE as error:
        raise Corrupt(f"The images that a model has kept cannot be read: {error}.") from error


def build_index(rows: Sequence[Row], features: Features, directions: FeatureNormaliser) -> NeighbourIndex:
    """Return what is kept of training images: of all, or of a sample evenly over them.

    Args:
        rows: the images.
        features: float32 [len(rows), D].
        directions: made from these features.
    """
    most = max(1, MOST_BYTES // (2 * features.shape[1]))
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.intp))
    known = [TrainingImage(rows[row].sha256, rows[row].path, rows[row].labels, rows[row].target) for row in kept]
    return NeighbourIndex(known, directions.of(features[kept]).astype(np.float16), directions)
