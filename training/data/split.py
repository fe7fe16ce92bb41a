"""Which images a fold trains on, watches and is tested on. Knows labels and groups; sees no pixels.

What belongs together never crosses a fold: images that share a group, and identical files. Early stopping watches a
validation split taken from inside the fold's training images, so that the test images are touched once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array

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
    needed: csr_array,
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
        needed: 1 for each label of every row, sparse or dense [N, labels]; each label must be among the training rows
            of every fold.
        groups: group of every row of the data set, int [N].
        validation: rows to watch in every fold; if empty, a part of each fold's training rows is set aside.
        k: number of folds of one repeat.
        repeats: how often to fold again with other splits.
        validation_fraction: share of the training rows to set aside; 0 where nothing watches them.
        seed: the same seed gives the same folds.

    Raises:
        RecipeInvalid: the groups cannot be cut so that every fold has all labels to train on.
    """
    folds = []
    needed = csr_array(needed)
    for repeat in range(repeats):
        parts = _parts(rows, strata, needed, groups, k, _seed(seed, repeat))
        for number, test in enumerate(parts):
            rest = np.setdiff1d(rows, test)
            watched = validation
            if not len(watched) and validation_fraction:
                watched = set_aside(rest, strata, needed, groups, validation_fraction, _seed(seed, repeat, number))
            train = np.setdiff1d(rest, watched)
            folds.append(Fold(repeat * k + number, repeat, train, watched, test))
    return folds


def nested_subsets(
    rows: Indices, strata: Indices, needed: csr_array, groups: Indices, fractions: Sequence[float], seed: int
) -> list[Indices]:
    """Return about such a fraction of the rows of each stratum, whole groups only; each holds all smaller ones.

    Every stratum and every label of the rows is in each of them, with one group at least.

    Args:
        rows: the row numbers to choose from.
        strata: class of every row of the data set, int [N].
        needed: 1 for each label of every row, sparse or dense [N, labels].
        groups: group of every row of the data set, int [N].
        fractions: from 0 to 1.
        seed: the same seed gives the same rows.
    """
    needed = csr_array(needed)
    random = np.random.default_rng(seed)
    members = _members(rows, strata, groups)
    totals = Counter(strata[rows].tolist())
    groups_of: dict[int, list[int]] = defaultdict(list)
    for group in random.permutation(list(members)).tolist():
        groups_of[min(members[group], key=lambda stratum: (totals[stratum], stratum))].append(group)
    # Groups come one after the other; where the middle of one lies, as a share of all of its stratum, it is taken in.
    comes: dict[int, float] = {}
    for inside in groups_of.values():
        sizes = np.array([members[group].total() for group in inside])
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        comes |= dict(zip(inside, middles.tolist(), strict=True))
    of_rows = groups[rows]
    comes_of_rows = np.array([comes[group] for group in of_rows.tolist()])
    strata_of_rows = np.unique(strata[rows], return_inverse=True)[1]
    for having in (*_by_column(_one_hot(strata_of_rows)), *_by_column(needed[rows])):
        if len(having) and comes_of_rows[having].min() > 0:  # else the first group that has it is in all of them
            comes_of_rows[of_rows == of_rows[having[comes_of_rows[having].argmin()]]] = 0.0
    return [rows[comes_of_rows <= fraction] for fraction in fractions]


def _one_hot(places: Indices) -> csr_array:
    """Return sparse [N, places], 1 where each row has its place."""
    return csr_array((np.ones(len(places), dtype=np.int8), places, np.arange(len(places) + 1)))


def _by_column(matrix: csr_array) -> Iterator[Indices]:
    """Yield the rows that each column has something in."""
    columns = csc_array(matrix)
    for start, end in pairwise(columns.indptr.tolist()):
        yield columns.indices[start:end]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _parts(rows: Indices, strata: Indices, needed: csr_array, groups: Indices, k: int, seed: int) -> list[Indices]:
    """Cut rows into `k` parts with the same share of each stratum, no group in two of them."""
    for attempt in range(_ATTEMPTS):
        parts = _spread(_cut(rows, strata, groups, k, _seed(seed, attempt)), needed, groups)
        if _can_be_trained_on(parts, needed):
            return parts
    raise RecipeInvalid(
        "folds.k",
        f"The groups of this data set cannot be cut into {k} folds that leave images of every class to train on. "
        "Use fewer folds, or add images of the rare classes that belong to other groups.",
    )


# Dealing is greedy and may put every group of a rare class into one part; another order mends that.
_ATTEMPTS = 20


def _cut(rows: Indices, strata: Indices, groups: Indices, k: int, seed: int) -> list[Indices]:
    """Deal whole groups, the largest first, each to the part that has the least of what is in it.

    scikit-learn's grouped splitter takes minutes and gigabytes for a hundred thousand groups; this takes a second.
    """
    members = _members(rows, strata, groups)
    totals = Counter(strata[rows].tolist())
    shuffled = np.random.default_rng(seed).permutation(list(members)).tolist()
    parts = [Counter[int]() for _ in range(k)]
    sizes = [0] * k
    part_of: dict[int, int] = {}
    for group in sorted(shuffled, key=lambda group: -members[group].total()):
        shares = [_share(members[group], part, totals) for part in parts]
        chosen = min(range(k), key=list(zip(shares, sizes, strict=True)).__getitem__)
        parts[chosen].update(members[group])
        sizes[chosen] += members[group].total()
        part_of[group] = chosen
    dealt = np.array([part_of[group] for group in groups[rows].tolist()])
    return [np.sort(rows[dealt == part]) for part in range(k)]


