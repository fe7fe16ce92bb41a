"""Whether the kernel kills for memory: it sends SIGKILL, as others may, but it keeps count."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

# Of the whole machine (Linux 4.13), and of the container's group in either version of control groups.
COUNTERS = (
    Path("/proc/vmstat"),
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)


def count_kills(counters: Sequence[Path] = COUNTERS) -> int:
    """Return a number that grows each time the kernel kills a process for memory; 0 where it does not tell."""
    kills = 0
    for counter in counters:
        with contextlib.suppress(OSError, ValueError):  # another system, or no permission to look
            for line in counter.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    kills += int(value)
    return kills
