from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from artifacts.features import Features
from errors import TrainingDiverged
from inference import heads
from recipes.recipe import ClassWeights, EarlyStopping, HeadRecipe, OptimizerRecipe, Recipe, Target, Task
from training.data.split import Indices
from training.fitting.compile_options import class_weights
from training.fitting.fit_task import FitData, FitTask
from training.fitting.head_fit import FittedHead, Scaler, fit_head
from training.fitting.training_loop import FitHooks, Rows
from training.networks import freed_memory

NONE = np.array([], dtype=np.intp)
EPOCHS = 12


def clouds(rows: int = 120, classes: int = 3, width: int = 8, scale: float = 1.0) -> tuple[Features, Indices]:
    """Return points around one centre per class."""
    random = np.random.default_rng(0)
    truth = np.arange(rows) % classes
    centres = random.normal(0, 2, (classes, width))
    return ((centres[truth] + random.normal(0, 1, (rows, width))) * scale).astype(np.float32), truth


def fitted(recipe: Recipe, features: Features, truth: Indices, *, seed: int = 0, **change: Any) -> FittedHead:
    is_binary = truth.max() == 1
    task, outputs = (Task.BINARY, 1) if is_binary else (Task.MULTICLASS, int(truth.max()) + 1)
    return fit_head(recipe, FitData(task, outputs, features, truth), replace(quarter(len(truth), seed), **change))


def quarter(count: int, seed: int = 0) -> FitTask:
    """Return a fit that validates on a quarter of the rows."""
    rows = np.arange(count)
    hooks = FitHooks(lambda number, metrics: None)
    return FitTask(rows[rows % 4 != 0], rows[rows % 4 == 0], EPOCHS, seed, hooks)


def quick(**fields: Any) -> Recipe:
    return Recipe(**{"optimizer": OptimizerRecipe(learning_rate=0.05), "batch_size": 16, **fields})


def accuracy(result: FittedHead, features: Features, truth: Indices) -> float:
    answers = heads.logits(result.layers, features).argmax(axis=1)
    return float((answers == truth).mean())


def test_a_linear_head_learns_classes_and_answers_on_raw_features() -> None:
    features, truth = clouds()
    result = fitted(quick(), features, truth)
    assert len(result.layers) == 1
    assert accuracy(result, features, truth) > 0.9


def test_a_binary_head_has_one_output() -> None:
    features, truth = clouds(classes=2)
    result = fitted(quick(), features, truth)
    logits = heads.logits(result.layers, features)
    assert logits.shape == (len(truth), 1)
    assert ((logits[:, 0] > 0) == truth).mean() > 0.9


@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_a_head_with_hidden_layers_and_dropout_answers_as_keras_does(activation: str) -> None:
    features, truth = clouds()
    recipe = quick(head=HeadRecipe(hidden=(16, 8), activation=activation, dropout=0.1))
    result = fitted(recipe, features, truth)
    assert [layer.kernel.shape for layer in result.layers] == [(8, 16), (16, 8), (8, 3)]
    rows = np.arange(len(truth)) % 4 == 0
    # Keras' own count on the validation rows at the epoch that was kept, without dropout
    kept = result.trained.history[result.trained.best_epoch - 1]["val_accuracy"]
    assert accuracy(result, features[rows], truth[rows]) == pytest.approx(kept)


@pytest.mark.parametrize("scale", [1e-10, pytest.param(1e6, marks=pytest.mark.slow)])
def test_tiny_and_huge_features_learn_alike(scale: float) -> None:
    features, truth = clouds(scale=scale)
    assert accuracy(fitted(quick(), features, truth), features, truth) > 0.9


def test_a_feature_that_never_changes_is_left_out() -> None:
    features, truth = clouds()
    features[:, 3] = 7.0
    result = fitted(quick(), features, truth)
    assert not result.layers[0].kernel[3].any()


