"""Schedules of the simulator by the hundred thousand: what went wrong in them, and whether a law broke.

Nothing is timed against anything else. Each schedule follows from its seed alone, so that one that fails can be seen:
`--seed 123 --trace` prints every transaction, fault and log line of it.

Run as `python -m simulator.explore [--schedules 100000] [--first 0] [--processes 2]`, or with `--seed 123
[--trace]`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from benchmarks.figures import processor, report, table
from simulator.faults import Fault
from simulator.schedule import Failed, Simulator

_CHUNK = 50
_SAY_EVERY_S = 10.0


@dataclass
class Tally:
    """What many schedules were like."""

    schedules: int = 0
    simulated_s: float = 0.0
    transactions: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another tally in."""
        self.schedules += other.schedules
        self.simulated_s += other.simulated_s
        self.transactions += other.transactions
        self.runs += other.runs
        self.faults += other.faults
        self.failures += other.failures


def run(seeds: range) -> Tally:
    """Run the schedules of some seeds in this process."""
    tally = Tally(schedules=len(seeds))
    for seed in seeds:
        try:
            one = _simulator().run(seed)
        except Failed as failure:
            tally.failures.append(str(failure))
            continue
        tally.simulated_s += one.simulated_s
        tally.transactions += one.transactions
        tally.runs += one.runs
        tally.faults += one.happened
    return tally


_kept: list[Simulator] = []


def _simulator() -> Simulator:
    """Return the simulator of this process."""
    if not _kept:
        _kept.append(Simulator())
        gc.freeze()  # what was imported stays; looking through it again and again takes a tenth of the time
    return _kept[0]


def _chunks(first: int, schedules: int) -> Iterator[range]:
    for start in range(first, first + schedules, _CHUNK):
        yield range(start, min(start + _CHUNK, first + schedules))


def _measure(wanted: argparse.Namespace) -> None:
    tally = Tally()
    started = said = time.monotonic()
    with get_context("spawn").Pool(wanted.processes) as pool:
        for part in pool.imap_unordered(run, _chunks(wanted.first, wanted.schedules)):
            tally.add(part)
            for failure in part.failures:
                print(failure, flush=True)
            now = time.monotonic()
            if now - said >= _SAY_EVERY_S:
                said = now
                print(_progress(tally, wanted.schedules, now - started), file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    report("schedules", _figures(tally, wanted, seconds))
    broken = f"{len(tally.failures)} of {tally.schedules:,}"
    speed = f"{tally.schedules / seconds:.1f}/s on {wanted.processes} processes"
    table([("schedules that break a law", f"{broken} ({speed})", "0 of 100,000")], processor())
    sys.exit(1 if tally.failures else 0)


def _progress(tally: Tally, wanted: int, seconds: float) -> str:
    per_s = tally.schedules / seconds
    left_min = (wanted - tally.schedules) / per_s / 60
    return (
        f"{tally.schedules:,} of {wanted:,} schedules, {per_s:.1f}/s, {len(tally.failures)} failed, "
        f"{left_min:.0f} min to go"
    )


def _figures(tally: Tally, wanted: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "schedules": tally.schedules,
        "first_seed": wanted.first,
        "failures": tally.failures,
        "seconds": round(seconds, 1),
        "schedules_per_s": round(tally.schedules / seconds, 2),
        "processes": wanted.processes,
        "simulated_hours": round(tally.simulated_s / 3600, 1),
        "transactions": tally.transactions,
        "runs": dict(tally.runs),
        "faults": {fault.value: tally.faults[fault] for fault in Fault},
    }


def _show(seed: int, trace: bool) -> None:
    try:
        _simulator().run(seed, print if trace else None)
    except Failed as failure:
        sys.exit(str(failure))
    print(f"Seed {seed} breaks no law.")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="print all that happens under --seed")
    wanted = parser.parse_args()
    if wanted.seed is None:
        _measure(wanted)
    else:
        _show(wanted.seed, wanted.trace)


if __name__ == "__main__":
    main()
