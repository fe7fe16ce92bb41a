"""Extracts the features of images into the cache. Images are decoded while the engine computes earlier batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from artifacts.features import FeatureCache
from artifacts.store import Digest
from inference.engine import Engine
from training.data.pixels import PixelSource
from training.progress import Extraction

_BATCHES_KEPT = 16


def sum_extractions(parts: Sequence[Extraction]) -> Extraction:
    """Return the sum of extractions of the same images through several networks; `images` counts each image once."""
    return Extraction(
        images=parts[0].images,
        computed=sum(part.computed for part in parts),
        cached=sum(part.cached for part in parts),
        seconds=round(sum(part.seconds for part in parts), 3),
    )


def extract(
    digests: Sequence[Digest],
    engine: Engine,
    cache: FeatureCache,
    source: PixelSource,
    report: Callable[[int, int], None],
) -> Extraction:
    """Fill the cache with the features of every image.

    Args:
        digests: the images; the same image may occur several times.
        engine: computes the features.
        cache: holds the features, one row per image.
        source: yields the pixels of the images that are missing in the cache.
        report: called with (done, total) after each batch.

    Raises:
        Corrupt: a stored image cannot be decoded.
    """
    started = time.perf_counter()
    missing = cache.missing(digests)
    total = len(set(digests))
    done = cached = total - len(missing)
    report(done, total)
    kept: list[tuple[Sequence[Digest], np.ndarray]] = []
    for names, pixels in source.batches(missing):
        kept.append((names, engine.features(pixels)))
        done += len(names)
        if len(kept) == _BATCHES_KEPT or done == total:  # several batches per call, since each call syncs to disk
            cache.add([name for names, _ in kept for name in names], np.concatenate([rows for _, rows in kept]))
            kept.clear()
        report(done, total)
    return Extraction(total, len(missing), cached, round(time.perf_counter() - started, 3))
