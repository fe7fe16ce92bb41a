"""Splits images into folds. Each fold has training, validation and test images. Reads labels and groups, no pixels.

Images of one group, and identical files, are never in two of these sets. The validation images, which early stopping
monitors, are taken from the fold's training images. So the test images are used for nothing but the score.
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
    """One fold, as row numbers of the data set. `number` counts from 0 through all repeats.

    No group has rows in two of the sets `train`, `validation` and `test`.
    """

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
        rows: the row numbers to divide into folds.
        strata: class of every row of the data set, int [N]; every fold gets about the same share of each class.
        needed: 1 where a row has a label, sparse or dense [N, labels]. The training rows of every fold must contain
            each label.
        groups: group of every row of the data set, int [N].
        validation: validation rows that all folds share. If empty, a part of each fold's training rows is set aside.
        k: number of folds of one repeat.
        repeats: number of repeats; each repeat splits the rows differently.
        validation_fraction: share of the training rows to set aside; 0 if there is no early stopping.
        seed: the same seed gives the same folds.

    Raises:
        RecipeInvalid: the groups could not be split so that every fold has all labels to train on.
    """
    folds = []
    needed = csr_array(needed)
    for repeat in range(repeats):
        parts = _parts(rows, strata, needed, groups, k, _seed(seed, repeat))
        for number, test in enumerate(parts):
            rest = np.setdiff1d(rows, test)
            aside = validation
            if not len(aside) and validation_fraction:
                aside = set_aside(rest, strata, needed, groups, validation_fraction, _seed(seed, repeat, number))
            train = np.setdiff1d(rest, aside)
            folds.append(Fold(repeat * k + number, repeat, train, aside, test))
    return folds


def nested_subsets(
    rows: Indices, strata: Indices, needed: csr_array, groups: Indices, fractions: Sequence[float], seed: int
) -> list[Indices]:
    """Return a subset of the rows for each fraction. A larger subset contains all smaller ones.

    A subset has about the given fraction of the rows of each stratum. It consists of whole groups. It has at least one
    group of every stratum, and of every label.

    Args:
        rows: the row numbers to choose from.
        strata: class of every row of the data set, int [N].
        needed: 1 where a row has a label, sparse or dense [N, labels].
        groups: group of every row of the data set, int [N].
        fractions: the share of the rows in each subset, from 0 to 1.
        seed: the same seed gives the same rows.
    """
    needed = csr_array(needed)
    random = np.random.default_rng(seed)
    members = _members(rows, strata, groups)
    totals = Counter(strata[rows].tolist())
    groups_of: dict[int, list[int]] = defaultdict(list)
    for group in random.permutation(list(members)).tolist():
        groups_of[min(members[group], key=lambda stratum: (totals[stratum], stratum))].append(group)
    # The groups of a stratum are put in a random order. A subset takes the groups whose middle lies below its fraction.
    position: dict[int, float] = {}
    for in_stratum in groups_of.values():
        sizes = np.array([members[group].total() for group in in_stratum])
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        position |= dict(zip(in_stratum, middles.tolist(), strict=True))
    group_of_row = groups[rows]
    position_of_row = np.array([position[group] for group in group_of_row.tolist()])
    stratum_of_row = np.unique(strata[rows], return_inverse=True)[1]
    for having in (*_rows_by_column(_one_hot(stratum_of_row)), *_rows_by_column(needed[rows])):
        # Every subset needs each class and label: move the first group that has it to the very beginning.
        if len(having) and position_of_row[having].min() > 0:
            first = group_of_row[having[position_of_row[having].argmin()]]
            position_of_row[group_of_row == first] = 0.0
    return [rows[position_of_row <= fraction] for fraction in fractions]


def _one_hot(classes: Indices) -> csr_array:
    """Return sparse [N, classes], 1 for the class of each row."""
    return csr_array((np.ones(len(classes), dtype=np.int8), classes, np.arange(len(classes) + 1)))


def _rows_by_column(matrix: csr_array) -> Iterator[Indices]:
    """Yield for each column the rows in which it is not zero."""
    columns = csc_array(matrix)
    for start, end in pairwise(columns.indptr.tolist()):
        yield columns.indices[start:end]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _parts(rows: Indices, strata: Indices, needed: csr_array, groups: Indices, k: int, seed: int) -> list[Indices]:
    """Split rows into `k` parts with the same share of each stratum, and no group in two parts."""
    for attempt in range(_ATTEMPTS):
        parts = _share_rare_labels(_deal(rows, strata, groups, k, _seed(seed, attempt)), needed, groups)
        if _can_train_without_each(parts, needed):
            return parts
    raise RecipeInvalid(
        "folds.k",
        f"The groups of images cannot be split into {k} folds, because some classes occur in too few groups: a fold "
        "would have no images of such a class to train on. Use fewer folds, or add images of the rare classes in new "
        "groups.",
    )


