"""What a training reports while it runs, and to whom. Imports no framework, so that a worker can read it.

A run has one `ProgressListener`, and each of its fits (a fold, or the final fit) a `FitListener` of its own, which also
takes its checkpoints.
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
"""Metrics of one epoch by their Keras name: loss and accuracy, and with `val_` in front those on validation rows."""


@dataclass(frozen=True)
class Extraction:
    """How many different images a run has, for how many features were computed, and for how many they were cached."""

    images: int
    computed: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class FoldResult:
    """What one fold measured on its test images, and the seconds that it took."""

    number: int
    epochs: int
    best_epoch: int
    stopped: str
    metrics: dict[str, Any]
    history: list[Epoch]
    seconds: float


class StageListener(Protocol):
    """Receives the progress of a run outside of its fits."""

    def stage(self, name: str) -> None:
        """Note that a stage begins; its name is a key of `worker.run_progress.STAGES`."""
        ...

    def images(self, done: int, total: int) -> None:
        """Note how many of its images, or epochs of trials, the present stage has done."""
        ...

    def extracted(self, extraction: Extraction) -> None:
        """Note for how many images features were computed."""
        ...

    def file(self, name: RunFile, data: bytes, media_type: str) -> None:
        """Store a file with the run before the run has ended."""
        ...


class ProgressListener(StageListener, Protocol):
    """Receives the progress of a whole run."""

    def begin_fit(self, fold: int | None, plan: Plan) -> FitListener:
        """Return the listener of a fold, or of the final fit (None), that has at most the epochs of `plan`."""
        ...

    def fold_ended(self, outcome: FoldOutcome) -> None:
        """Note what a fold measured; its fit has ended."""
        ...


class FitListener(Protocol):
    """Receives the progress of one fit, and its checkpoints."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to continue from; None to begin anew."""
        ...

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        """Note an epoch that has ended, counted from 1 through all phases."""
        ...

    def epochs_done(self, epochs: float) -> None:
        """Note how many epochs are done, the present one in part."""
        ...

    def network_unfrozen(self, epochs: int) -> None:
        """Note that the network learns too after so many epochs of the head: each takes far longer from now on."""
        ...

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        """Call `take` if a checkpoint is worth its time now; it copies the state at the end of the epoch."""
        ...


class SilentFit:
    """A fit that nobody listens to: it begins anew and keeps no checkpoints."""

    checkpoint: Checkpoint | None = None

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        """Do nothing."""

    def epochs_done(self, epochs: float) -> None:
        """Do nothing."""

    def network_unfrozen(self, epochs: int) -> None:
        """Do nothing."""

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        """Do nothing."""
