"""The maths of comparisons, against loops that are easy to read and against what chance should do."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import digest_of
from errors import EspalierError
from recipes.headline import HEADLINES
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Float64
from training.report.comparison_report import Line, forest, report
from training.statistics import evaluation
from training.statistics.comparison import (
    TEST,
    Comparison,
    Difference,
    Entry,
    OutOfFoldLogits,
    best_of,
    compare,
    holm,
    paired_difference,
)

ACCURACY = HEADLINES[Task.BINARY]


def share(sums: Float64) -> Float64:
    return np.asarray(sums[..., 1] / sums[..., 0])


def of(right: np.ndarray) -> Float64:
    """Return the numbers of images that were answered rightly or not."""
    return np.stack([np.ones(len(right)), right.astype(float)], axis=1)


def row(number: int, label: str = "a", group: str | None = None, target: float | None = None) -> Row:
    labels = () if target is not None else (label,)
    return Row(f"{number:04}.png", digest_of(str(number).encode()), labels, target, group, Split.TRAIN)


def loop_paired(one: Float64, best: Float64, groups: Indices, swaps: int) -> tuple[float, float]:
    """Return the difference, and the p-value by exchanging answers group by group, as one would by hand."""
    random = np.random.default_rng(1)
    observed = one[:, 1].mean() - best[:, 1].mean()
    as_large = 0
    for _ in range(swaps):
        a, b = one.copy(), best.copy()
        for group in np.unique(groups):
            if random.random() < 0.5:
                mine = groups == group
                a[mine], b[mine] = best[mine], one[mine]
        as_large += abs(a[:, 1].mean() - b[:, 1].mean()) >= abs(observed) - 1e-12
    return float(observed), (1 + as_large) / (1 + swaps)


@pytest.mark.parametrize("of_a_group", [1, 4])
def test_the_test_agrees_with_exchanging_answers_by_hand(of_a_group: int) -> None:
    random = np.random.default_rng(of_a_group)
    groups = np.repeat(np.arange(80 // of_a_group), of_a_group)
    best = of(random.random(80) < 0.85)
    one = of((best[:, 1] == 1) & (random.random(80) < 0.93))
    found = paired_difference(one, best, groups, share)
    observed, p_value = loop_paired(one, best, groups, 2000)
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx(p_value, abs=0.04)


def test_the_p_value_of_few_images_is_that_of_every_exchange() -> None:
    one, best = of(np.array([0, 0, 0, 0, 1, 1, 0])), of(np.array([1, 1, 1, 1, 1, 1, 1]))
    apart = one[:, 1] - best[:, 1]
    every = [abs((apart * signs).sum()) for signs in itertools.product((-1, 1), repeat=7)]
    exact = np.mean([value >= abs(apart.sum()) for value in every])
    assert paired_difference(one, best, np.arange(7), share).p_value == pytest.approx(exact, abs=0.01)


def test_the_interval_is_of_the_difference_under_the_same_draw() -> None:
    random = np.random.default_rng(2)
    best = random.random(400) < 0.7
    one = best.copy()
    one[np.flatnonzero(best)[:20]] = False
    found = paired_difference(of(one), of(best), np.arange(400), share)
    # As if each image's difference were drawn alone: -1 for 20 of 400, else 0.
    error = np.std(one.astype(float) - best) / np.sqrt(400)
    assert found.difference == pytest.approx(-0.05)
    assert found.ci95 == pytest.approx((-0.05 - 1.96 * error, -0.05 + 1.96 * error), abs=0.004)
    apart = np.sqrt(0.7 * 0.3 / 400 * 2)
    assert found.ci95[1] - found.ci95[0] < 2 * apart, "pairing is narrower than two scores by themselves"


def test_whole_groups_are_drawn_and_exchanged() -> None:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 10)
    best, one = (np.repeat(random.random(30) < chance, 10) for chance in (0.8, 0.6))
    together = paired_difference(of(one), of(best), groups, share)
    once_each = paired_difference(of(one[::10]), of(best[::10]), np.arange(30), share)
    assert (together.ci95, together.p_value) == (pytest.approx(once_each.ci95), once_each.p_value)
    alone = paired_difference(of(one), of(best), np.arange(300), share)
    assert alone.ci95[1] - alone.ci95[0] < 0.5 * (together.ci95[1] - together.ci95[0])


def test_equal_answers_differ_by_nothing() -> None:
    answers = of(np.array([1, 0, 1, 1]))
    assert paired_difference(answers, answers, np.arange(4), share) == Difference(0.0, (0.0, 0.0), 1.0)


@pytest.mark.slow
def test_chance_alone_is_rarely_called_a_difference_and_the_interval_holds_the_true_one() -> None:
    random = np.random.default_rng(4)
    p_values, held = [], []
    for _ in range(400):
        hard = random.random(150)  # both recipes find the same images hard
        first, second, worse = (random.random(150) < chance - 0.4 * hard for chance in (1.0, 1.0, 0.9))
        p_values.append(paired_difference(of(first), of(second), np.arange(150), share, swaps=500).p_value)
        low, high = paired_difference(of(worse), of(second), np.arange(150), share, swaps=1).ci95
        held.append(low <= -0.1 + 1e-9 <= high)
    shares = [np.mean(np.array(p_values) <= level) for level in (0.05, 0.25, 0.5)]
    assert 0.02 <= shares[0] <= 0.08 and 0.18 <= shares[1] <= 0.30 and 0.40 <= shares[2] <= 0.56, shares
    assert 0.92 <= np.mean(held) <= 0.98


def test_p_values_are_adjusted_as_holm_did() -> None:
    # Holm's procedure by its definition: the smallest times all, the next times one fewer, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04] and holm([]) == []


def entry(number: int, score: float, folds: np.ndarray, logits: np.ndarray) -> Entry:
    answered = OutOfFoldLogits(folds, logits)
    return Entry(f"recipe {number}", score, lambda: answered)


def entries(truth: np.ndarray, *flipped: int, repeats: int = 1) -> list[Entry]:
    """Return binary recipes, each of which answers so many images wrongly, the last ones first."""
    folds = np.tile(np.arange(len(truth), dtype=np.int16) % 2, (repeats, 1))
    found = []
    for number, count in enumerate(flipped):
        logits = np.where(truth == 1, 2.0, -2.0).astype(np.float32)
        logits[len(truth) - count :] *= -1
        logits_of = np.tile(logits[:, None], (repeats, 1, 1))
        found.append(entry(number, 1 - count / len(truth), folds.copy(), logits_of))
    return found


def compared(truth: np.ndarray, found: list[Entry], alive: list[int] | None = None) -> Comparison:
    rows = [row(number, "ab"[label]) for number, label in enumerate(truth)]
    told = alive if alive is not None else []
    return compare(Task.BINARY, ["a", "b"], rows, found, lambda: told.append(1))


TRUTH = np.arange(120) % 2


def test_the_best_is_told_from_every_other() -> None:
    told: list[int] = []
    found = compared(TRUTH, entries(TRUTH, 30, 2, 40), told)
    assert found.best == 1 and found.differences[1] is None and len(told) == 3
    first, last = found.differences[0], found.differences[2]
    assert first is not None and last is not None
    assert (first.difference, last.difference) == (pytest.approx(-28 / 120), pytest.approx(-38 / 120))
    assert first.p_value == last.p_value == pytest.approx(2 / 10_001), "the smallest there is, for two of them"
    assert found.verdict == (
        "recipe 1 has the best accuracy, 98.3%, significantly better than all other recipes. "
        "The second best is recipe 0 with 75.0% (every p ≤ 0.0002, adjusted by Holm's method)."
    )


def test_recipes_that_cannot_be_told_apart_are_named() -> None:
    found = compared(TRUTH, entries(TRUTH, 2, 3, 40, 4))
    assert found.verdict == (
        "recipe 0 has the best accuracy, 98.3%, but cannot be told apart from recipe 1 and recipe 3 on these images."
    )


def test_a_recipe_alone_is_compared_with_nothing() -> None:
    found = compared(TRUTH, entries(TRUTH, 2))
    assert found.differences == [None] and "nothing to compare it with" in found.verdict


def test_repeats_add_no_images() -> None:
    assert compared(TRUTH, entries(TRUTH, 2, 9)) == compared(TRUTH, entries(TRUTH, 2, 9, repeats=3))


def test_images_in_no_fold_do_not_count() -> None:
    found = entries(TRUTH, 2, 9)
    for one in found:
        one.load().folds[:, 110:] = -1
        one.load().logits[:, 110:] = np.nan
    difference = compared(TRUTH, found).differences[1]
    assert difference is not None and difference.difference == 0.0, "they only differed there"


def test_recipes_on_other_folds_are_not_compared() -> None:
    found = entries(TRUTH, 2, 9)
    found[1].load().folds[0, 0] = 1
    with pytest.raises(EspalierError, match="same folds"):
        compared(TRUTH, found)


def test_a_smaller_error_of_numbers_is_better() -> None:
    random = np.random.default_rng(5)
    truth = random.normal(size=60)
    folds = np.zeros((1, 60), np.int16)
    errors = [random.normal(size=60) * size for size in (2.0, 0.1, 0.5)]
    found = []
    for number, error in enumerate(errors):
        logits = (truth + error).astype(np.float32)[None, :, None]
        scores = evaluation.scores_of_sums(
            Task.REGRESSION, evaluation.image_statistics(Task.REGRESSION, truth[:, None], logits[0]).sum(axis=0)
        )
        found.append(entry(number, float(scores["rmse"]), folds, logits))
    rows = [row(number, target=float(value)) for number, value in enumerate(truth)]
    table = compare(Task.REGRESSION, [], rows, found, lambda: None)
    assert table.best == best_of([one.score for one in found], HEADLINES[Task.REGRESSION]) == 1
    assert not table.verdict.startswith("Not even")
    alone = compare(Task.REGRESSION, [], rows, found[:1], lambda: None)
    assert alone.verdict.startswith(
        "Not even the best recipe is better than a constant answer that ignores the image. "
    )
    worst = table.differences[0]
    assert worst is not None and worst.difference == pytest.approx(found[0].score - found[1].score, rel=1e-6)
    assert worst.ci95[0] > 0 and worst.p_value < 0.01


LINES = [
    Line("head.l2=$0.1", 2, 0.95, (0.9, 0.97), None, 12.5, 3.25, 1_500_000, 20_000),
    Line("head.l2=1" + ", epochs=9" * 9, 1, 0.9, (0.85, 0.94), Difference(-0.05, (-0.08, -0.02), 0.0031), 9, 2, 10, 5),
]


def test_the_report_has_a_line_for_each_recipe() -> None:
    text = report("flowers", ACCURACY, LINES, "The first.", "Wilson")
    lines = text.splitlines()
    assert "The first." in lines and f"- {TEST}" in lines
    assert r"| head.l2=\$0.1 | 2 | 95.0% | 90.0% to 97.0% |  |  |  | 12.5 s | 3.25 ms | 1.5 MB | 0.02 MB |" in lines
    assert "| -5.0% | -8.0% to -2.0% | 0.0031 |" in text
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_the_picture_grows_with_its_lines() -> None:
    small, large = (Image.open(io.BytesIO(forest(ACCURACY, LINES[:count]))) for count in (1, 2))
    assert small.format == "PNG" and small.width == large.width and small.height < large.height