# Dealing is greedy, so that it may put every group of a rare class into one part. Then another random order is tried.
_ATTEMPTS = 20


def _deal(rows: Indices, strata: Indices, groups: Indices, k: int, seed: int) -> list[Indices]:
    """Assign whole groups to parts, the largest group first. Return the rows of each part.

    A group goes to the part that has so far the smallest share of the group's strata. For a hundred thousand groups
    this takes a second; scikit-learn's `StratifiedGroupKFold` takes minutes and gigabytes.
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


# Moving a group for one label may leave another label in a single part, so that several rounds are needed.
_ROUNDS = 50


def _share_rare_labels(parts: list[Indices], needed: csr_array, groups: Indices) -> list[Indices]:
    """Move groups between parts so that, if possible, no label occurs in a single part only.

    This is needed if images have many rare labels: then no order of dealing is right for all labels.
    """
    for _ in range(_ROUNDS):
        counts = np.array([needed[part].sum(axis=0) for part in parts])
        is_alone = (counts > 0).sum(axis=0) == 1
        moves = []
        for label in np.flatnonzero(is_alone).tolist():
            source = int(counts[:, label].argmax())
            others = [part for part in range(len(parts)) if part != source]
            target = min(others, key=lambda part: len(parts[part]))
            rows = parts[source]
            having = rows[needed[rows][:, [label]].nonzero()[0]]
            for group in np.unique(groups[having]).tolist():
                moved = rows[groups[rows] == group]
                labels = needed[moved].sum(axis=0)
                remains = (counts[source] > labels) & (labels > 0)
                lost = (labels > 0) & ~remains & (np.delete(counts, [source, target], axis=0) == 0).all(axis=0)
                gain = int((remains & is_alone).sum()) - int(lost.sum())
                moves.append((gain, -len(moved), source, target, group))
        if not moves or max(moves)[0] <= 0:
            break
        _, _, source, target, group = max(moves)
        is_moved = groups[parts[source]] == group
        parts[target] = np.sort(np.concatenate([parts[target], parts[source][is_moved]]))
        parts[source] = parts[source][~is_moved]
    return parts


def _share(group: Counter[int], part: Counter[int], totals: Counter[int]) -> float:
    """Return a part's share of each stratum of a group, as a sum weighted by the group's images."""
    return sum(count * part[stratum] / totals[stratum] for stratum, count in group.items())


def _members(rows: Indices, strata: Indices, groups: Indices) -> dict[int, Counter[int]]:
    """Return for each group how many rows of each stratum it has."""
    members: dict[int, Counter[int]] = defaultdict(Counter)
    for stratum, group in zip(strata[rows].tolist(), groups[rows].tolist(), strict=True):
        members[group][stratum] += 1
    return members


def _can_train_without_each(parts: list[Indices], needed: csr_array) -> bool:
    """Return whether no part is empty and every label occurs in at least two parts."""
    found = np.sum([needed[part].sum(axis=0) > 0 for part in parts], axis=0)
    return all(len(part) for part in parts) and bool((found > 1).all())


# The rows set aside may exceed their target number by this factor. More would leave too few rows to train on.
_OVERSHOOT = 1.5
# To set aside a group of each stratum, up to this share of all groups may be used, even if `fraction` is less.
_MOST_ASIDE = 0.25


def set_aside(
    rows: Indices, strata: Indices, needed: csr_array, groups: Indices, fraction: float, seed: int
) -> Indices:
    """Return rows to set aside: about `fraction` of the rows of each stratum, in whole groups.

    The only group of a label is never set aside, because every label needs a group to train on. If every group of a
    stratum is too large, its smallest group is set aside. If there are so many strata that one group of each would be
    far more than `fraction`, groups are chosen regardless of their stratum.
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
    target = {stratum: max(1, round(fraction * size)) for stratum, size in Counter(strata[rows].tolist()).items()}
    taken: Counter[int] = Counter()
    aside: set[int] = set()

    def take(group: int) -> None:
        aside.add(group)
        taken.update(members[group])
        groups_left.subtract(labels_of[group])

    def can_be_spared(group: int) -> bool:
        return len(aside) + 1 < len(members) and all(groups_left[label] > 1 for label in labels_of[group])

    for stratum in sorted(target):
        free = [group for group in random.permutation(groups_of[stratum]).tolist() if group not in aside]
        for group in free:
            if taken[stratum] >= target[stratum]:
                break
            inside = members[group]
            fits = all(taken[other] + inside[other] <= _OVERSHOOT * target[other] for other in inside)
            if fits and can_be_spared(group):
                take(group)
        spared = [group for group in free if can_be_spared(group)]
        if not taken[stratum] and spared:
            take(min(spared, key=lambda group: members[group].total()))
    return rows[np.isin(groups[rows], sorted(aside))]
