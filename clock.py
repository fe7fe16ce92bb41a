"""The clock, events and threads that a process uses. Tests and the simulator pass their own in place of real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Flag(Protocol):
    """A flag that one thread sets while others wait for it, such as a `threading.Event`."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Thread(Protocol):
    """A thread that can be started and joined, such as a `threading.Thread`."""

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


def _thread(run: Callable[[], None], name: str) -> Thread:
    return threading.Thread(target=run, name=name, daemon=True)


@dataclass(frozen=True)
class Clock:
    """A monotonic clock, and everything that waits for it: sleeping, flags and threads.

    `now` returns seconds from an arbitrary start, so that only differences are meaningful.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    flag: Callable[[], Flag] = threading.Event
    thread: Callable[[Callable[[], None], str], Thread] = _thread
