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


LARGE = """
from pathlib import Path
import numpy as np
from inference import freed_memory

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) >> 10

def left_mib():  # what stays of ten large pieces that are freed while small ones between them are in use
    before, pieces, small = resident_mib(), [], []
    for _ in range(10):
        pieces.append(np.ones(16 * 2**20, dtype=np.uint8))
        small.append(np.ones(100_000, dtype=np.uint8))
    pieces.clear()
    return resident_mib() - before

np.ones(30 * 2**20, dtype=np.uint8)  # from now on glibc keeps pieces of this size
kept = left_mib()
freed_memory.give_back_large_pieces()
print(kept, left_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has thresholds")
def test_memory_of_large_images_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept > 100 and given_back < 20, "Pillow takes 16 MiB at a time for a large image"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has thresholds")
def test_freed_memory_is_taken_again_whatever_was_set_before() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 50 * 2**20, "each mebibyte comes from the system anew"
    assert kept < 2**20
