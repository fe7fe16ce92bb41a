"""Waits with a deadline until a condition holds, for tests with other threads or processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], within_s: float = 120.0) -> T:
    """Call `condition` repeatedly and return its value once it is true; fail after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {within_s:g} s"
        time.sleep(0.01)
    return value


def until_no(error: type[Exception], ask: Callable[[], T]) -> T:
    """Call `ask` repeatedly until it does not raise `error`; return its value."""

    def answers() -> list[T]:
        try:
            return [ask()]
        except error:
            return []

    return until(answers)[0]
