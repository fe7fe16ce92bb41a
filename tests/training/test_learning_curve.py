"""Learning curves of real heads on features that are drawn, and what is foretold from points that are made up."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import records
from PIL import Image

from artifacts import manifest
from artifacts.layout import Split
from artifacts.manifest import Row
from recipes.defaults import ClassCount, fill
from recipes.headline import HEADLINES
from recipes.recipe import Recipe, Task
from training.data.split import make_folds
from training.data.targets import make_targets
from training.fitting.learners import Plan
from training.learning_curve import (
    FRACTIONS,
    DoubledForecast,
    MeasuredRun,
    Point,
    _bootstrap_scores,
    _head_fits,
    forecast_doubled,
    measure_learning_curve,
    summary_sentence,
)
from training.learning_curve import _HeadFit as HeadFit
from training.statistics import evaluation
from training.statistics.comparison import OutOfFoldLogits

ACCURACY, ERROR = HEADLINES[Task.MULTICLASS], HEADLINES[Task.REGRESSION]
RECIPE = {"backbone": "vgg16", "weights": "random", "image_size": 32, "epochs": 12, "folds": {"k": 2}}


def subject(
    images: int, *, classes: int = 3, group: int = 1, apart: float = 1.0, split: Split = Split.TRAIN, **recipe: Any
) -> MeasuredRun:
    """Return a run on features that lie around the corners of their classes; its own answers are made up.

    `group` images lie at one place each and belong together, and a sixth of the images may be of another split.
    """
    random = np.random.default_rng(0)
    truth = np.arange(images) // group % classes
    places = (
        apart * np.eye(classes, 16)[truth]
        + np.repeat(random.normal(0, 0.5, (-(-images // group), 16)), group, 0)[:images]
    )
    names = [f"class {number}" for number in range(classes)]
    rows = [
        Row(
            f"{number:04}.png",
            records.digest(str(number)),
            (names[truth[number]],),
            None,
            f"group {number // group}" if group > 1 else None,
            split if number % 6 == 5 else Split.TRAIN,
        )
        for number in range(images)
    ]
    counts = [ClassCount(name, images // classes, images // classes // group) for name in names]
    filled = fill(Recipe.model_validate({**RECIPE, **recipe}), Task.MULTICLASS, counts)
    targets = make_targets(Task.MULTICLASS, names, rows)
    folded = np.flatnonzero([row.split is Split.TRAIN for row in rows])
    groups = np.array(manifest.group_rows(rows), dtype=np.intp)
    folds = np.full((filled.folds.repeats, images), -1, dtype=np.int16)
    nothing = np.array([], dtype=np.intp)
    for fold in make_folds(
        folded, targets.strata, targets.needed, groups, nothing, k=2, repeats=filled.folds.repeats,
        validation_fraction=0.0, seed=0,
    ):  # fmt: skip
        folds[fold.repeat, fold.test] = fold.number
    logits = np.where(folds[..., None] >= 0, 3.0 * np.eye(classes)[truth], np.nan).astype(np.float32)
    return MeasuredRun(filled, names, rows, places.astype(np.float32), OutOfFoldLogits(folds, logits))


@pytest.mark.slow
def test_points_are_the_scores_of_heads_that_learned_from_a_part_and_of_the_run_itself() -> None:
    run = subject(180, optimizer={"learning_rate": 0.05})
    done: list[float] = []
    curve = measure_learning_curve(run, done.append)
    assert [point.fraction for point in curve.points] == [*FRACTIONS, 1.0]
    assert [point.images for point in curve.points] == [9, 18, 36, 63, 90]
    assert curve.points[-1].score == 1.0, "what the run has answered itself, which is made up here"
    assert 0.4 < curve.points[0].score < curve.points[3].score < 1
    for point in curve.points:
        assert point.ci95[0] <= point.score <= point.ci95[1]
    assert curve.points[0].ci95 == evaluation.wilson(curve.points[0].score, 180)
    assert curve.law is not None and curve.twice is not None and curve.twice.images == 180
    assert done == sorted(done) and done[-1] == pytest.approx(1.0)
    picture = Image.open(io.BytesIO(curve.picture))
    assert picture.format == "PNG" and picture.width > 500


@pytest.mark.slow
def test_the_same_run_has_the_same_curve() -> None:
    first, second = (measure_learning_curve(subject(60, epochs=2), lambda share: None) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_scores_of_images_that_belong_together_have_wider_intervals() -> None:
    run = subject(120, group=5, folds={"k": 2, "repeats": 2}, early_stopping=None, epochs=3)
    least = measure_learning_curve(run, lambda share: None).points[0]
    low, high = evaluation.wilson(least.score, 120)
    assert least.ci95[1] - least.ci95[0] > high - low


def parts_of(run: MeasuredRun) -> list[list[HeadFit]]:
    """Return what the heads of each fold learn from."""
    targets = make_targets(Task.MULTICLASS, run.labels, run.rows)
    groups = np.array(manifest.group_rows(run.rows), dtype=np.intp)
    return [
        _head_fits(run, targets, groups, Plan(1), repeat, number)
        for repeat, folds in enumerate(run.measured.folds)
        for number in np.unique(folds[folds >= 0]).tolist()
    ]


@pytest.mark.parametrize("group", [1, 5])
def test_no_group_crosses_from_what_is_learned_from_to_what_is_tested_or_watched(group: int) -> None:
    run = subject(240, group=group, folds={"k": 2, "repeats": 2})
    folds = parts_of(run)
    assert [parts[0].repeat for parts in folds] == [0, 0, 1, 1]
    for parts in folds:
        assert [part.images for part in parts] == sorted(part.images for part in parts) and parts[-1].images == 120
        for part in parts:
            sets = [set((rows // group).tolist()) for rows in (part.task.train, part.task.validation, part.test)]
            assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
            learned = np.union1d(part.task.train, part.task.validation)
            assert len(learned) == part.images and len(part.task.validation) < len(part.task.train)
            assert set(np.unique(learned // group % 3)) == {0, 1, 2}, "every class"
        assert parts[-1].test.tolist() == parts[0].test.tolist()


def test_images_that_the_data_set_sets_aside_are_watched_or_left_alone() -> None:
    aside = np.arange(5, 120, 6)
    for parts in parts_of(subject(120, split=Split.VALIDATION)):
        assert all(part.task.validation.tolist() == aside.tolist() for part in parts)
        assert [part.images for part in parts][-1] == 50 == len(parts[-1].task.train)
    for parts in parts_of(subject(120, split=Split.TEST)):
        for part in parts:
            used = np.concatenate([part.task.train, part.task.validation, part.test])
            assert not set(used.tolist()) & set(aside.tolist())


def test_without_early_stopping_everything_is_learned_from() -> None:
    for parts in parts_of(subject(60, early_stopping=None)):
        assert all(not len(part.task.validation) and len(part.task.train) == part.images for part in parts)


def test_few_images_of_many_classes_are_not_all_watched() -> None:
    for parts in parts_of(subject(120, classes=15)):
        assert (parts[0].images, len(parts[0].task.validation)) == (15, 0), "one of each class: all are needed"
        assert parts[2].images == 30 and 0 < len(parts[2].task.validation) < 10


def test_a_data_set_too_small_to_be_divided_says_so() -> None:
    curve = measure_learning_curve(subject(12, epochs=1), lambda share: None)
    assert [point.images for point in curve.points] == [3, 6]
    assert (curve.law, curve.twice) == (None, None)
    assert curve.sentence.startswith("There are too few images for a forecast: ")
    assert "2 different numbers of images and a power law needs 4" in curve.sentence


# --- what is foretold ------------------------------------------------------------------------------------------------

IMAGES = [80, 160, 320, 560, 800]


def points(scores: Any) -> list[Point]:
    return [
        Point(images / 800, images, float(score), (float(score) - 0.02, float(score) + 0.02))
        for images, score in zip(IMAGES, scores, strict=True)
    ]


def drawn(scores: Any, noise: float) -> Any:
    """Return scores on test images that are drawn anew, which move all points alike and each a little by itself."""
    random = np.random.default_rng(1)
    return np.asarray(scores) + random.normal(0, noise, (2000, 1)) + random.normal(0, noise / 3, (2000, 5))


def test_twice_the_images_bring_what_the_law_says() -> None:
    scores = 1 - (0.05 + 2 * np.array(IMAGES) ** -0.5)
    law, twice = forecast_doubled(ACCURACY, points(scores), drawn(scores, 0.005), 1000)
    assert law.exponent == pytest.approx(0.5, rel=0.01) and law.floor == pytest.approx(0.05, rel=0.02)
    assert law.misfit < 1e-4
    assert (twice.images, twice.score) == (1600, pytest.approx(0.9, abs=1e-3))
    assert twice.change == pytest.approx(2 * 800**-0.5 - 2 * 1600**-0.5, abs=1e-3)
    assert twice.ci95[0] < 0.9 < twice.ci95[1] and twice.change_ci95[0] < twice.change < twice.change_ci95[1]
    sentence = summary_sentence(ACCURACY, points(scores), twice)
    assert sentence.startswith("Twice the images would bring about +2.1 points of accuracy (95 % interval ")
    assert sentence.endswith(").")


def test_a_flat_curve_is_called_flat() -> None:
    scores = [0.9, 0.901, 0.9, 0.9, 0.9005]
    _, twice = forecast_doubled(ACCURACY, points(scores), drawn(scores, 0.001), 1000)
    assert summary_sentence(ACCURACY, points(scores), twice).startswith(
        "The curve is flat: twice the images would bring about +0.0 points of accuracy (95 % interval 0.0 to 0."
    )


def test_points_that_lie_on_no_law_leave_more_open() -> None:
    law_scores = 1 - (0.05 + 2 * np.array(IMAGES) ** -0.5)
    scores = law_scores + np.array([0.0, -0.03, 0.03, -0.03, 0.02])
    _, smooth = forecast_doubled(ACCURACY, points(law_scores), drawn(law_scores, 0.005), 1000)
    law, rough = forecast_doubled(ACCURACY, points(scores), drawn(scores, 0.005), 1000)
    assert law.misfit > 0.01
    assert rough.score == pytest.approx(scores[-1] + rough.change), "from what was measured, not from the law"
    assert rough.ci95[0] < rough.score < rough.ci95[1]
    assert np.diff(rough.change_ci95) > 2 * np.diff(smooth.change_ci95)


def test_what_may_be_nothing_is_said_to_be_so() -> None:
    twice = DoubledForecast(1600, 0.91, (0.88, 0.93), 0.01, (0.0001, 0.02))
    sentence = summary_sentence(ACCURACY, points([0.9] * 5), twice)
    assert sentence == (
        "Twice the images would bring about +1.0 points of accuracy (95 % interval 0.0 to 2.0), so it may be nothing."
    )


def test_an_error_falls_and_is_said_in_its_own_unit() -> None:
    scores = 1.0 + 20 * np.array(IMAGES) ** -0.5
    law, twice = forecast_doubled(ERROR, points(scores), drawn(scores, 0.01), 1000)
    assert law.floor == pytest.approx(1.0, rel=0.02)
    assert twice.score == pytest.approx(1.5, rel=0.01) and twice.change == pytest.approx(-0.207, rel=0.02)
    assert twice.change_ci95[0] < twice.change < twice.change_ci95[1] < 0
    sentence = summary_sentence(ERROR, points(scores), twice)
    assert sentence.startswith("Twice the images would bring the root mean squared error down by about 0.20")
    low, high = map(float, re.findall(r"interval (\S+) to (\S+)\)", sentence)[0])
    assert 0 < low < 0.207 < high


def test_the_interval_of_what_is_foretold_holds_what_it_promises() -> None:
    """Of laws whose points were measured on 400 drawn test images, nearly all get what twice the images bring."""
    truth = 0.1 + 2 * np.array([*IMAGES, 1600.0]) ** -0.5
    random = np.random.default_rng(0)
    held = 0
    for _ in range(20):
        hard = random.random((400, 1))  # an image is as hard for every head
        right = (hard > truth[:5]) | (random.random((400, 5)) < 0.03)
        scores = right.mean(axis=0)
        counts = random.multinomial(400, np.full(400, 1 / 400), size=400)
        _, twice = forecast_doubled(ACCURACY, points(scores), counts @ right / 400, 400)
        held += twice.change_ci95[0] <= (truth[4] - truth[5]) * 0.97 <= twice.change_ci95[1]
    assert held >= 17


def test_folds_that_differ_leave_more_open_than_images_alone() -> None:
    random = np.random.default_rng(0)
    fold_of, groups = np.arange(400) % 4, np.arange(400)
    right = random.random(400) < 0.8
    alike = np.stack([np.ones(400), right, np.zeros(400)], axis=1)
    apart = alike.copy()
    apart[:, 1] = random.random(400) < np.array([0.95, 0.9, 0.7, 0.65])[fold_of]
    spread = []
    for statistics in (alike, apart):
        found = _bootstrap_scores(Task.MULTICLASS, ACCURACY, [statistics, statistics], groups, fold_of)
        assert found.shape == (2000, 2) and (found[:, 0] == found[:, 1]).all(), "the same draw for every point"
        assert found[:, 0].mean() == pytest.approx(statistics[:, 1].mean(), abs=0.01)
        spread.append(found[:, 0].std())
    assert spread[0] < 0.035 and spread[1] > 0.055
