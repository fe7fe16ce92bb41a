"""What a report says of folds, for histories that somebody invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recipes.recipe import ClassWeights, EarlyStopping, Recipe, Task
from training.progress import Epoch, FoldResult
from training.report.run_report import failure, fine_tuning_outcome, overfitting, pictures, shown_range, undertrained

FALLING = (0.9, 0.5, 0.3, 0.2)
WATCHED, UNWATCHED = Recipe(), Recipe(early_stopping=None)


def fold(
    validation: Sequence[float] | None, best_epoch: int, losses: Sequence[float] = FALLING, **metrics: Any
) -> FoldResult:
    history: list[Epoch] = [{"loss": loss} for loss in losses]
    if validation is not None:
        history = [epoch | {"val_loss": loss} for epoch, loss in zip(history, validation, strict=True)]
        metrics = {"gap": validation[best_epoch - 1] - losses[best_epoch - 1], **metrics}
    return FoldResult(0, len(history), best_epoch, "patience", metrics, history, 1.0)


def test_validation_loss_that_fell_to_the_end_is_no_overfitting() -> None:
    said = overfitting([fold((0.9, 0.6, 0.5, 0.45), 4), fold((0.9, 0.6, 0.5, 0.505), 3)], WATCHED)
    assert said == (
        "No fold overfitted: validation loss did not rise while training loss fell. At the best epochs, the "
        "validation loss minus the training loss was 0.225 (median of the folds)."
    )


def test_training_loss_must_fall_meanwhile() -> None:
    said = overfitting([fold((0.9, 0.5, 0.7, 0.8), 2, losses=(0.9, 0.5, 0.6, 0.7))], WATCHED)
    assert said.startswith("No fold overfitted")


@pytest.mark.parametrize(
    ("folds", "recipe", "expected"),
    [
        (
            [fold((0.9, 0.6, 0.7, 0.8), 2), fold((0.9, 0.6, 0.5, 0.4), 4)],
            WATCHED,
            "1 of 2 folds overfitted: validation loss rose from epoch 2 on while training loss fell. The later "
            "epochs were ",
        ),
        (
            [fold((0.9, 0.6, 0.7, 0.8), 2), fold((0.9, 0.6, 0.5, 0.7), 3)],
            WATCHED,
            "2 of 2 folds overfitted: validation loss rose from epochs 2 to 3 on while training loss fell. The later ",
        ),
        (
            [fold((0.9, 0.6, 0.7, 0.8), 4), fold((0.9, 0.6, 0.7, 0.8), 2)],
            Recipe(early_stopping=EarlyStopping(monitor="val_accuracy")),
            "loss fell. 1 of them kept the weights of a later epoch, as `early_stopping` requires. ",
        ),
        (
            [fold((0.9, 0.6, 0.7, 0.8), 4)],
            UNWATCHED,
            "loss fell. 1 of them kept the weights of a later epoch, since early stopping is off. ",
        ),
    ],
)
def test_when_it_began_and_what_became_of_the_rest(folds: list[FoldResult], recipe: Recipe, expected: str) -> None:
    assert expected in overfitting(folds, recipe)


def test_losses_of_two_scales_have_no_gap_and_unwatched_folds_nothing() -> None:
    weighed = Recipe(class_weights=ClassWeights.AUTO)
    assert overfitting([fold((0.9, 0.6, 0.7, 0.8), 2)], weighed).endswith("were discarded.")
    assert overfitting([fold(None, 4)], UNWATCHED).startswith("The folds had no validation images")


def test_of_a_bad_model_it_is_no_praise_that_no_fold_overfitted() -> None:
    said = overfitting([fold((0.9, 0.6, 0.5, 0.45), 4)], WATCHED, is_bad=True)
    assert said.startswith("Overfitting is not the reason: validation loss did not rise")


def test_a_bad_model_is_said_to_be_bad_with_the_figures() -> None:
    classes = {
        "loss_difference": 0.02,
        "loss_difference_ci95": [-0.01, 0.05],
        "balanced_accuracy_difference": 0.012,
        "balanced_accuracy_difference_ci95": [-0.04, 0.064],
        "is_better": False,
    }
    assert failure({"baseline": classes}) == (
        "**This model is no better than a constant answer that ignores the image:** compared with always "
        "answering the shares of the classes or labels, the log-loss (less is better) differs by +0.020 (95 % interval "
        "-0.010 to +0.050) and the balanced accuracy (the mean over the classes of the share that is right; more is "
        "better) by +1.2 points (95 % interval -4.0 to +6.4). Neither interval shows the model to be better. It does "
        "not become `champion` by itself; to predict with it all the same, name its version."
    )
    numbers = failure({"baseline": {"r2": -1.1, "is_better": False}})
    assert "always answering the mean of the numbers has an R² of 0, and the model has -1.100" in numbers
    assert "the model has -2.27e+13" in failure({"baseline": {"r2": -22741391046462.2, "is_better": False}})
    assert failure({"baseline": {**classes, "is_better": True}}) == ""


def test_folds_that_all_stopped_at_their_last_epoch_are_said() -> None:
    falling = replace(fold((0.9, 0.6, 0.5, 0.45), 4), stopped="epochs")
    rising = replace(fold((0.9, 0.4, 0.5, 0.6), 2), stopped="epochs")
    said = undertrained([falling, rising], WATCHED)
    assert "All 2 folds stopped at their last epoch:** the validation loss was still falling in 1 of them" in said
    assert "Raise `epochs`." in said
    assert undertrained([falling, falling], UNWATCHED) != "" and undertrained([falling, rising], UNWATCHED) == ""
    assert undertrained([falling, replace(rising, stopped="patience")], WATCHED) == ""
    assert undertrained([replace(fold(None, 4), stopped="epochs")], WATCHED) == ""


def tuned(kept: str, head: float | None, network: float | None, stopped: str = "epochs") -> FoldResult:
    phases = [{"validation": head, "stopped": "epochs"}, {"validation": network, "stopped": stopped}]
    return fold(None, 4, phases=phases, kept=kept)


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        (
            [tuned("network", 0.5, 0.4), tuned("head", 0.5, 0.6)],
            "The validation score was at least as good as that of the frozen network in 1 of 2 folds.",
        ),
        (
            [tuned("network", None, None)] * 2,
            "In 2 of 2 folds there were no validation images to compare the two on.",
        ),
        (
            [tuned("head", 0.5, None, "diverged"), tuned("network", 0.5, 0.4)],
            "The validation score was at least as good as that of the frozen network in 1 of 2 folds. In 1 of 2 folds "
            "training diverged and the frozen network was kept. Lower `fine_tune.learning_rate`.",
        ),
    ],
)
def test_how_the_network_that_learned_did_against_the_frozen_one(folds: list[FoldResult], expected: str) -> None:
    assert fine_tuning_outcome(folds) == expected


def test_one_outlier_does_not_squeeze_the_picture_of_values() -> None:
    values = np.append(np.linspace(0, 1, 99), 1e9)
    low, high = shown_range(values)
    assert -0.1 < low < 0 and 1 < high < 1.1
    assert shown_range(np.linspace(0, 1, 99)) == (0, 1) and shown_range(np.full(9, 7.0)) == (7, 7)
    assert shown_range(np.append(np.zeros(50), 1.0)) == (0, 1), "nothing is squeezed if all others are equal"


@pytest.mark.parametrize("task", [Task.MULTICLASS, Task.MULTILABEL])
def test_long_names_leave_room_for_the_picture_itself(task: Task) -> None:
    labels = [f"a name that is very long, as those of species and products may be: {number}" for number in range(3)]
    rows = [{"label": label, "images": 9, "precision": 1.0, "recall": 1.0, "f1": 1.0} for label in labels]
    metrics = {"confusion": np.diag([9, 9, 9]).tolist(), "accuracy": 1.0, "f1_macro": 1.0, "per_class": rows}
    run: Any = SimpleNamespace(task=task, labels=labels, metrics=metrics, folds=[fold(None, 4)])
    assert len(pictures(run)) == 2  # a picture without room would be a warning, which is an error in tests