def test_standardising_is_learned_from_the_training_rows_alone() -> None:
    features, truth = clouds()
    changed = features.copy()
    changed[::4] += 100.0  # the validation rows
    recipe = quick(early_stopping=None, epochs=3)
    one, other = fitted(recipe, features, truth), fitted(recipe, changed, truth)
    assert np.array_equal(one.layers[0].kernel, other.layers[0].kernel)
    assert np.array_equal(one.layers[0].offset, other.layers[0].offset)
    train = np.arange(len(truth))[np.arange(len(truth)) % 4 != 0]
    scaled = Scaler.fit(features, train)(features[train])
    assert scaled.mean(axis=0) == pytest.approx(np.zeros(8), abs=1e-6)
    assert scaled.std(axis=0) == pytest.approx(np.ones(8), abs=1e-5)


def test_features_that_hardly_vary_answer_as_keras_did() -> None:
    features, truth = clouds()
    narrow = (1.0 + 1e-5 * features).astype(np.float32)
    result = fitted(quick(head=HeadRecipe(hidden=(8,))), narrow, truth)
    kept = result.trained.history[result.trained.best_epoch - 1]["val_accuracy"]
    rows = np.arange(len(truth)) % 4 == 0
    assert accuracy(result, narrow[rows], truth[rows]) == pytest.approx(kept)


def test_the_same_seed_gives_the_same_head_and_another_seed_another() -> None:
    features, truth = clouds()
    recipe = quick(head=HeadRecipe(hidden=(8,), dropout=0.3))
    one, same, other = (fitted(recipe, features, truth, seed=seed) for seed in (1, 1, 2))
    assert one.trained.history == same.trained.history
    assert all(np.array_equal(a.kernel, b.kernel) for a, b in zip(one.layers, same.layers, strict=True))
    assert one.trained.history != other.trained.history


def test_patience_ends_a_fit_and_the_best_weights_are_kept() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(120, 30)).astype(np.float32)  # nothing to learn: validation soon gets worse
    truth = random.integers(0, 3, 120)
    recipe = quick(head=HeadRecipe(l2=0.0), early_stopping=EarlyStopping(patience=2))
    result = fitted(recipe, features, truth, epochs=200)
    losses = [epoch["val_loss"] for epoch in result.trained.history]
    assert result.trained.stopped == "patience"
    assert result.trained.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == result.trained.best_epoch + 2
    rows = np.arange(120) % 4 == 0
    probabilities = heads.probabilities(Task.MULTICLASS, heads.logits(result.layers, features[rows]))
    loss = -np.log(probabilities[np.arange(rows.sum()), truth[rows]]).mean()
    assert loss == pytest.approx(min(losses), rel=1e-4)


def test_freed_memory_is_kept_once_the_first_batch_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(freed_memory, "keep_freed", lambda: told.append("kept"))
    hooks = FitHooks(lambda number, metrics: told.append("epoch"), lambda epochs: told.append("batch"))
    fitted(quick(), *clouds(), epochs=2, hooks=hooks)
    assert told.count("kept") == 1 and told.index("kept") == told.index("batch") + 1 < told.index("epoch")


def test_a_target_that_is_reached_ends_a_fit() -> None:
    features, truth = clouds()
    target = Target(metric="val_accuracy", value=0.5)
    result = fitted(quick(early_stopping=EarlyStopping(target=target)), features, truth)
    assert result.trained.stopped == "target"
    assert result.trained.history[-1]["val_accuracy"] >= 0.5
    assert all(epoch["val_accuracy"] < 0.5 for epoch in result.trained.history[:-1])


def test_without_early_stopping_every_epoch_is_trained_and_the_last_is_kept() -> None:
    features, truth = clouds()
    result = fitted(quick(early_stopping=None), features, truth)
    assert (len(result.trained.history), result.trained.best_epoch, result.trained.stopped) == (
        EPOCHS,
        EPOCHS,
        "epochs",
    )


def test_without_validation_rows_every_epoch_is_trained() -> None:
    features, truth = clouds()
    result = fitted(quick(), features, truth, train=np.arange(len(truth)), validation=NONE)
    assert (len(result.trained.history), result.trained.best_epoch) == (EPOCHS, EPOCHS)
    assert set(result.trained.history[0]) == {"loss", "accuracy"}


def test_a_diverging_fit_says_what_to_lower() -> None:
    features, truth = clouds()
    recipe = quick(
        head=HeadRecipe(hidden=(64, 64), activation="linear", l2=10.0),
        optimizer=OptimizerRecipe(name="sgd", learning_rate=10),
    )
    with pytest.raises(TrainingDiverged, match=r"Lower optimizer\.learning_rate or head\.l2"):
        fitted(recipe, features, truth, epochs=200)


