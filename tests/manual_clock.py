"""A clock that only the test moves, so that the speed of the machine does not affect the result."""

from __future__ import annotations

from collections.abc import Callable

from clock import Clock


class ManualClock:
    """A clock that moves only when `sleep` is called. Tests also use it in place of the module `time`."""

    def __init__(self, at_s: float = 1000.0) -> None:
        self._at_s = at_s

    def monotonic(self) -> float:
        """Return the time of this clock in seconds."""
        return self._at_s

    def sleep(self, seconds: float) -> None:
        """Move the clock forward, without waiting."""
        self._at_s += seconds

    def worker_clock(self, sleep: Callable[[float], None] | None = None) -> Clock:
        """Return this clock for a worker without threads: a lease is renewed only when the test calls `look`."""
        return Clock(now=self.monotonic, sleep=sleep or self.sleep, thread=lambda run, name: _NoThread())


class _NoThread:
    def start(self) -> None:
        """Do nothing."""

    def join(self, timeout: float | None = None) -> None:
        """Do nothing."""
