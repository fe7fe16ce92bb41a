"""Listeners for trial fits, whose models are only compared and then discarded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from training.data.arrays import ReportProgress
from training.progress import SilentFit


class Trials:
    """Reports the progress of several fits together, whether they run in parallel or one after the other."""

    def __init__(self, epochs: int, count: int, report: ReportProgress) -> None:
        self._epochs = epochs
        self._done = [0] * count
        self._report = report

    def of(self, number: int) -> Trial:
        """Return the listener of fit `number`."""
        return Trial(partial(self._epochs_done, number))

    def _epochs_done(self, number: int, epochs: float) -> None:
        self._done[number] = int(epochs)
        self._report(sum(self._done), self._epochs * len(self._done))


class Trial(SilentFit):
    """Reports how many epochs of one fit are done, and keeps no checkpoints."""

    def __init__(self, report_epochs: Callable[[float], None]) -> None:
        self._report_epochs = report_epochs

    def epochs_done(self, epochs: float) -> None:
        self._report_epochs(epochs)