def test_every_epoch_is_told() -> None:
    told: list[tuple[int, float]] = []
    features, truth = clouds()
    result = fitted(quick(), features, truth, hooks=FitHooks(lambda *epoch: told.append((epoch[0], epoch[1]["loss"]))))
    assert told == [(number, epoch["loss"]) for number, epoch in enumerate(result.trained.history, start=1)]


def test_the_order_of_rows_is_a_function_of_seed_and_epoch() -> None:
    features, truth = clouds(rows=10)
    rows = np.array([1, 3, 5, 7, 9])
    identity = Scaler(np.zeros(8), np.ones(8))

    def seen(batches: Rows) -> list[float]:
        return [value for index in range(len(batches)) for value in batches[index][0][:, 0].tolist()]

    one, same = (Rows(features, truth, rows, 2, 5, identity) for _ in range(2))
    first = seen(one)
    assert sorted(first) == sorted(features[rows, 0].tolist())
    one.on_epoch_end()
    assert first != seen(one)
    same.on_epoch_end()
    assert seen(one) == seen(same)


def test_class_weights_balance_what_is_rare() -> None:
    truth = np.array([0, 0, 0, 1])
    assert class_weights(truth, ClassWeights.NONE) is None
    assert class_weights(truth, ClassWeights.AUTO) == pytest.approx({0: 4 / 6, 1: 2.0})


@pytest.mark.slow
def test_class_weights_make_a_rare_class_answered_more_often() -> None:
    random = np.random.default_rng(0)
    truth = (np.arange(400) % 20 == 1).astype(np.intp)
    features = (truth[:, None] + random.normal(0, 1.5, (400, 4))).astype(np.float32)
    plain, weighted = (
        (heads.logits(fitted(quick(class_weights=choice), features, truth).layers, features) > 0).sum()
        for choice in ("none", "auto")
    )
    assert weighted > plain


def fitted_to(task: Task, features: Features, targets: Any, recipe: Recipe | None = None) -> FittedHead:
    return fit_head(recipe or quick(), FitData(task, targets.shape[1], features, targets), quarter(len(targets)))


@pytest.mark.slow
def test_numbers_are_learned_whatever_their_unit() -> None:
    features = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    numbers = 20_000.0 + 500 * features[:, :1] - 200 * features[:, 1:2]
    result = fitted_to(Task.REGRESSION, features, numbers.astype(np.float64))
    error = heads.logits(result.layers, features) - numbers
    assert np.sqrt(np.square(error).mean()) < 0.1 * numbers.std()
    assert set(result.trained.history[0]) == {"loss", "val_loss"}
    assert (
        0 < result.trained.history[-1]["val_loss"] < result.trained.history[0]["val_loss"] < 2
    )  # of standardised numbers


def test_a_number_that_never_changes_is_answered() -> None:
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    result = fitted_to(Task.REGRESSION, features, np.full((40, 1), 7.25), quick(head=HeadRecipe(hidden=(3,))))
    assert heads.logits(result.layers, features) == pytest.approx(np.full((40, 1), 7.25))


def test_labels_are_learned_each_by_itself_and_an_image_is_right_if_all_its_labels_are() -> None:
    features = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    targets = np.stack([features[:, 0] > 0, features[:, 1] + features[:, 2] > 0.5], axis=1).astype(np.float32)
    result = fitted_to(Task.MULTILABEL, features, targets)
    right = (heads.logits(result.layers, features) > 0) == (targets > 0.5)
    assert right.mean() > 0.95
    watched = np.arange(200) % 4 == 0
    best = result.trained.history[result.trained.best_epoch - 1]
    assert best["val_accuracy"] == pytest.approx(right[watched].all(axis=1).mean())


def test_numbers_that_are_close_together_far_from_zero_are_learned() -> None:
    features = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    numbers = 1e12 + features[:, :1].astype(np.float64)
    result = fitted_to(Task.REGRESSION, features, numbers)
    assert np.abs(heads.logits(result.layers, features) - numbers).mean() < 0.5
