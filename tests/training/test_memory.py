from __future__ import annotations

import ctypes
import platform
import resource

import numpy as np
import pytest

from training import memory


def pages(times: int) -> int:
    """Return how many pages the system gives for a mebibyte that is taken and freed so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(2**20, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has thresholds")
def test_freed_memory_is_taken_again_whatever_was_set_before() -> None:
    libc = ctypes.CDLL(None)
    for parameter in (memory._M_MMAP_THRESHOLD, memory._M_TRIM_THRESHOLD):
        assert libc.mallopt(parameter, 128 * 1024)
    assert pages(100) > 100 * 200, "a mebibyte has 256 pages"
    memory.keep_freed()
    pages(1)
    assert pages(100) < 100
