from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from artifacts.features import Features
from errors import TrainingDiverged
from inference import heads
from recipes.recipe import ClassWeights, EarlyStopping, HeadRecipe, OptimizerRecipe, Recipe, Task
from training.data.targets import Truth
from training.fitting import linear_heads as module
from training.fitting.fit_task import FitData
from training.fitting.head_fit import FittedHead, fit_head
from training.fitting.linear_heads import LinearHeadTask, fit_linear_heads, l2_grid
from training.fitting.training_loop import FitHooks, Snapshot

NONE = np.array([], dtype=np.intp)
ROWS, WIDTH = 120, 8
QUIET = FitHooks(lambda number, metrics: None)


def some(task: Task) -> tuple[Features, Truth, int]:
    """Return features, what is to be learned of them, and the number of outputs; classes overlap."""
    random = np.random.default_rng(0)
    features = (random.normal(0, 2, (ROWS, WIDTH)) + np.linspace(0, 5, WIDTH)).astype(np.float32)
    noisy = features + random.normal(0, 2, features.shape)
    match task:
        case Task.MULTICLASS:
            return features, (noisy[:, :3] - np.linspace(0, 5, WIDTH)[:3]).argmax(axis=1), 3
        case Task.BINARY:
            return features, (noisy[:, 0] > 0).astype(np.intp), 1
        case Task.MULTILABEL:
            return features, (noisy[:, :4] > [0, 1, 1, 5]).astype(np.float32), 4
        case Task.REGRESSION:
            return features, 1000.0 + 50 * noisy[:, :1].astype(np.float64), 1


def wanted(count: int, validation: bool = True, **change: Any) -> list[LinearHeadTask]:
    """Return heads of folds of the rows, not all of one size, with an eighth of the others set aside."""
    rows = np.arange(ROWS)
    fold = np.searchsorted([25, 60, 90], rows, side="right")
    found = []
    for number in range(count):
        rest = rows[fold != number]
        aside = rest[::8] if validation else NONE
        one = LinearHeadTask(np.setdiff1d(rest, aside), aside, epochs=40, seed=number, l2=1e-3, hooks=QUIET)
        found.append(replace(one, **change))
    return found


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"optimizer": OptimizerRecipe(learning_rate=0.02), "batch_size": 16, **fields})


def together(recipe: Recipe, task: Task, wanted: Sequence[LinearHeadTask]) -> list[FittedHead]:
    features, targets, outputs = some(task)
    fits = dict(fit_linear_heads(recipe, FitData(task, outputs, features, targets), wanted))
    return [fits[place] for place in range(len(wanted))]


def alone(recipe: Recipe, task: Task, one: LinearHeadTask) -> FittedHead:
    features, targets, outputs = some(task)
    return fit_head(
        recipe.model_copy(update={"head": HeadRecipe(l2=one.l2)}),
        FitData(task, outputs, features, targets),
        one,
    )


def out_of_fold(task: Task, one: LinearHeadTask, fit: FittedHead) -> Any:
    """Return what a head answers for the rows that it did not see: probabilities, or numbers in standard deviations."""
    features, targets, _ = some(task)
    test = np.setdiff1d(np.arange(ROWS), np.concatenate([one.train, one.validation]))
    logits = heads.logits(fit.layers, features[test])
    return logits / targets.std() if task is Task.REGRESSION else heads.probabilities(task, logits)


def assert_alike(task: Task, recipe: Recipe, wanted: Sequence[LinearHeadTask]) -> list[FittedHead]:
    """See that heads that are fitted side by side are those that are fitted each by itself; return them."""
    found = together(recipe, task, wanted)
    for one, ours in zip(wanted, found, strict=True):
        theirs = alone(recipe, task, one)
        assert (ours.trained.best_epoch, ours.trained.stopped) == (theirs.trained.best_epoch, theirs.trained.stopped)
        assert len(ours.trained.history) == len(theirs.trained.history)
        for epoch, same in zip(ours.trained.history, theirs.trained.history, strict=True):
            assert epoch == pytest.approx(same, rel=1e-4, abs=1e-5)
        assert out_of_fold(task, one, ours) == pytest.approx(out_of_fold(task, one, theirs), abs=1e-4)
    return found


