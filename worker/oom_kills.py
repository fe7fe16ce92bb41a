"""Counts the processes that the kernel killed because memory ran out.

A process that ended by SIGKILL does not show whether the kernel or a person sent the signal; this count does.
"""

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
    """Return a number that grows each time the kernel kills a process because memory ran out.

    Return 0 on systems without such counters.
    """
    kills = 0
    for counter in counters:
        with contextlib.suppress(OSError, ValueError):  # not Linux, or no permission to read
            for line in counter.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    kills += int(value)
    return kills
