"""Which images a fold trains on, watches and is tested on. Knows labels and groups; sees no pixels.

What belongs together never crosses a fold: images that share a group, and identical files. Early stopping watches a
validation split taken from inside the fold's training images, so that the test images are touched once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from errors import RecipeInvalid

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold; the three sets share no group. `number` counts from 0 through all repeats."""

    number: int
    repeat: int
    train: Indices
    validation: Indices
    test: Indices


def make_folds(
    rows: Indices,
    strata: Indices,
    groups: Indices,
    validation: Indices,
    *,
    k: int,
    repeats: int,
    validation_fraction: float,
    seed: int,
) -> list[Fold]:
    """Return `k * repeats` folds over `rows`; every row is tested once per repeat.

    Args:
        rows: the row numbers that may be folded.
        strata: class of every row of the data set, int [N]; folds have the same share of each.
        groups: group of every row of the data set, int [N].
        validation: rows to watch in every fold; if empty, a part of each fold's training rows is set aside.
        k: number of folds of one repeat.
        repeats: how often to fold again with other splits.
        validation_fraction: share of the training rows to set aside.
        seed: the same seed gives the same folds.

    Raises:
        RecipeInvalid: the groups cannot be cut so that every fold has all classes to train on.
    """
    folds = []
    for repeat in range(repeats):
        parts = _parts(rows, strata, groups, k, _seed(seed, repeat))
        for number, test in enumerate(parts):
            rest = np.setdiff1d(rows, test)
            watched = validation
            if not len(watched):
                watched = _set_aside(rest, strata, groups, validation_fraction, _seed(seed, repeat, number))
            train = np.setdiff1d(rest, watched)
            folds.append(Fold(repeat * k + number, repeat, train, watched, test))
    return folds


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _parts(rows: Indices, strata: Indices, groups: Indices, k: int, seed: int) -> list[Indices]:
    """Cut rows into `k` parts with the same share of each stratum, no group in two of them."""
    for attempt in range(_ATTEMPTS):
        parts = _cut(rows, strata, groups, k, _seed(seed, attempt))
        if _can_be_trained_on(parts, strata):
            return parts
    raise RecipeInvalid(
        "folds.k",
        f"The groups of this data set cannot be cut into {k} folds that leave images of every class to train on. "
        "Use fewer folds, or add images of the rare classes that belong to other groups.",
    )


# The grouped splitter is greedy and may put every group of a rare class into one part; another order mends that.
_ATTEMPTS = 20


def _cut(rows: Indices, strata: Indices, groups: Indices, k: int, seed: int) -> list[Indices]:
    mine = groups[rows]
    is_grouped = len(np.unique(mine)) < len(mine)
    splitter = (StratifiedGroupKFold if is_grouped else StratifiedKFold)(k, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # a rare class skips some parts
        cuts = splitter.split(np.zeros(len(rows)), strata[rows], mine if is_grouped else None)
        return [np.sort(rows[part]) for _, part in cuts]


def _can_be_trained_on(parts: list[Indices], strata: Indices) -> bool:
    """Say whether no part is empty and every stratum is in at least two of them."""
    counts = Counter(stratum for part in parts for stratum in np.unique(strata[part]).tolist())
    return all(len(part) for part in parts) and min(counts.values()) > 1


def _set_aside(rows: Indices, strata: Indices, groups: Indices, fraction: float, seed: int) -> Indices:
    """Return about `fraction` of the rows of each stratum, whole groups only.

    Every stratum keeps at least one group to train on, so that a stratum of one group gives none.
    """
    random = np.random.default_rng(seed)
    members: dict[int, Counter[int]] = {}
    for stratum, group in zip(strata[rows].tolist(), groups[rows].tolist(), strict=True):
        members.setdefault(group, Counter())[stratum] += 1
    groups_left = Counter(stratum for strata_of_group in members.values() for stratum in strata_of_group)
    taken: Counter[int] = Counter()
    aside: set[int] = set()
    for stratum, size in sorted(Counter(strata[rows].tolist()).items()):
        for group in random.permutation([group for group in members if stratum in members[group]]).tolist():
            if taken[stratum] >= max(1, round(fraction * size)):
                break
            if group not in aside and all(groups_left[other] > 1 for other in members[group]):
                aside.add(group)
                taken += members[group]
                groups_left -= Counter(dict.fromkeys(members[group], 1))
    return rows[np.isin(groups[rows], sorted(aside))]
