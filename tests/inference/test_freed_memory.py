"""What a process does with freed memory: in one of its own, since thresholds stay set."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource
import numpy as np
from inference import freed_memory

def pages(times):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(times):
        np.ones(2**20, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

libc = ctypes.CDLL(None)
for parameter in (freed_memory._M_MMAP_THRESHOLD, freed_memory._M_TRIM_THRESHOLD):
    assert libc.mallopt(parameter, 128 * 1024)
print(pages(100) * resource.getpagesize())
freed_memory.keep_freed()
pages(1)
print(pages(100) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has thresholds")
def test_freed_memory_is_taken_again_whatever_was_set_before() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 50 * 2**20, "each mebibyte comes from the system anew"
    assert kept < 2**20
