"""The file of a model's training images with their features, in which the neighbours of a new image are searched.

Features are standardised, since some channels are a thousand times larger than others, and scaled to unit length, so
that a dot product is the cosine similarity of two images. The file contains arrays and text, never code.
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
"""Maximum size of the features in one file; a larger training set is sampled."""

# Memory per image for digest, path and labels.
_IMAGE_BYTES = 512


@dataclass(frozen=True)
class TrainingImage:
    """A training image: the digest of its file, its path in the data set, and its labels or target."""

    image: Digest
    path: str
    labels: tuple[str, ...]
    target: float | None


@dataclass(frozen=True)
class FeatureNormaliser:
    """Normalises features: standardises them by (features - mean) * scale, then scales them to unit length.

    mean and scale are float32 [D].
    """

    mean: Features
    scale: Features

    def normalise(self, features: Features) -> Features:
        """Return float32 [N, D] for features float32 [N, D]; rows equal to the mean become zeros."""
        standardised: Features = (features - self.mean) * self.scale
        length = np.linalg.norm(standardised, axis=1, keepdims=True)
        found: Features = np.divide(standardised, length, out=np.zeros_like(standardised), where=length > 0)
        return found


@dataclass(frozen=True)
class NeighbourIndex:
    """Training images that may be shown as neighbours.

    vectors are their normalised features, float16 [N, D]; normaliser is what made them.
    """

    images: Sequence[TrainingImage]
    vectors: npt.NDArray[np.float16]
    normaliser: FeatureNormaliser

    @property
    def size_bytes(self) -> int:
        """Approximate size in memory."""
        return self.vectors.nbytes + _IMAGE_BYTES * len(self.images)

    def dump(self) -> bytes:
        """Return the index as the bytes of a file, for `load`."""
        values = {"known": [[image.image, image.path, image.labels, image.target] for image in self.images]}
        arrays: tensors.Tensors = {"kept": self.vectors, "mean": self.normaliser.mean, "scale": self.normaliser.scale}
        return tensors.dump(values, arrays)


def load(data: bytes) -> NeighbourIndex:
    """Return what `dump` wrote. Raises Corrupt."""
    try:
        values, arrays = tensors.load(data)
        shown = [
            TrainingImage(Digest(image), path, tuple(labels), target) for image, path, labels, target in values["known"]
        ]
        return NeighbourIndex(shown, arrays["kept"], FeatureNormaliser(arrays["mean"], arrays["scale"]))
    except tensors.UNREADABLE as error:
        raise Corrupt(f"The file of neighbours cannot be read: {error}. Restore it from a backup.") from error


def build_index(rows: Sequence[Row], features: Features, normaliser: FeatureNormaliser) -> NeighbourIndex:
    """Return the index of all training images, or of an evenly spaced sample if they exceed `MOST_BYTES`.

    Args:
        rows: the training images.
        features: float32 [len(rows), D].
        normaliser: computed from these features.
    """
    most = max(1, MOST_BYTES // (2 * features.shape[1]))
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.intp))
    shown = [TrainingImage(rows[row].sha256, rows[row].path, rows[row].labels, rows[row].target) for row in kept]
    return NeighbourIndex(shown, normaliser.normalise(features[kept]).astype(np.float16), normaliser)
