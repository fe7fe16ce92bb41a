"""How a training ends, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from recipes.layers import Sides
from recipes.recipe import EarlyStopping, Target
from training.fitting.training_loop import Arrays, EarlyStoppingMonitor, predict_batch
from training.progress import Epoch


class Counter:
    """A model whose only weight is the number of epochs that it has learned."""

    stop_training = False

    def __init__(self) -> None:
        self.learned = 0.0

    def get_weights(self) -> Arrays:
        return [np.array(self.learned)]

    def set_weights(self, weights: Arrays) -> None:
        self.learned = float(weights[0])


def ended(stopping: EarlyStoppingMonitor, epochs: Sequence[Epoch]) -> Counter:
    model = Counter()
    callbacks: list[Any] = stopping.callbacks
    for callback in callbacks:
        callback.set_model(model)
        callback.on_train_begin()
    for number, epoch in enumerate(epochs):
        model.learned += 1
        for callback in callbacks:
            callback.on_epoch_end(number, epoch)
        if model.stop_training:
            break
    for callback in callbacks:
        callback.on_train_end()
    return model


EPOCHS = [
    {"val_loss": 0.5, "val_accuracy": 0.4},
    {"val_loss": 0.6, "val_accuracy": 0.9},
    {"val_loss": 0.4, "val_accuracy": 1.0},
]


def test_the_epoch_that_reached_the_target_is_kept_though_another_had_less_loss() -> None:
    stopping = EarlyStoppingMonitor(EarlyStopping(target=Target(metric="val_accuracy", value=0.8)))
    model = ended(stopping, EPOCHS)
    assert (model.learned, stopping.best_epoch, stopping.reason) == (2, 2, "target")


def test_without_a_target_the_best_epoch_by_what_is_watched_is_kept() -> None:
    stopping = EarlyStoppingMonitor(EarlyStopping(patience=5))
    assert ended(stopping, [*EPOCHS, {"val_loss": 0.7, "val_accuracy": 1.0}]).learned == 3
    assert (stopping.best_epoch, stopping.reason) == (3, "epochs")
    stopping = EarlyStoppingMonitor(EarlyStopping(patience=1))
    assert ended(stopping, EPOCHS).learned == 1
    assert (stopping.best_epoch, stopping.reason) == (1, "patience")


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [(32, 128, 256), (32, 16, 64), (32, 512, 512), (224, 32, 32), (224, 4, 16), (299, 16, 16), ((2048, 2), 64, 256)],
)
def test_no_more_is_answered_at_once_than_training_or_small_images_allow(
    size: Sides, batch_size: int, expected: int
) -> None:
    assert predict_batch(size, batch_size) == expected
