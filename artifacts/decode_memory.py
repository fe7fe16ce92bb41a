"""Limits the memory that images take together while they are decoded in one process. Decodes nothing itself."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from errors import DeadlineExceeded

# Takes the bytes that decoding an image needs at most, and returns a context that holds them.
Reserve = Callable[[int], AbstractContextManager[None]]


def reserve_nothing(size_bytes: int) -> AbstractContextManager[None]:
    """Admit every image at once: for a process that decodes one image at a time."""
    return nullcontext()


class DecodeMemory:
    """Admits images to decoding in the order of their arrival, as long as their estimated bytes fit into a limit.

    An image that alone needs more than the limit is admitted when no other is being decoded. Used by several threads.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int, until: float = math.inf) -> Iterator[None]:
        """Wait for room for an image of so many bytes, and hold it inside the block.

        A thread that holds a reservation must not ask for another one.
        Raises DeadlineExceeded if there is no room when `time.perf_counter` reaches `until`.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._waiting[0] is ticket and self._has_room(size_bytes)):
                    left_s = until - time.perf_counter()
                    if left_s <= 0:
                        raise DeadlineExceeded(
                            "Expected memory to decode the image in time. Received none: larger images are decoded "
                            "first. Try again in a moment, or send smaller images."
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
