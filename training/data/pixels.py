"""Pixels of images in batches: decoded from files ahead of their use, or taken from an array in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from artifacts import images
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
    """Decodes images of the store to pixels, all of one size, in `threads` threads and within `limits.memory_bytes`."""

    store: Store
    size: Sides
    resize: Resize
    limits: ImageLimits
    threads: int

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3]) while later ones are being decoded.

        Raises:
            Corrupt: an image of the store can no longer be decoded.
        """
        batches = deque(digests[start : start + BATCH] for start in range(0, len(digests), BATCH))
        ahead: deque[tuple[Sequence[Digest], list[Future[Pixels]]]] = deque()
        memory = DecodeMemory(self.limits.memory_bytes)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="bring") as bringing,
            ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool,
        ):
            while batches or ahead:
                while batches and len(ahead) < _BATCHES_AHEAD:
                    names = batches.popleft()
                    brought = bringing.submit(self.store.prefetch, names)
                    ahead.append((names, [pool.submit(self._decode, name, brought, memory) for name in names]))
                names, futures = ahead.popleft()
                yield names, np.stack([future.result() for future in futures])

    def _decode(self, digest: Digest, brought: Future[None], memory: DecodeMemory) -> Pixels:
        brought.result()  # those of a batch together: one by one, each would be waited for
        try:
            return images.decode(self.store.read(digest), self.size, self.resize, self.limits, memory.reserve)
        except ImageRefused as error:
            raise Corrupt(f"Image {digest} was accepted but cannot be decoded any more: {error.detail}") from error


class PixelSource(Protocol):
    """Something that gives the pixels of images."""

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3])."""
        ...


class LoadedPixels:
    """Pixels that were decoded before; row i belongs to digest i."""

    def __init__(self, digests: Sequence[Digest], pixels: Pixels) -> None:
        self._rows = {digest: row for row, digest in enumerate(digests)}
        self._pixels = pixels

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, H, W, 3])."""
        for start in range(0, len(digests), BATCH):
            names = digests[start : start + BATCH]
            yield names, self._pixels[[self._rows[name] for name in names]]
