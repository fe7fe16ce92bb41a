"""Controls whether freed memory stays with the process or goes back to the system. Works with glibc only."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Up to how much freed memory stays at the end of the heap, and from which size an allocation is returned at once.
# 32 MiB is the largest value of the second that glibc accepts.
_KEPT_BYTES, _PIECE_BYTES = 512 * 2**20, 32 * 2**20
# The same for a process that decodes images: Pillow takes 16 MiB at a time for a large one.
_SERVED_KEPT_BYTES, _SERVED_PIECE_BYTES = 16 * 2**20, 4 * 2**20


def keep_freed() -> None:
    """Keep freed memory in the process for later allocations. Call this after the first training step.

    When TensorFlow first reads from a generator, it sets glibc's trim threshold to 128 KiB. From then on glibc returns
    larger pieces at once and no longer adapts to the sizes in use. Each training step then has to get most of its
    tensors from the system again, page by page.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _PIECE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_large_pieces() -> None:
    """Return large pieces of memory to the system when they are freed. Call this at the start of a process that serves.

    By default glibc keeps pieces of up to 32 MiB once it has seen some, in heaps of each thread that never shrink while
    anything above them is in use: an API that had decoded large images kept gigabytes.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _SERVED_PIECE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _SERVED_KEPT_BYTES)


def give_back_freed() -> None:
    """Return all freed memory of the process to the system now."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library through ctypes if it is glibc; None for any other."""
    is_glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    return ctypes.CDLL(None) if is_glibc else None
