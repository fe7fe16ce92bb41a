"""What a report says of folds, for histories that somebody invented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from recipes.recipe import ClassWeights, EarlyStopping, Recipe
from training.progress import Epoch, FoldResult
from training.report.run_report import fine_tuning_outcome, overfitting

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
        "median gap of "
        "validation over training loss was 0.225."
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
