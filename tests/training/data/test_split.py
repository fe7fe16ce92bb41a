from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from errors import RecipeInvalid
from training.data.split import Fold, Indices, make_folds, nested_subsets

NONE = np.array([], dtype=np.intp)


def fold(
    strata: Indices,
    groups: Indices,
    *,
    k: int = 3,
    repeats: int = 1,
    fraction: float = 0.2,
    seed: int = 0,
    validation: Indices = NONE,
) -> list[Fold]:
    rows = np.setdiff1d(np.arange(len(strata)), validation)
    needed = strata[:, None] == np.unique(strata)
    return make_folds(
        rows, strata, needed, groups, validation, k=k, repeats=repeats, validation_fraction=fraction, seed=seed
    )


@st.composite
def grouped_rows(draw: st.DrawFn) -> tuple[Indices, Indices]:
    """Draw classes and groups; each class has at least four groups, a group may span classes."""
    classes = draw(st.integers(2, 4))
    strata, groups = [], []
    for stratum in range(classes):
        for group in range(draw(st.integers(4, 12))):
            size = draw(st.integers(1, 4))
            strata += [stratum] * size
            groups += [group if draw(st.booleans()) else 100 * stratum + group] * size
    return np.array(strata), np.array(groups)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(grouped_rows(), st.integers(2, 4), st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_folds_cover_every_row_once_and_no_group_crosses(
    drawn: tuple[Indices, Indices], k: int, seed: int, repeats: int
) -> None:
    strata, groups = drawn
    try:
        folds = fold(strata, groups, k=k, seed=seed, repeats=repeats)
    except RecipeInvalid:
        reject()  # these groups cannot be cut
    assert [one.number for one in folds] == list(range(k * repeats))
    for repeat in range(repeats):
        tested = np.concatenate([one.test for one in folds if one.repeat == repeat])
        assert sorted(tested.tolist()) == list(range(len(strata)))
    for one in folds:
        parts = [set(groups[part].tolist()) for part in (one.train, one.validation, one.test)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert len(one.train) + len(one.validation) + len(one.test) == len(strata)
        assert set(strata[one.train]) == set(strata), "every class must be trained on"


def test_folds_keep_the_share_of_each_class() -> None:
    strata = np.repeat([0, 1], [80, 20])
    folds = fold(strata, np.arange(100), k=5)
    assert [np.bincount(strata[one.test]).tolist() for one in folds] == [[16, 4]] * 5
    assert [np.bincount(strata[one.validation]).tolist() for one in folds] == [[13, 3]] * 5


def test_folds_of_groups_keep_the_share_of_each_class_nearly() -> None:
    strata = np.tile(np.repeat([0, 1], [3, 1]), 50)
    groups = np.repeat(np.arange(50), 4)
    folds = fold(strata, groups, k=5)
    assert [np.bincount(strata[one.test]).tolist() for one in folds] == [[30, 10]] * 5


def test_one_large_group_is_not_watched_where_a_small_one_will_do() -> None:
    groups = np.concatenate([np.full(1600, 0), *(np.full(50, 1 + number) for number in range(8))])
    strata = np.arange(2000) % 2
    for seed in range(20):
        for one in fold(strata, groups, k=3, fraction=0.15, seed=seed):
            assert len(one.validation) <= 1.5 * 0.15 * (len(one.train) + len(one.validation)) + 50


def test_where_every_group_is_large_the_smallest_is_watched() -> None:
    groups = np.repeat([0, 1, 2, 3], [500, 100, 400, 500])
    for one in fold(np.arange(1500) % 2, groups, k=2, fraction=0.1):
        rest = np.setdiff1d(np.arange(1500), one.test)
        assert len(one.validation) == np.bincount(groups[rest])[np.unique(groups[rest])].min()


@pytest.mark.slow
def test_a_hundred_thousand_groups_of_a_thousand_classes_are_folded_evenly() -> None:
    strata = np.arange(100_000) % 1000
    groups = np.arange(100_000)
    groups[:2000] = groups[:2000] // 2 * 2  # two classes each
    for one in fold(strata, groups, k=5):
        counts = np.bincount(strata[one.test], minlength=1000)
        assert counts.min() >= 18 and counts.max() <= 22


def test_nothing_is_set_aside_where_nothing_watches() -> None:
    for one in fold(np.repeat([0, 1], 20), np.arange(40), fraction=0.0):
        assert len(one.validation) == 0 and len(one.train) + len(one.test) == 40


def test_the_same_seed_gives_the_same_folds_and_another_seed_others() -> None:
    strata, groups = np.repeat([0, 1, 2], 30), np.arange(90)
    one, same, other = (fold(strata, groups, seed=seed) for seed in (7, 7, 8))
    assert all(
        np.array_equal(a.test, b.test) and np.array_equal(a.train, b.train) for a, b in zip(one, same, strict=True)
    )
    assert not all(np.array_equal(a.test, b.test) for a, b in zip(one, other, strict=True))


def test_repeats_use_other_splits() -> None:
    folds = fold(np.repeat([0, 1], 20), np.arange(40), repeats=2)
    assert not np.array_equal(folds[0].test, folds[3].test)


def test_given_validation_rows_are_watched_in_every_fold_and_never_tested() -> None:
    validation = np.array([0, 1, 20, 21])
    folds = fold(np.repeat([0, 1], 20), np.arange(40), validation=validation)
    assert all(np.array_equal(one.validation, validation) for one in folds)
    assert not set(validation) & {row for one in folds for row in one.test}


def test_a_class_of_two_images_is_still_trained_on() -> None:
    strata = np.repeat([0, 1], [20, 2])
    for one in fold(strata, np.arange(22), k=2):
        assert 1 in strata[one.train]
        assert 1 not in strata[one.validation]


def test_groups_that_cannot_be_cut_are_refused_with_the_field() -> None:
    strata = np.array([0, 0, 0, 0, 1, 1])
    groups = np.array([0, 1, 2, 3, 4, 4])  # all of class 1 belongs together
    with pytest.raises(RecipeInvalid, match="cannot be split into 2 folds") as refused:
        fold(strata, groups, k=2)
    assert refused.value.field == "folds.k"


def test_every_label_stays_among_the_training_rows_of_every_fold() -> None:
    random = np.random.default_rng(5)
    needed = random.random((60, 4)) < [0.6, 0.3, 0.12, 0.1]
    strata = np.where(needed.any(axis=1), 3 - needed[:, ::-1].argmax(axis=1), 4)
    folds = make_folds(
        np.arange(60), strata, needed, np.arange(60), NONE, k=4, repeats=2, validation_fraction=0.2, seed=1
    )
    for one in folds:
        assert needed[one.train].any(axis=0).all()
        assert len(one.validation) >= 5


def test_numbers_need_no_class_to_be_trained_on() -> None:
    nothing = np.zeros((6, 0), dtype=bool)
    everything = np.arange(6)
    folds = make_folds(
        everything, everything, nothing, everything, NONE, k=2, repeats=1, validation_fraction=0.2, seed=0
    )
    assert [len(one.test) for one in folds] == [3, 3]
    assert all(len(one.train) and len(one.validation) for one in folds)


@pytest.mark.parametrize(("images", "strata"), [(10, 8), (20, 10), (30, 10), (30, 25), (100, 10)])
def test_few_images_are_mostly_trained_on_whatever_kinds_there_are(images: int, strata: int) -> None:
    everything, kinds = np.arange(images), np.arange(images) % strata
    nothing = np.zeros((images, 0), dtype=bool)
    folds = make_folds(everything, kinds, nothing, everything, NONE, k=5, repeats=1, validation_fraction=0.15, seed=0)
    for one in folds:
        assert len(one.validation) and len(one.train) >= 3 * len(one.validation)


def test_both_of_two_classes_are_watched_though_groups_are_few() -> None:
    groups = np.repeat(np.arange(10), 100)
    strata = groups % 2
    for one in fold(strata, groups, k=5):
        assert set(strata[one.validation].tolist()) == {0, 1}


@pytest.mark.parametrize("seed", range(3))
def test_many_rare_labels_are_cut_where_they_can_be(seed: int) -> None:
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 400)
    needed = random.random((500, 399)) < 4 * shares / shares.sum()
    needed = needed[:, needed.sum(axis=0) >= 2]
    by_rarity = np.argsort(needed.sum(axis=0), kind="stable")
    strata = np.where(needed.any(axis=1), by_rarity[needed[:, by_rarity].argmax(axis=1)], needed.shape[1])
    folds = make_folds(
        np.arange(500), strata, needed, np.arange(500), NONE, k=2, repeats=1, validation_fraction=0.1, seed=seed
    )
    assert all(needed[one.train].any(axis=0).all() for one in folds)
    assert all(200 < len(one.test) < 300 for one in folds)


# --- parts of what a fold learns from -------------------------------------------------------------------------------

FRACTIONS = (0.1, 0.2, 0.4, 0.7, 1.0)


def nested_parts(strata: Indices, groups: Indices, seed: int = 0) -> list[Indices]:
    needed = (strata[:, None] == np.unique(strata)).astype(np.int8)
    return nested_subsets(np.arange(len(strata)), strata, csr_array(needed), groups, FRACTIONS, seed)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(grouped_rows(), st.integers(0, 2**32 - 1))
def test_parts_hold_all_smaller_ones_with_whole_groups_and_every_class(
    drawn: tuple[Indices, Indices], seed: int
) -> None:
    strata, groups = drawn
    parts = nested_parts(strata, groups, seed)
    assert [part.tolist() for part in parts] == [part.tolist() for part in nested_parts(strata, groups, seed)]
    assert parts[-1].tolist() == list(range(len(strata)))
    for smaller, larger in pairwise(parts):
        assert set(smaller.tolist()) <= set(larger.tolist())
    for part in parts:
        assert not set(groups[part].tolist()) & set(np.delete(groups, part).tolist()), "no group is cut"
        assert set(strata[part].tolist()) == set(strata.tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(20, 300), min_size=2, max_size=5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_parts_have_their_share_of_each_class(sizes: list[int], largest: int, seed: int) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.concatenate([1000 * stratum + np.arange(size) // largest for stratum, size in enumerate(sizes)])
    for fraction, part in zip(FRACTIONS, nested_parts(strata, groups, seed), strict=True):
        for stratum, size in enumerate(sizes):
            assert abs((strata[part] == stratum).sum() - fraction * size) <= largest


def test_every_label_of_an_image_is_in_the_smallest_part() -> None:
    random = np.random.default_rng(0)
    has = random.random((200, 6)) < [0.9, 0.5, 0.2, 0.05, 0.02, 0.02]
    strata = has.argmin(axis=1)
    for seed in range(20):
        smallest, *_ = nested_subsets(
            np.arange(200), strata, csr_array(has.astype(np.int8)), np.arange(200), (0.05,), seed
        )
        assert (has[smallest].any(axis=0) == has.any(axis=0)).all() and len(smallest) < 30


def test_parts_are_chosen_of_the_rows_that_are_given_alone() -> None:
    strata, groups = np.arange(60) % 3, np.arange(60)
    rows = np.arange(7, 60, 2)
    needed = csr_array((strata[:, None] == np.arange(3)).astype(np.int8))
    parts = nested_subsets(rows, strata, needed, groups, FRACTIONS, 1)
    assert parts[-1].tolist() == rows.tolist() and set(parts[0].tolist()) < set(rows.tolist())
    assert parts[1].tolist() != nested_subsets(rows, strata, needed, groups, FRACTIONS, 2)[1].tolist()
