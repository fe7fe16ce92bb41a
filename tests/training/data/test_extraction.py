from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sample

from artifacts import images
from artifacts.features import FeatureCache, FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store, digest_of
from errors import Corrupt
from inference.engine import FlatEngine
from recipes.recipe import Precision, Resize
from training.data.extraction import extract
from training.data.pixels import BATCH, ImageDecoder
from training.progress import Extraction

SIZE = 16
LIMITS = ImageLimits()


def run(store: Store, folder: Path, engine: FlatEngine, digests: list[Digest]) -> tuple[Extraction, np.ndarray]:
    space = FeatureSpace(IMAGE_RULE, SIZE, Resize.SQUASH, digest_of(b"flat"), Precision.FLOAT32)
    cache = FeatureCache(folder, space, width=48)
    told: list[tuple[int, int]] = []
    result = extract(
        digests,
        engine,
        cache,
        ImageDecoder(store, SIZE, Resize.SQUASH, LIMITS, threads=2),
        lambda done, total: told.append((done, total)),
    )
    cache.close()
    assert told == sorted(told) and told[-1] == (len(set(digests)), len(set(digests)))
    return result, cache.rows(digests)


def test_no_image_goes_through_the_backbone_twice(store: Store, tmp_path: Path) -> None:
    engine = FlatEngine()
    files = [sample.png(seed) for seed in range(BATCH * 20 + 3)]
    digests = [store.put(file) for file in files]
    result, rows = run(store, tmp_path, engine, digests + digests[:2])
    assert result == Extraction(len(files), computed=len(files), cached=0, seconds=result.seconds)
    expected = FlatEngine().features(np.stack([images.decode(file, SIZE, Resize.SQUASH, LIMITS) for file in files]))
    assert np.array_equal(rows[: len(files)], expected)
    assert np.array_equal(rows[len(files) :], expected[:2])

    again, same = run(store, tmp_path, engine, digests)
    assert again == Extraction(len(files), computed=0, cached=len(files), seconds=again.seconds)
    assert np.array_equal(same, expected)

    more = [store.put(sample.png(seed)) for seed in range(9000, 9010)]
    added, _ = run(store, tmp_path, engine, digests + more)
    assert added == Extraction(len(files) + 10, computed=10, cached=len(files), seconds=added.seconds)
    assert engine.images_seen == len(files) + 10


def test_an_image_that_rotted_in_the_store_is_told_by_name(store: Store, tmp_path: Path) -> None:
    digest = store.put(sample.png(1))
    store.path(digest).write_bytes(sample.png(2))
    with pytest.raises(Corrupt, match=digest):
        run(store, tmp_path, FlatEngine(), [digest])
