"""Features of images, each through the backbone at most once; decoding overlaps with the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from artifacts import images
from artifacts.features import FeatureCache
from artifacts.images import ImageLimits, Pixels
from artifacts.recipe import Resize
from artifacts.store import Digest, Store
from errors import Corrupt, ImageRefused
from inference.engine import Engine

BATCH = 16
_BATCHES_AHEAD = 3
_BATCHES_KEPT = 16


@dataclass(frozen=True)
class Extraction:
    """How many different images a run has, how many of them went through the backbone, and how many were cached."""

    images: int
    computed: int
    cached: int


def extract(
    digests: Sequence[Digest],
    engine: Engine,
    cache: FeatureCache,
    store: Store,
    *,
    size: int,
    resize: Resize,
    limits: ImageLimits,
    threads: int,
    report: Callable[[int, int], None],
) -> Extraction:
    """Fill the cache with the features of every image.

    Args:
        digests: the images in the store.
        engine: the backbone.
        cache: where rows are looked up and kept.
        store: where the image files are.
        size: side of the pixels that the backbone takes.
        resize: how an image becomes a square.
        limits: what an image may be at most.
        threads: decoding threads.
        report: called with (done, total) after each batch.

    Raises:
        Corrupt: an image of the store cannot be decoded any more.
    """
    missing = cache.missing(digests)
    total = len(set(digests))
    done = cached = total - len(missing)
    report(done, total)
    kept: list[tuple[Sequence[Digest], np.ndarray]] = []
    for names, pixels in _decoded(missing, store, size, resize, limits, threads):
        kept.append((names, engine.features(pixels)))
        done += len(names)
        if len(kept) == _BATCHES_KEPT or done == total:  # a sync per batch would cost more than small batches do
            cache.add([name for names, _ in kept for name in names], np.concatenate([rows for _, rows in kept]))
            kept.clear()
        report(done, total)
    return Extraction(total, len(missing), cached)


def _decoded(
    digests: Sequence[Digest], store: Store, size: int, resize: Resize, limits: ImageLimits, threads: int
) -> Iterator[tuple[Sequence[Digest], Pixels]]:
    """Yield batches of (digests, uint8 [n, size, size, 3]) while later ones are being decoded."""

    def decode(digest: Digest) -> Pixels:
        try:
            return images.decode(store.read(digest), size, resize, limits)
        except ImageRefused as error:
            raise Corrupt(f"Image {digest} was accepted but cannot be decoded any more: {error.detail}") from error

    batches = deque(digests[start : start + BATCH] for start in range(0, len(digests), BATCH))
    ahead: deque[tuple[Sequence[Digest], list[Future[Pixels]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        while batches or ahead:
            while batches and len(ahead) < _BATCHES_AHEAD:
                names = batches.popleft()
                ahead.append((names, [pool.submit(decode, name) for name in names]))
            names, futures = ahead.popleft()
            yield names, np.stack([future.result() for future in futures])
