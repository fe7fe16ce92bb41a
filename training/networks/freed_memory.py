"""What a process does with memory that it has freed. Does something under glibc alone."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# So much freed memory stays at the end of a heap; pieces larger than the latter, glibc's greatest, go back at once.
_KEPT_BYTES, _PIECE_BYTES = 512 * 2**20, 32 * 2**20


def keep_freed() -> None:
    """Keep freed memory for what is allocated next.

    The first time that TensorFlow reads from a generator it has glibc give everything back above 128 KiB at once, and
    glibc stops to adapt to the sizes that are asked for. A training step then takes most of its tensors from the system
    anew, page by page. Call this after the first step.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_freed() -> None:
    """Give freed memory back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library, None if it is another one."""
    is_glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL(None) if is_glibc else None
