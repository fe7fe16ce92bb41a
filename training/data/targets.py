"""The targets of a data set version as arrays: the class, labels or number that a network must predict per image."""

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
"""The true answer for each image, by task. Multiclass and binary: its class, int [N]. Multilabel: 1 for each of its
labels, float32 [N, labels]. Regression: its number, float64 [N, 1]."""


@dataclass(frozen=True)
class Targets:
    """The true answers for every image, and what a split into folds must balance.

    Attributes:
        truth: the true answers, in the shape that `Truth` describes.
        strata: int [N], by which folds are stratified: the class, the rarest label of the image, or for a regression
            the decile of its number.
        needed: sparse int8 [N, labels], 1 for each label of a row. Every fold must have images of each label to train
            on. A regression has no labels.
    """

    truth: Truth
    strata: Indices
    needed: csr_array


def make_targets(task: Task, labels: Sequence[str], rows: Sequence[Row]) -> Targets:
    """Return the targets of rows. Every label of a row must be among `labels`; a regression ignores `labels`."""
    if task is Task.REGRESSION:
        numbers = np.array([row.target for row in rows], dtype=np.float64)
        return Targets(numbers[:, None], _deciles(numbers), csr_array((len(rows), 0), dtype=np.int8))
    number = {label: index for index, label in enumerate(labels)}
    indices = np.array([number[label] for row in rows for label in row.labels], dtype=np.intp)
    ends = np.cumsum([0, *(len(row.labels) for row in rows)])
    has = csr_array((np.ones(len(indices), dtype=np.int8), indices, ends), shape=(len(rows), len(labels)))
    if task is Task.MULTILABEL:
        dense = has.toarray()
        return Targets(dense.astype(np.float32), _rarest(dense > 0), has)
    return Targets(indices, indices, has)


def _rarest(has: npt.NDArray[np.bool_]) -> Indices:
    """Return the rarest label of each row, or the number of labels for a row without any."""
    by_rarity = np.argsort(has.sum(axis=0), kind="stable")
    first = has[:, by_rarity].argmax(axis=1)
    return np.asarray(np.where(has.any(axis=1), by_rarity[first], has.shape[1]), dtype=np.intp)


def _deciles(numbers: Float64) -> Indices:
    """Return the decile of each row's number, from 0 to 9. Equal numbers are in the same decile."""
    bounds: Float64 = np.quantile(numbers, np.linspace(0.1, 0.9, 9))
    return np.asarray(np.searchsorted(bounds, numbers, side="right"), dtype=np.intp)
