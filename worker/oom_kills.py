"""Counts the processes that the kernel killed for memory. Their SIGKILL alone does not tell who sent it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

# Counters of the whole machine (since Linux 4.13) and of the container, in control groups of version 2 and 1.
COUNTERS = (
    Path("/proc/vmstat"),
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)


def count_kills(counters: Sequence[Path] = COUNTERS) -> int:
    """Return a number that grows with each process that the kernel kills for memory; 0 where there are no counters."""
    kills = 0
    for counter in counters:
        with contextlib.suppress(OSError, ValueError):  # another system, or no permission to look
            for line in counter.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    kills += int(value)
    return kills