# Moving a group for one label may leave another alone; this many rounds mend what can be mended.
_ROUNDS = 50


def _spread(parts: list[Indices], needed: csr_array, groups: Indices) -> list[Indices]:
    """Return parts in which labels that stood in one part alone stand in two, as far as moving groups can do that.

    With many rare labels to an image, no order of dealing is right for all of them.
    """
    for _ in range(_ROUNDS):
        counts = np.array([needed[part].sum(axis=0) for part in parts])
        is_alone = (counts > 0).sum(axis=0) == 1
        moves = []
        for label in np.flatnonzero(is_alone).tolist():
            home = int(counts[:, label].argmax())
            others = [part for part in range(len(parts)) if part != home]
            target = min(others, key=lambda part: len(parts[part]))
            rows = parts[home]
            having = rows[needed[rows][:, [label]].nonzero()[0]]
            for group in np.unique(groups[having]).tolist():
                goes = rows[groups[rows] == group]
                brings = needed[goes].sum(axis=0)
                stays = (counts[home] > brings) & (brings > 0)
                lost = (brings > 0) & ~stays & (np.delete(counts, [home, target], axis=0) == 0).all(axis=0)
                moves.append((int((stays & is_alone).sum()) - int(lost.sum()), -len(goes), home, target, group))
        if not moves or max(moves)[0] <= 0:
            break
        _, _, home, target, group = max(moves)
        goes = groups[parts[home]] == group
        parts[target] = np.sort(np.concatenate([parts[target], parts[home][goes]]))
        parts[home] = parts[home][~goes]
    return parts


def _share(group: Counter[int], part: Counter[int], totals: Counter[int]) -> float:
    """Return how much a part has already of what a group would bring: its share of each stratum, weighed by images."""
    return sum(count * part[stratum] / totals[stratum] for stratum, count in group.items())


def _members(rows: Indices, strata: Indices, groups: Indices) -> dict[int, Counter[int]]:
    """Return how many rows of each stratum every group has."""
    members: dict[int, Counter[int]] = defaultdict(Counter)
    for stratum, group in zip(strata[rows].tolist(), groups[rows].tolist(), strict=True):
        members[group][stratum] += 1
    return members


def _can_be_trained_on(parts: list[Indices], needed: csr_array) -> bool:
    """Say whether no part is empty and every label is in at least two of them."""
    found = np.sum([needed[part].sum(axis=0) > 0 for part in parts], axis=0)
    return all(len(part) for part in parts) and bool((found > 1).all())


# A group may bring this many times what is wanted of a stratum; one that brings more would leave too little to learn.
_OVERSHOOT = 1.5
# One group of each stratum is worth this share of all groups, though less was asked for; but no more.
_MOST_ASIDE = 0.25


def set_aside(
    rows: Indices, strata: Indices, needed: csr_array, groups: Indices, fraction: float, seed: int
) -> Indices:
    """Return about `fraction` of the rows of each stratum, whole groups only.

    Every label keeps at least one group to train on, so that a label of one group gives none. Where every group is too
    large, the smallest is taken. Where one group of each stratum would be far more than the fraction, any will do.
    """
    if len(np.unique(strata[rows])) > max(fraction, _MOST_ASIDE) * len(np.unique(groups[rows])):
        strata = np.zeros_like(strata)
    random = np.random.default_rng(seed)
    members = _members(rows, strata, groups)
    groups_of: dict[int, list[int]] = defaultdict(list)
    for group, inside in members.items():
        for stratum in inside:
            groups_of[stratum].append(group)
    labels_of: dict[int, set[int]] = {group: set() for group in members}
    for row, label in zip(*needed[rows].nonzero(), strict=True):
        labels_of[int(groups[rows[row]])].add(int(label))
    groups_left = Counter(label for labels in labels_of.values() for label in labels)
    wanted = {stratum: max(1, round(fraction * size)) for stratum, size in Counter(strata[rows].tolist()).items()}
    taken: Counter[int] = Counter()
    aside: set[int] = set()

    def take(group: int) -> None:
        aside.add(group)
        taken.update(members[group])
        groups_left.subtract(labels_of[group])

    def can_be_spared(group: int) -> bool:
        return len(aside) + 1 < len(members) and all(groups_left[label] > 1 for label in labels_of[group])

    for stratum in sorted(wanted):
        free = [group for group in random.permutation(groups_of[stratum]).tolist() if group not in aside]
        for group in free:
            if taken[stratum] >= wanted[stratum]:
                break
            inside = members[group]
            fits = all(taken[other] + inside[other] <= _OVERSHOOT * wanted[other] for other in inside)
            if fits and can_be_spared(group):
                take(group)
        spared = [group for group in free if can_be_spared(group)]
        if not taken[stratum] and spared:
            take(min(spared, key=lambda group: members[group].total()))
    return rows[np.isin(groups[rows], sorted(aside))]
