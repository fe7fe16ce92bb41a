"""Makes thumbnails of stored images, on own threads and within the memory for decoding of the API. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from artifacts import images
from artifacts.decode_memory import DecodeMemory
from artifacts.images import ImageLimits
from artifacts.store import Digest, Store
from errors import DeadlineExceeded

SIDE = 160

# Thumbnails have their own threads, so that a page with many of them does not take those of other routes.
_THREADS = 2
_WAIT_S = 30.0


class ThumbnailMaker:
    """Makes thumbnails of images in the store. Belongs to one event loop."""

    def __init__(self, store: Store, limits: ImageLimits, memory: DecodeMemory) -> None:
        self._store = store
        self._limits = limits
        self._memory = memory
        self._pool = ThreadPoolExecutor(_THREADS, "thumbnail")

    async def make(self, image: Digest) -> bytes:
        """Return a stored image as a WEBP of at most `SIDE` pixels a side.

        Raises DeadlineExceeded if other images take all the threads or all the memory for too long.
        """
        until = time.perf_counter() + _WAIT_S
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._make, image, until)

    def close(self) -> None:
        """Cancel the thumbnails that are not begun yet, and accept no others."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, image: Digest, until: float) -> bytes:
        if time.perf_counter() >= until:
            raise DeadlineExceeded(
                "Expected a free thread for the thumbnail in time. Received none: other thumbnails take them. Try "
                "again in a moment."
            )
        reserve = partial(self._memory.reserve, until=until)
        return images.thumbnail(self._store.read(image), SIDE, self._limits, reserve)