@pytest.mark.parametrize(
    "task", [Task.MULTICLASS, *(pytest.param(task, marks=pytest.mark.slow) for task in list(Task)[1:])]
)
def test_out_of_fold_answers_are_those_of_heads_fitted_fold_by_fold(task: Task) -> None:
    assert_alike(task, recipe(), wanted(2))


@pytest.mark.slow
def test_another_optimizer_learns_what_it_learns_fold_by_fold() -> None:
    """`test_update_rules.py` has the steps of each of them."""
    chosen = recipe(optimizer=OptimizerRecipe(name="momentum", learning_rate=0.02), early_stopping=None)
    assert_alike(Task.MULTICLASS, chosen, wanted(1, epochs=15))


@pytest.mark.slow
def test_each_head_stops_at_its_own_epoch_and_keeps_its_best_weights() -> None:
    impatient = recipe(early_stopping=EarlyStopping(patience=2, min_delta=1e-4))
    found = assert_alike(Task.MULTICLASS, impatient, wanted(3, epochs=200, l2=0.0))
    assert {fit.trained.stopped for fit in found} == {"patience"}
    assert len({len(fit.trained.history) for fit in found}) > 1


@pytest.mark.slow
def test_a_head_whose_target_is_reached_stops_alone() -> None:
    aim = {"metric": "val_accuracy", "value": 0.56}
    found = assert_alike(
        Task.MULTICLASS,
        recipe(early_stopping=EarlyStopping(monitor="val_accuracy", patience=10, target=aim)),
        wanted(3),
    )
    assert [fit.trained.stopped for fit in found] == ["target", "target", "patience"]


@pytest.mark.slow
def test_classes_are_weighed_by_the_rows_of_each_head() -> None:
    assert_alike(Task.BINARY, recipe(class_weights=ClassWeights.AUTO), wanted(1))


def test_heads_with_fewer_batches_wait_for_the_others() -> None:
    few, many = wanted(2, validation=False, epochs=8)
    few = replace(few, train=few.train[:17])
    assert_alike(Task.MULTICLASS, recipe(), [few, many])


def test_a_penalty_is_each_heads_own() -> None:
    found = together(recipe(early_stopping=None), Task.MULTICLASS, l2_grid(wanted(2), (0.0, 0.01, 1.0)))
    sizes = [float(np.square(fit.weights[0]).sum()) for fit in found]
    for of_fold in (sizes[:3], sizes[3:]):
        assert of_fold == sorted(of_fold, reverse=True)
    assert sizes[0] != sizes[3]


def test_a_column_that_never_changes_in_one_fold_is_left_out_of_its_head() -> None:
    features, targets, outputs = some(Task.MULTICLASS)
    one, other = wanted(2)
    features[one.train, 3] = 7.0
    fits = dict(fit_linear_heads(recipe(), FitData(Task.MULTICLASS, outputs, features, targets), [one, other]))
    assert not fits[0].layers[0].kernel[3].any() and fits[1].layers[0].kernel[3].any()


def test_a_head_sees_nothing_of_rows_that_are_not_its_own() -> None:
    features, targets, outputs = some(Task.MULTICLASS)
    (one,) = wanted(1)
    one = replace(one, train=one.train[:50], validation=one.train[50:60])
    hidden = np.full_like(features, np.nan)
    hidden[:60] = features[:60]
    rows = np.concatenate([one.train, one.validation])
    hidden[rows] = features[rows]
    ((_, seen),) = fit_linear_heads(recipe(), FitData(Task.MULTICLASS, outputs, features, targets), [one])
    ((_, blind),) = fit_linear_heads(recipe(), FitData(Task.MULTICLASS, outputs, hidden, targets), [one])
    assert np.array_equal(seen.weights[0], blind.weights[0])


