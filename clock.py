"""Time and threads as a process sees them, so that tests and the simulator can replace them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Flag(Protocol):
    """Something that one thread sets and others wait for: a `threading.Event`."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Thread(Protocol):
    """A thread that was not started yet: a `threading.Thread`."""

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


def _thread(run: Callable[[], None], name: str) -> Thread:
    return threading.Thread(target=run, name=name, daemon=True)


@dataclass(frozen=True)
class Clock:
    """A monotonic clock in seconds, of which only differences mean anything, and everything that waits on it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    flag: Callable[[], Flag] = threading.Event
    thread: Callable[[Callable[[], None], str], Thread] = _thread
