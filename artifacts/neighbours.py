"""The neighbour index of a model: the features of its training images, to find those most similar to a new image.

Features are first standardised, because some channels are a thousand times larger than others. Then they are scaled to
unit length, so that the dot product of two rows is a cosine similarity. The index is stored in a file that contains
arrays and text, never code.
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
"""Maximum bytes of the features in an index. Of a larger training set, the index contains a sample."""

# Approximate bytes of memory for the digest, path and labels of an image.
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
    """Normalises features: computes (features - mean) * scale, then scales each row to unit length.

    mean and scale are float32 [D].
    """

    mean: Features
    scale: Features

    def normalise(self, features: Features) -> Features:
        """Normalise features, float32 [N, D], and return them as float32 [N, D]. A row equal to the mean becomes 0."""
        standardised: Features = (features - self.mean) * self.scale
        length = np.linalg.norm(standardised, axis=1, keepdims=True)
        found: Features = np.divide(standardised, length, out=np.zeros_like(standardised), where=length > 0)
        return found


@dataclass(frozen=True)
class NeighbourIndex:
    """Training images that can be found as neighbours of a new image.

    Attributes:
        images: the training images, N in number.
        vectors: the normalised features of these images, float16 [N, D].
        normaliser: normalises the features of a new image in the same way.
    """

    images: Sequence[TrainingImage]
    vectors: npt.NDArray[np.float16]
    normaliser: FeatureNormaliser

    @property
    def size_bytes(self) -> int:
        """Approximate bytes of memory that the index takes."""
        return self.vectors.nbytes + _IMAGE_BYTES * len(self.images)

    def dump(self) -> bytes:
        """Return the bytes of a file with this index, which `load` can read."""
        values = {"known": [[image.image, image.path, image.labels, image.target] for image in self.images]}
        arrays: tensors.Tensors = {"kept": self.vectors, "mean": self.normaliser.mean, "scale": self.normaliser.scale}
        return tensors.dump(values, arrays)


def load(data: bytes) -> NeighbourIndex:
    """Return the index from the bytes of its file. Raises Corrupt."""
    try:
        values, arrays = tensors.load(data)
        shown = [
            TrainingImage(Digest(image), path, tuple(labels), target) for image, path, labels, target in values["known"]
        ]
        return NeighbourIndex(shown, arrays["kept"], FeatureNormaliser(arrays["mean"], arrays["scale"]))
    except tensors.UNREADABLE as error:
        raise Corrupt(f"The file of neighbours cannot be read: {error}. Restore it from a backup.") from error


def build_index(rows: Sequence[Row], features: Features, normaliser: FeatureNormaliser) -> NeighbourIndex:
    """Return an index of training images. If their features exceed `MOST_BYTES`, it has an evenly spaced sample.

    Args:
        rows: rows of the manifest for the training images.
        features: features of these images, float32 [len(rows), D].
        normaliser: a normaliser that was fitted to these features.
    """
    most = max(1, MOST_BYTES // (2 * features.shape[1]))
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.intp))
    shown = [TrainingImage(rows[row].sha256, rows[row].path, rows[row].labels, rows[row].target) for row in kept]
    return NeighbourIndex(shown, normaliser.normalise(features[kept]).astype(np.float16), normaliser)
