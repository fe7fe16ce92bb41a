"""The targets of a data set version as arrays: what a network has to predict for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from artifacts.manifest import Row
from recipes.recipe import Task
from training.data.split import Indices

Float64 = npt.NDArray[np.float64]
Truth = npt.NDArray[Any]
"""The true answer for each image: its class, int [N]; 1 for each of its labels, float32 [N, labels]; or its number,
float64 [N, 1]."""


@dataclass(frozen=True)
class Targets:
    """The true answers for every image, and what a split into folds must keep in balance.

    Attributes:
        truth: see `Truth`.
        strata: int [N], the class, the rarest label, or the tenth of the numbers; folds have the same share of each.
        needed: sparse int8 [N, labels], 1 for each label of a row; every fold must have images of each label to train
            on. A regression has no labels.
    """

    truth: Truth
    strata: Indices
    needed: csr_array


def make_targets(task: Task, labels: Sequence[str], rows: Sequence[Row]) -> Targets:
    """Return the targets of rows, whose labels must all be among `labels`. A regression ignores `labels`."""
    if task is Task.REGRESSION:
        numbers = np.array([row.target for row in rows], dtype=np.float64)
        return Targets(numbers[:, None], _tenths(numbers), csr_array((len(rows), 0), dtype=np.int8))
    number = {label: place for place, label in enumerate(labels)}
    places = np.array([number[label] for row in rows for label in row.labels], dtype=np.intp)
    ends = np.cumsum([0, *(len(row.labels) for row in rows)])
    has = csr_array((np.ones(len(places), dtype=np.int8), places, ends), shape=(len(rows), len(labels)))
    if task is Task.MULTILABEL:
        dense = has.toarray()
        return Targets(dense.astype(np.float32), _rarest(dense > 0), has)
    return Targets(places, places, has)


def _rarest(has: npt.NDArray[np.bool_]) -> Indices:
    """Return the rarest label of each row, or the number of labels for a row without any."""
    by_rarity = np.argsort(has.sum(axis=0), kind="stable")
    first = has[:, by_rarity].argmax(axis=1)
    return np.asarray(np.where(has.any(axis=1), by_rarity[first], has.shape[1]), dtype=np.intp)


def _tenths(numbers: Float64) -> Indices:
    """Return the tenth of the sorted rows in which the number of each row lies; equal numbers are in the same tenth."""
    bounds: Float64 = np.quantile(numbers, np.linspace(0.1, 0.9, 9))
    return np.asarray(np.searchsorted(bounds, numbers, side="right"), dtype=np.intp)