def test_a_head_is_the_same_whoever_is_fitted_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, asked = recipe(early_stopping=EarlyStopping(patience=2)), wanted(4)
    found = together(chosen, Task.MULTICLASS, asked)
    for room in ("_STACK_BYTES", "_KEPT_BYTES"):
        monkeypatch.setattr(module, room, 0)
        apart = together(chosen, Task.MULTICLASS, asked)
        for one, other in zip(found, apart, strict=True):
            assert one.trained == other.trained
            assert np.array_equal(one.weights[0], other.weights[0])


def test_the_same_seed_gives_the_same_head_and_another_seed_another() -> None:
    (one,) = wanted(1)
    first, same, other = together(recipe(), Task.MULTICLASS, [one, one, replace(one, seed=5)])
    assert first.trained == same.trained and np.array_equal(first.weights[0], same.weights[0])
    assert first.trained.history != other.trained.history


def test_a_head_that_diverges_says_what_to_lower() -> None:
    calm, wild = wanted(2)
    chosen = recipe(optimizer=OptimizerRecipe(name="sgd", learning_rate=10))
    for task, l2 in ((Task.REGRESSION, 10.0), (Task.MULTICLASS, 1.0)):  # the latter passes float32 before float64
        with pytest.raises(TrainingDiverged, match=r"Lower optimizer\.learning_rate or head\.l2"):
            together(chosen, task, [calm, replace(wild, l2=l2, epochs=200)])


def test_a_head_that_learns_nothing_answers_what_it_began_with() -> None:
    """Zero, that is the mean: random weights would have to be unlearned."""
    (slow,) = together(recipe(optimizer=OptimizerRecipe(learning_rate=1e-30)), Task.REGRESSION, wanted(1, epochs=1))
    features, targets, _ = some(Task.REGRESSION)
    assert heads.logits(slow.layers, features) == pytest.approx(np.full((ROWS, 1), targets[wanted(1)[0].train].mean()))


def test_every_epoch_of_every_head_is_told_and_what_has_ended_is_given_at_once() -> None:
    told: list[tuple[int, int]] = []
    done: list[float] = []
    asked = [
        replace(one, hooks=FitHooks(lambda epoch, _, head=head: told.append((head, epoch)), done.append), epochs=epochs)
        for head, (one, epochs) in enumerate(zip(wanted(2), (4, 2), strict=True))
    ]
    features, targets, outputs = some(Task.BINARY)
    given = []
    data = FitData(Task.BINARY, outputs, features, targets)
    for place, fitted in fit_linear_heads(recipe(early_stopping=None), data, asked):
        given.append((place, len(told), len(fitted.trained.history)))
    assert given == [(1, 4, 2), (0, 6, 4)]
    assert sorted(told) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    assert done[:2] == [0, 0] and sorted(done[2:]) == [1, 1, 2, 2, 3, 4]


def test_heads_that_were_interrupted_end_as_if_they_never_were() -> None:
    kept: dict[int, Snapshot] = {}

    def watched(head: int, one: LinearHeadTask, until: int) -> LinearHeadTask:
        def offer(take: Any) -> None:
            snapshot = take()
            if len(snapshot.history) == until:
                kept[head] = snapshot

        return replace(one, hooks=replace(QUIET, offer=offer))

    chosen, asked = recipe(early_stopping=EarlyStopping(patience=4)), wanted(2)
    unbroken = together(chosen, Task.MULTICLASS, [watched(0, asked[0], 2), watched(1, asked[1], 4)])
    since = [replace(one, hooks=replace(QUIET, since=kept[head])) for head, one in enumerate(asked)]
    for one, other in zip(unbroken, together(chosen, Task.MULTICLASS, since), strict=True):
        assert one.trained == other.trained
        assert np.array_equal(one.weights[0], other.weights[0])


def test_a_snapshot_of_something_else_is_no_beginning() -> None:
    (one,) = wanted(1, epochs=3)
    strange = Snapshot([{"loss": 1.0}], [np.zeros((2, 2), dtype=np.float32)], [], None)
    (fitted,) = together(recipe(), Task.MULTICLASS, [replace(one, hooks=replace(QUIET, since=strange))])
    assert len(fitted.trained.history) == 3


def test_a_head_with_hidden_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="linear"):
        together(recipe(head=HeadRecipe(hidden=(3,))), Task.MULTICLASS, wanted(1))
