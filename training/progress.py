"""The protocol by which training reports its progress. Imports no framework, so that a worker can import it.

A run has one `ProgressListener`. Each fit of the run (a fold, or the final fit) has its own `FitListener`, which also
receives the checkpoints of that fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from artifacts.run_files import RunFile

if TYPE_CHECKING:
    from training.fitting.checkpoint import Checkpoint
    from training.fitting.fold_outcome import FoldOutcome
    from training.fitting.learners import Plan

Epoch = dict[str, float]
"""Metrics of one epoch by Keras name: `loss` and `accuracy` on training rows, `val_loss` and `val_accuracy` on
validation rows."""


@dataclass(frozen=True)
class Extraction:
    """How the features of a run's images were obtained.

    Attributes:
        images: number of different images.
        computed: number of images whose features were computed.
        cached: number of images whose features came from the cache.
        seconds: how long this took.
    """

    images: int
    computed: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class FoldResult:
    """The result of one fold.

    Attributes:
        number: number of the fold, from 0 through all repeats.
        epochs: number of epochs that were trained.
        best_epoch: the epoch whose weights were kept, counted from 1.
        stopped: why training ended, as in `LearnedModel`.
        metrics: metrics on the fold's test images, as JSON values.
        history: metrics of each epoch.
        seconds: duration of training and evaluation.
    """

    number: int
    epochs: int
    best_epoch: int
    stopped: str
    metrics: dict[str, Any]
    history: list[Epoch]
    seconds: float


class StageListener(Protocol):
    """Receives the progress of a run, except for the progress of its fits."""

    def stage(self, name: str) -> None:
        """Note that a stage begins; its name is a key of `worker.run_progress.STAGES`."""
        ...

    def images(self, done: int, total: int) -> None:
        """Note that the current stage has processed `done` of `total` images, or of epochs of trial fits."""
        ...

    def extracted(self, extraction: Extraction) -> None:
        """Note that the features of all images are available."""
        ...

    def file(self, name: RunFile, data: bytes, media_type: str) -> None:
        """Store a file of the run now, without waiting for the end of the run."""
        ...


class ProgressListener(StageListener, Protocol):
    """Receives the progress of a whole run."""

    def begin_fit(self, fold: int | None, plan: Plan) -> FitListener:
        """Note that a fit begins, and return its listener.

        Args:
            fold: number of the fold; None for the final fit.
            plan: the largest numbers of epochs of this fit.
        """
        ...

    def fold_ended(self, outcome: FoldOutcome) -> None:
        """Note that a fold was trained and evaluated."""
        ...


class FitListener(Protocol):
    """Receives the progress of one fit, and its checkpoints."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to continue from; None to start at the first epoch."""
        ...

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        """Note the end of an epoch. `number` counts from 1 through all phases."""
        ...

    def epochs_done(self, epochs: float) -> None:
        """Note how many epochs are done, with a fraction for the current one, such as 2.4."""
        ...

    def network_unfrozen(self, epochs: int) -> None:
        """Note that the second phase of fine-tuning begins, after `epochs` epochs of the head alone.

        Epochs of the second phase take far longer, because layers of the network are trained as well.
        """
        ...

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        """Offer a checkpoint at the end of an epoch.

        Args:
            take: returns a copy of the current state. The listener calls it only if it decides to store a checkpoint,
                because copying takes time.
        """
        ...


class SilentFit:
    """A listener that ignores progress, has no checkpoint to continue from, and stores none."""

    checkpoint: Checkpoint | None = None

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        """Do nothing."""

    def epochs_done(self, epochs: float) -> None:
        """Do nothing."""

    def network_unfrozen(self, epochs: int) -> None:
        """Do nothing."""

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        """Do nothing."""
