from __future__ import annotations

import numpy as np

from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import digest_of
from recipes.recipe import Task
from training.data.targets import make_targets


def row(*labels: str, target: float | None = None) -> Row:
    return Row("a.png", digest_of(b""), labels, target, None, Split.TRAIN)


def test_classes_are_numbers_in_the_order_of_the_labels() -> None:
    found = make_targets(Task.MULTICLASS, ["cat", "dog"], [row("dog"), row("cat"), row("dog")])
    assert found.truth.tolist() == found.strata.tolist() == [1, 0, 1]
    assert found.needed.toarray().tolist() == [[0, 1], [1, 0], [0, 1]]


def test_an_image_with_several_labels_counts_with_its_rarest() -> None:
    rows = [row("day", "wet"), row("day"), row("day", "wet"), row(), row("dry", "day")]
    found = make_targets(Task.MULTILABEL, ["day", "dry", "wet"], rows)
    assert found.truth.dtype == np.float32
    assert found.truth.tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert found.strata.tolist() == [2, 0, 2, 3, 1]


def test_classes_may_be_learned_as_labels() -> None:
    found = make_targets(Task.MULTILABEL, ["cat", "dog"], [row("dog"), row("cat")])
    assert found.truth.tolist() == [[0, 1], [1, 0]]


def test_numbers_are_folded_by_their_deciles() -> None:
    numbers = np.random.default_rng(0).permutation(100)
    found = make_targets(Task.REGRESSION, [], [row(target=float(number)) for number in numbers])
    assert found.truth.tolist() == [[float(number)] for number in numbers]
    assert found.strata.tolist() == (numbers // 10).tolist()
    assert found.needed.shape == (100, 0)


def test_equal_numbers_are_in_one_stratum() -> None:
    found = make_targets(Task.REGRESSION, [], [row(target=value) for value in (0.0, 0.0, 0.0, 1.0)])
    assert len(set(found.strata[:3].tolist())) == 1 and found.strata[3] != found.strata[0]
