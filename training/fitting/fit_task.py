"""The inputs of a fit (data and task), and the result of fitting a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from artifacts.bundle import Dense, Logits
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting.training_loop import FitHooks, FitSummary


@dataclass(frozen=True)
class FitData:
    """Inputs and targets of all N images of a data set version. All fits of a run share them.

    Attributes:
        task: what the model predicts.
        outputs: number of logits: one for binary and regression, else one per class or label.
        inputs: float32 features [N, D], uint8 pixels [N, H, W, 3] or float32 maps [N, h, w, C]; may be memory-mapped.
        targets: the true answers, in the shape that `training.data.targets.Truth` describes.
    """

    task: Task
    outputs: int
    inputs: npt.NDArray[Any]
    targets: Truth


@dataclass(frozen=True)
class FitTask:
    """One fit: its training and validation rows, its largest number of epochs, and its seed.

    Attributes:
        train: rows to train on.
        validation: rows that early stopping monitors; if empty, all epochs are trained.
        epochs: largest number of epochs.
        seed: the same seed gives the same result on the same machine.
        hooks: the snapshot to continue from, and the callbacks that report progress.
    """

    train: Indices
    validation: Indices
    epochs: int
    seed: int
    hooks: FitHooks


@dataclass(frozen=True)
class FittedNetwork:
    """A trained network with its head.

    Attributes:
        trained: history, best epoch and the reason why training ended.
        layers: the head. It takes the network's features as they are, and its outputs have the unit of the targets.
        network: returns the weights of the layers before the head, in the format of `backbones.dump_weights`.
        logits: returns the logits for row numbers, [n, outputs], computed by Keras without augmentation.
    """

    trained: FitSummary
    layers: tuple[Dense, ...]
    network: Callable[[], bytes]
    logits: Callable[[Indices], Logits]
