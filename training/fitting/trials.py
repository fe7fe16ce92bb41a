"""Fits that are tried for a choice and not kept: who hears of them, and how far all of them are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.data.arrays import ReportProgress
from training.progress import Epoch


class Trials:
    """Says how far many fits are together, whether they go on side by side or one after the other."""

    def __init__(self, epochs: int, count: int, report: ReportProgress) -> None:
        self._epochs = epochs
        self._done = [0] * count
        self._report = report

    def of(self, number: int) -> Trial:
        """Return who hears of one of them."""
        return Trial(lambda epochs: self._hear(number, epochs))

    def _hear(self, number: int, epochs: float) -> None:
        self._done[number] = int(epochs)
        self._report(sum(self._done), self._epochs * len(self._done))


@dataclass(frozen=True)
class Trial:
    """Hears of one fit how many epochs are done."""

    batch: Callable[[float], None]

    def epoch(self, number: int, metrics: Epoch) -> None:
        """Hear of a finished epoch."""

    def unfrozen(self, epochs: int) -> None:
        """Hear that the network learns along."""
