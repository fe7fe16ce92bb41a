"""What a fit is given, and what the fit of a network returns."""

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
    """The images of a data set version as all fits of a run read them, row by row.

    Attributes:
        task: what is predicted.
        outputs: number of logits: one for binary and regression, else one per class or label.
        inputs: float32 features [N, D], uint8 pixels [N, H, W, 3] or float32 maps [N, h, w, C]; may be memory-mapped.
        targets: the true answers, as `training.data.targets` has them.
    """

    task: Task
    outputs: int
    inputs: npt.NDArray[Any]
    targets: Truth


@dataclass(frozen=True)
class FitTask:
    """One fit: the rows to learn from, and how long.

    Attributes:
        train: rows to learn from.
        validation: rows that early stopping watches; if empty, every epoch is trained.
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
    """A network that has learned, and the layers that follow it.

    Attributes:
        trained: how the training went.
        layers: the head on the network's raw features, with outputs in the targets' own unit.
        network: returns the weights of the network before the head, as `backbones.dump_weights` does.
        logits: returns [n, outputs] for rows of the data, computed by Keras without augmentation.
    """

    trained: FitSummary
    layers: tuple[Dense, ...]
    network: Callable[[], bytes]
    logits: Callable[[Indices], Logits]
