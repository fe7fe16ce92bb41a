"""Pixels of a whole data set version: decoded and resized once, then read from a file mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from artifacts import images
from artifacts.images import IMAGE_RULE, ImageLimits, Pixels
from artifacts.recipe import Resize
from artifacts.store import Digest, Store, disk_errors
from errors import Corrupt, ImageRefused

BATCH = 16
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Decoder:
    """How the images of a run become squares of pixels."""

    store: Store
    size: int
    resize: Resize
    limits: ImageLimits
    threads: int

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, size, size, 3]) while later ones are being decoded.

        Raises:
            Corrupt: an image of the store cannot be decoded any more.
        """
        batches = deque(digests[start : start + BATCH] for start in range(0, len(digests), BATCH))
        ahead: deque[tuple[Sequence[Digest], list[Future[Pixels]]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            while batches or ahead:
                while batches and len(ahead) < _BATCHES_AHEAD:
                    names = batches.popleft()
                    ahead.append((names, [pool.submit(self._decode, name) for name in names]))
                names, futures = ahead.popleft()
                yield names, np.stack([future.result() for future in futures])

    def _decode(self, digest: Digest) -> Pixels:
        try:
            return images.decode(self.store.read(digest), self.size, self.resize, self.limits)
        except ImageRefused as error:
            raise Corrupt(f"Image {digest} was accepted but cannot be decoded any more: {error.detail}") from error


class Source(Protocol):
    """Where the pixels of images come from."""

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, size, size, 3])."""
        ...


class Loaded:
    """Pixels that have been decoded before, row i for digest i."""

    def __init__(self, digests: Sequence[Digest], pixels: Pixels) -> None:
        self._rows = {digest: row for row, digest in enumerate(digests)}
        self._pixels = pixels

    def batches(self, digests: Sequence[Digest]) -> Iterator[tuple[Sequence[Digest], Pixels]]:
        """Yield batches of (digests, uint8 [n, size, size, 3])."""
        for start in range(0, len(digests), BATCH):
            names = digests[start : start + BATCH]
            yield names, self._pixels[[self._rows[name] for name in names]]


def load_pixels(
    digests: Sequence[Digest], decoder: Decoder, folder: Path, report: Callable[[int, int], None]
) -> Pixels:
    """Return the pixels of images, from a file that an earlier call left or by decoding them into one.

    Args:
        digests: the images in the store, row by row; some may be equal.
        decoder: how they are decoded.
        folder: where such files are kept; they may be deleted at any time.
        report: called with (done, total) after each batch.

    Returns:
        uint8 [N, size, size, 3], read-only and mapped into memory.

    Raises:
        Corrupt: an image of the store cannot be decoded any more.
        DiskFull: the file does not fit.
    """
    shape = (len(digests), decoder.size, decoder.size, 3)
    what = repr((IMAGE_RULE, decoder.size, decoder.resize.value, list(digests)))
    place = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.u8"
    kept = _mapped(place, shape)
    if kept is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
    try:
        with disk_errors(), unfinished.open("x+b") as file:
            done = 0
            for names, pixels in decoder.batches(digests):
                file.write(pixels.tobytes())
                done += len(names)
                report(done, len(digests))
            file.flush()
            unfinished.replace(place)
            return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
    finally:
        unfinished.unlink(missing_ok=True)


def _mapped(place: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Return the pixels of a whole file, which then counts as used now; None if there is none."""
    with contextlib.suppress(FileNotFoundError):  # never made, or dropped at this moment by another process
        os.utime(place)
        with place.open("rb") as file:
            if os.fstat(file.fileno()).st_size == int(np.prod(shape)):
                return np.memmap(file, dtype=np.uint8, mode="r", shape=shape)
    return None


def drop_pixels(folder: Path, budget_bytes: int) -> None:
    """Remove the files that were not used for longest until the rest fits the budget."""
    found = []
    for file in folder.glob("*.u8"):
        with contextlib.suppress(FileNotFoundError):  # another process drops files, too
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    used = 0
    for _, size_bytes, file in sorted(found, reverse=True):
        used += size_bytes
        if used > budget_bytes:
            file.unlink(missing_ok=True)
