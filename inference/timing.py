"""Measures how long several calls take, in turns, so that their durations can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def medians_ms(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    within_s: float,
    alive: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median milliseconds of each call.

    Every round makes every call once, so that other load on the machine slows all calls equally. The first round only
    warms up and does not count.

    Args:
        calls: the calls to measure.
        rounds: number of rounds after the first.
        within_s: after so many seconds no further round begins; one round is always measured.
        alive: called after each call, to show that the work continues.
        now: the clock, in seconds.
    """
    taken: list[list[float]] = [[] for _ in calls]
    began = now()
    for done in range(rounds + 1):
        if done > 1 and now() - began > within_s:
            break
        for call, times in zip(calls, taken, strict=True):
            started = now()
            call()
            times.append(1000 * (now() - started))
            alive()
    return [statistics.median(times[1:]) for times in taken]
