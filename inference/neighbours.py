"""Finds the training images nearest to a new image, and draws them. Knows no HTTP and no engine."""

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
# Grey level that stands for a deleted image.
_GONE = 128


@dataclass(frozen=True)
class Neighbour:
    """A training image and its similarity: the cosine similarity of its features to those of the new image."""

    training_image: TrainingImage
    similarity: float


def nearest(neighbours: NeighbourIndex, features: Features, count: int = COUNT) -> list[list[Neighbour]]:
    """Return the `count` nearest training images for each row of features float32 [n, D], the nearest first.

    A file that is in the data set several times is returned once. There may be fewer than `count`.
    """
    wanted = neighbours.normaliser.normalise(features).T
    similarity = np.concatenate(
        [
            neighbours.vectors[start : start + _ROWS_AT_ONCE].astype(np.float32) @ wanted
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
    """Return a picture of an image uint8 [H, W, 3] beside the neighbours found.

    `read` returns the pixels of a training image, or None if the image was deleted.
    """
    tiles = [image, *(read(one.training_image.image) for one in found)]
    picture = Image.new("RGB", (len(tiles) * (_SIDE + _GAP), _SIDE), (255, 255, 255))
    for place, tile in enumerate(tiles):
        shown = Image.new("RGB", (1, 1), (_GONE,) * 3) if tile is None else Image.fromarray(tile)
        left = place * (_SIDE + _GAP) + (_GAP if place else 0)
        picture.paste(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), (left, 0))
    return picture
