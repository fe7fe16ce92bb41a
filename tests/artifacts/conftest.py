"""Faults that need no patching."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

FillDisk = Callable[[Path], None]


@pytest.fixture
def fill_disk() -> FillDisk:
    """Returns a function: from its call on, whatever is written to the open files of a folder meets a full disk."""

    def fill(folder: Path) -> None:
        files = [file.stat() for file in folder.iterdir()]
        full = os.open("/dev/full", os.O_WRONLY)
        found = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                status = os.fstat(int(name))
            except OSError:  # the descriptor by which this folder was listed
                continue
            if any(os.path.samestat(status, file) for file in files):
                os.dup2(full, int(name))
                found += 1
        os.close(full)
        assert found == len(files), "a file of the folder is not open"

    return fill
