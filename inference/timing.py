"""Measures the duration of calls on this machine, alternating between them."""

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

    Every round makes every call once, so that other load on the machine slows all of them alike. The first round warms
    up and does not count. After `within_s` seconds no further round begins, but one round always counts. `alive` is
    called after each call.
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
