"""Limits the memory that all images of one process take while they are decoded. Decodes nothing itself."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from errors import DeadlineExceeded

# A function that takes the largest number of bytes that decoding an image can need. It returns a context that waits for
# this memory when it is entered, and gives it back when it is left.
Reserve = Callable[[int], AbstractContextManager[None]]


def reserve_nothing(size_bytes: int) -> AbstractContextManager[None]:
    """Return a context that waits for nothing: for a process that decodes one image at a time."""
    return nullcontext()


class DecodeMemory:
    """Lets images be decoded in the order of their arrival, as long as their estimated bytes together fit into a limit.

    An image that needs more than the limit by itself is decoded when no other one is. Several threads may use this.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int, until: float = math.inf) -> Iterator[None]:
        """Wait until `size_bytes` more fit into the limit, and count them as taken inside the block.

        A thread must not call this inside the block of an earlier call: it could wait for itself for ever.
        Raises DeadlineExceeded if they do not fit before `until`, a time of `time.perf_counter`.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._waiting[0] is ticket and self._has_room(size_bytes)):
                    left_s = until - time.perf_counter()
                    if left_s <= 0:
                        raise DeadlineExceeded(
                            "Expected memory to decode the image in time. Received none: images of other requests take "
                            "it. Try again in a moment, or send smaller images."
                        )
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
                self._reserved_bytes += size_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._reserved_bytes -= size_bytes
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Number of images that wait for memory."""
        with self._changed:
            return len(self._waiting)

    def _has_room(self, size_bytes: int) -> bool:
        return self._reserved_bytes == 0 or self._reserved_bytes + size_bytes <= self._limit_bytes
