"""A clock that stands still until a test moves it, so that no machine is too slow for what the test says of time."""

from __future__ import annotations

from collections.abc import Callable

from clock import Clock


class ByHand:
    """Time that passes when it is told to, or where it is slept away; stands in for the module `time`, too."""

    def __init__(self, at_s: float = 1000.0) -> None:
        self._at_s = at_s

    def monotonic(self) -> float:
        """Return what the clock shows."""
        return self._at_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._at_s += seconds

    def of_worker(self, sleep: Callable[[float], None] | None = None) -> Clock:
        """Return this clock for a worker on a single thread: whoever holds a lease looks when a test has it look."""
        return Clock(now=self.monotonic, sleep=sleep or self.sleep, thread=lambda run, name: _NoThread())


class _NoThread:
    def start(self) -> None:
        """Do nothing."""

    def join(self, timeout: float | None = None) -> None:
        """Do nothing."""
