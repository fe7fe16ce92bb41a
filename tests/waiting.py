"""Waits for what other threads and processes bring about, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], within_s: float = 120.0) -> T:
    """Return the condition's value as soon as it is true; fail if it never is."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {within_s:g} s"
        time.sleep(0.01)
    return value


def until_no(error: type[Exception], ask: Callable[[], T]) -> T:
    """Ask again until that error stays away; return the answer."""

    def answers() -> list[T]:
        try:
            return [ask()]
        except error:
            return []

    return until(answers)[0]
