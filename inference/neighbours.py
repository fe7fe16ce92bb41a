"""Finds the training images that are most similar to a new image, and draws them. Knows no HTTP and no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from artifacts.features import Features
from artifacts.images import Pixels
from artifacts.neighbours import NeighbourIndex, TrainingImage
from artifacts.store import Digest

COUNT = 3

# Rows of float16 that are converted to float32 at a time.
_ROWS_AT_ONCE = 8192
_SIDE = 192
_GAP = 4
# Grey level of the tile that replaces a deleted image.
_GONE = 128


@dataclass(frozen=True)
class Neighbour:
    """A training image, and the cosine similarity of its features to the features of the new image, from -1 to 1."""

    training_image: TrainingImage
    similarity: float


def nearest(neighbours: NeighbourIndex, features: Features, count: int = COUNT) -> list[list[Neighbour]]:
    """Return the most similar training images for each row of features float32 [n, D], the most similar first.

    There are `count` images for each row, or fewer in a small data set. An image that occurs several times in the data
    set is returned once.
    """
    queries = neighbours.normaliser.normalise(features).T
    similarity = np.concatenate(
        [
            neighbours.vectors[start : start + _ROWS_AT_ONCE].astype(np.float32) @ queries
            for start in range(0, len(neighbours.images), _ROWS_AT_ONCE)
        ]
    )
    return [_first(neighbours, column, count) for column in similarity.T.clip(-1, 1)]


def _first(neighbours: NeighbourIndex, similarity: Features, count: int) -> list[Neighbour]:
    found: dict[Digest, Neighbour] = {}
    for row in np.argsort(-similarity, kind="stable"):
        training_image = neighbours.images[row]
        found.setdefault(training_image.image, Neighbour(training_image, float(similarity[row])))
        if len(found) == count:
            break
    return list(found.values())


def sheet(image: Pixels, found: Sequence[Neighbour], read: Callable[[Digest], Pixels | None]) -> Image.Image:
    """Return a picture that shows an image and, to the right of it, its neighbours.

    Args:
        image: uint8 [H, W, 3].
        found: the neighbours.
        read: returns the pixels of a training image; None if the image was deleted.
    """
    tiles = [image, *(read(one.training_image.image) for one in found)]
    picture = Image.new("RGB", (len(tiles) * (_SIDE + _GAP), _SIDE), (255, 255, 255))
    for number, tile in enumerate(tiles):
        shown = Image.new("RGB", (1, 1), (_GONE,) * 3) if tile is None else Image.fromarray(tile)
        left = number * (_SIDE + _GAP) + (_GAP if number else 0)
        picture.paste(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), (left, 0))
    return picture
