"""Runs many schedules of the simulator, counts their faults, and reports those that violate an invariant.

A schedule depends only on its seed, so a failure can be repeated: `--seed 123 --trace` prints every transaction, fault
and log line of it.

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
from simulator.schedule import ScheduleFailed, Simulator

_CHUNK = 50
_PRINT_EVERY_S = 10.0


@dataclass
class Tally:
    """Counts over many schedules, and the failures among them."""

    schedules: int = 0
    simulated_s: float = 0.0
    transactions: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the counts and failures of another tally."""
        self.schedules += other.schedules
        self.simulated_s += other.simulated_s
        self.transactions += other.transactions
        self.runs += other.runs
        self.faults += other.faults
        self.failures += other.failures


def run(seeds: range) -> Tally:
    """Run the schedules of these seeds in this process."""
    tally = Tally(schedules=len(seeds))
    for seed in seeds:
        try:
            one = _simulator().run(seed)
        except ScheduleFailed as failure:
            tally.failures.append(str(failure))
            continue
        tally.simulated_s += one.simulated_s
        tally.transactions += one.transactions
        tally.runs += one.runs
        tally.faults += one.happened
    return tally


_kept: list[Simulator] = []


def _simulator() -> Simulator:
    """Return the simulator of this process, made by the first call."""
    if not _kept:
        _kept.append(Simulator())
        gc.freeze()  # else the garbage collector spends a tenth of the time on imported objects
    return _kept[0]


def _chunks(first: int, schedules: int) -> Iterator[range]:
    for start in range(first, first + schedules, _CHUNK):
        yield range(start, min(start + _CHUNK, first + schedules))


def _run_all(arguments: argparse.Namespace) -> None:
    tally = Tally()
    started = printed_at = time.monotonic()
    with get_context("spawn").Pool(arguments.processes) as pool:
        for part in pool.imap_unordered(run, _chunks(arguments.first, arguments.schedules)):
            tally.add(part)
            for failure in part.failures:
                print(failure, flush=True)
            now = time.monotonic()
            if now - printed_at >= _PRINT_EVERY_S:
                printed_at = now
                print(_progress(tally, arguments.schedules, now - started), file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    report("schedules", _figures(tally, arguments, seconds))
    broken = f"{len(tally.failures)} of {tally.schedules:,}"
    speed = f"{tally.schedules / seconds:.1f}/s on {arguments.processes} processes"
    table([("schedules that violate an invariant", f"{broken} ({speed})", "0 of 100,000")], processor())
    sys.exit(1 if tally.failures else 0)


def _progress(tally: Tally, total: int, seconds: float) -> str:
    per_s = tally.schedules / seconds
    left_min = (total - tally.schedules) / per_s / 60
    return (
        f"{tally.schedules:,} of {total:,} schedules, {per_s:.1f}/s, {len(tally.failures)} failed, "
        f"{left_min:.0f} min to go"
    )


def _figures(tally: Tally, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "schedules": tally.schedules,
        "first_seed": arguments.first,
        "failures": tally.failures,
        "seconds": round(seconds, 1),
        "schedules_per_s": round(tally.schedules / seconds, 2),
        "processes": arguments.processes,
        "simulated_hours": round(tally.simulated_s / 3600, 1),
        "transactions": tally.transactions,
        "runs": dict(tally.runs),
        "faults": {fault.value: tally.faults[fault] for fault in Fault},
    }


def _show(seed: int, trace: bool) -> None:
    try:
        _simulator().run(seed, print if trace else None)
    except ScheduleFailed as failure:
        sys.exit(str(failure))
    print(f"Seed {seed} violates no invariant.")


def main() -> None:
    """Run one seed or many, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, help="run only this seed")
    parser.add_argument("--trace", action="store_true", help="print all events of the schedule of --seed")
    arguments = parser.parse_args()
    if arguments.seed is None:
        _run_all(arguments)
    else:
        _show(arguments.seed, arguments.trace)


if __name__ == "__main__":
    main()
