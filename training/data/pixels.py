"""Yields the pixels of images in batches, either decoded from stored files or taken from an array in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from artifacts import images
from artifacts.bit_depths import FULL_DEPTH
from artifacts.decode_memory import DecodeMemory
from artifacts.images import ImageLimits, Pixels
from artifacts.store import Digest, Store
from errors import Corrupt, ImageRefused
from recipes.layers import Sides
from recipes.recipe import Resize

BATCH = 16
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes stored images and resizes them to one size, in `threads` threads and within `limits.memory_bytes`.

    16-bit images are scaled from `bit_depth` bits.
    """

    store: Store
    size: Sides
    resize: Resize
    limits: ImageLimits
    threads: int
    bit_depth: int = FULL_DEPTH

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3]). While the caller uses a batch, threads decode the next ones.

        Raises:
            Corrupt: a stored image cannot be decoded.
        """
        batches = deque(digests[start : start + BATCH] for start in range(0, len(digests), BATCH))
        ahead: deque[tuple[Sequence[Digest], list[Future[Pixels]]]] = deque()
        memory = DecodeMemory(self.limits.memory_bytes)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="prefetch") as prefetching,
            ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool,
        ):
            while batches or ahead:
                while batches and len(ahead) < _BATCHES_AHEAD:
                    names = batches.popleft()
                    prefetched = prefetching.submit(self.store.prefetch, names)
                    ahead.append((names, [pool.submit(self._decode, name, prefetched, memory) for name in names]))
                names, futures = ahead.popleft()
                yield names, np.stack([future.result() for future in futures])

    def _decode(self, digest: Digest, prefetched: Future[None], memory: DecodeMemory) -> Pixels:
        prefetched.result()  # a bucket downloads a whole batch in parallel; single reads would wait one by one
        try:
            data = self.store.read(digest)
            return images.decode(data, self.size, self.resize, self.limits, memory.reserve, self.bit_depth)
        except ImageRefused as error:
            raise Corrupt(
                f"Image {digest} was decoded at upload, but cannot be decoded now: {error.detail} The stored file may "
                "be damaged."
            ) from error


class PixelSource(Protocol):
    """Yields the pixels of images, from whatever place it reads them."""

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3])."""
        ...


class LoadedPixels:
    """Yields pixels from an array in memory, uint8 [N, H, W, 3]. Row i of the array belongs to digest i."""

    def __init__(self, digests: Sequence[Digest], pixels: Pixels) -> None:
        self._rows = {digest: row for row, digest in enumerate(digests)}
        self._pixels = pixels

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3])."""
        for start in range(0, len(digests), BATCH):
            names = digests[start : start + BATCH]
            yield names, self._pixels[[self._rows[name] for name in names]]
