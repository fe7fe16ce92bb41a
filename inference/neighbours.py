"""The training images that are nearest to a new one, and a picture of them. Knows no HTTP and no engine."""

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

# Rows of float16 that are made float32 for a product at a time.
_ROWS_AT_ONCE = 8192
_SIDE = 192
_GAP = 4
# What stands for an image that was deleted.
_GONE = 128


@dataclass(frozen=True)
class Neighbour:
    """A training image and how near it is: the cosine of the angle between its features and the new image's."""

    known: TrainingImage
    similarity: float


def nearest(neighbours: NeighbourIndex, features: Features, count: int = COUNT) -> list[list[Neighbour]]:
    """Return, for each image of features float32 [n, D], those nearest to it, the nearest first; fewer if not so many.

    A file that the data set has several times is shown once.
    """
    wanted = neighbours.directions.of(features).T
    similarity = np.concatenate(
        [
            neighbours.kept[start : start + _ROWS_AT_ONCE].astype(np.float32) @ wanted
            for start in range(0, len(neighbours.known), _ROWS_AT_ONCE)
        ]
    )
    return [_first(neighbours, column, count) for column in similarity.T.clip(-1, 1)]


def _first(neighbours: NeighbourIndex, similarity: Features, count: int) -> list[Neighbour]:
    found: dict[Digest, Neighbour] = {}
    for row in np.argsort(-similarity, kind="stable"):
        known = neighbours.known[row]
        found.setdefault(known.image, Neighbour(known, float(similarity[row])))
        if len(found) == count:
            break
    return list(found.values())


def sheet(image: Pixels, found: Sequence[Neighbour], read: Callable[[Digest], Pixels | None]) -> Image.Image:
    """Return an image [H, W, 3] and, after a gap, the images found, side by side; `read` returns None for one gone."""
    tiles = [image, *(read(one.known.image) for one in found)]
    picture = Image.new("RGB", (len(tiles) * (_SIDE + _GAP), _SIDE), (255, 255, 255))
    for place, tile in enumerate(tiles):
        shown = Image.new("RGB", (1, 1), (_GONE,) * 3) if tile is None else Image.fromarray(tile)
        left = place * (_SIDE + _GAP) + (_GAP if place else 0)
        picture.paste(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), (left, 0))
    return picture
