"""Loaded models under a memory budget. Loads from the store by digest; knows no names, aliases or SQL.

A backbone is loaded once and shared by every bundle that names it: one engine, one batcher. Whoever asks for something
that is being loaded waits for that one load. A backbone is warm and its batch measured before anybody is answered.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from artifacts import bundle as bundles
from artifacts.bundle import Bundle
from artifacts.images import Pixels
from artifacts.recipe import Precision
from artifacts.store import Digest, Store
from errors import Unavailable
from inference.batcher import Batcher, best_batch
from inference.engine import Engine, OpenVinoEngine
from inference.predictor import Predictor

# What a network takes where the kernel does not say how much memory a process has: its weights as read and as laid out.
_MEMORY_PER_FILE_BYTE = 2
# Beside the arrays of a head: labels, the objects around them.
_MODEL_BYTES = 4096
# How often a batch is timed at warm-up, and for how long at most.
_TIMED = 3
_TIMED_S = 0.3

Load = Callable[[Path, Precision, int], Engine]
Key = tuple[Digest, Precision]


def resident_bytes() -> int:
    """Return the memory of this process, 0 where the kernel does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class _Place:
    """A backbone that is loaded or being loaded."""

    loading: threading.Lock = field(default_factory=threading.Lock)
    batcher: Batcher | None = None
    size_bytes: int = 0


@dataclass(frozen=True)
class Loaded:
    """A backbone that is loaded, and how many models are on it."""

    digest: Digest
    precision: Precision
    batcher: Batcher
    size_bytes: int
    models: int


class Shelf:
    """Predictors by bundle digest."""

    def __init__(
        self,
        store: Store,
        threads: int,
        budget_bytes: int,
        load: Load = OpenVinoEngine,
        resident_bytes: Callable[[], int] = resident_bytes,
    ) -> None:
        """Load with `load`; what a network takes is by how much `resident_bytes` of the process grows, if it tells."""
        self._store = store
        self._resident_bytes = resident_bytes
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._load = load
        self._lock = threading.Lock()
        self._backbones: OrderedDict[Key, _Place] = OrderedDict()
        self._models: OrderedDict[Digest, Predictor] = OrderedDict()
        self._is_closed = False

    def find(self, digest: Digest) -> Predictor | None:
        """Return the predictor of a bundle if it is loaded."""
        with self._lock:
            predictor = self._models.get(digest)
            if predictor is not None:
                self._models.move_to_end(digest)
                self._backbones.move_to_end(_key(predictor.bundle))
            return predictor

    def has_backbone(self, digest: Digest) -> bool:
        """Say whether the backbone of a bundle is loaded, so that its head would be in milliseconds.

        Raises NotFound, Corrupt or BundleRefused, as loading it would.
        """
        bundle = bundles.load(self._store.read(digest))
        self._store.verified_path(bundle.backbone)
        with self._lock:
            place = self._backbones.get(_key(bundle))
            return place is not None and place.batcher is not None

    def predictor(self, digest: Digest) -> Predictor:
        """Return the predictor of a bundle, loading what is missing. Raises NotFound, Corrupt or BundleRefused."""
        found = self.find(digest)
        if found is not None:
            return found
        bundle = bundles.load(self._store.read(digest))
        predictor = self._on_backbone(bundle)
        with self._lock:
            if _key(bundle) in self._backbones:  # else it was dropped meanwhile; whoever asks it loads it again
                self._models[digest] = predictor
                self._make_room()
        return predictor

    def _on_backbone(self, bundle: Bundle) -> Predictor:
        while True:
            batcher = self._batcher(bundle)
            try:
                return Predictor(bundle, batcher)
            except Unavailable:  # its place was needed before it had one model
                if self._is_closed or not batcher.is_closed:
                    raise

    def loaded(self) -> list[Loaded]:
        """Return the backbones that are loaded."""
        with self._lock:
            models = Counter(_key(predictor.bundle) for predictor in self._models.values())
            return [
                Loaded(digest, precision, place.batcher, place.size_bytes, models[digest, precision])
                for (digest, precision), place in self._backbones.items()
                if place.batcher is not None
            ]

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._lock:
            self._is_closed = True
            places, self._backbones, self._models = self._backbones, OrderedDict(), OrderedDict()
        for place in places.values():
            if place.batcher is not None:
                place.batcher.close()

    def _batcher(self, bundle: Bundle) -> Batcher:
        key = _key(bundle)
        with self._lock:
            place = self._backbones.setdefault(key, _Place())
            self._backbones.move_to_end(key)
        with place.loading:
            if place.batcher is None:
                try:
                    path = self._store.verified_path(bundle.backbone)
                    before = self._resident_bytes()
                    engine = self._load(path, bundle.precision, self._threads)
                    limit = best_batch(lambda images: _seconds(engine, bundle.golden_input, images))
                    after = self._resident_bytes()  # of two that load at once each is held to take what both do
                    file_bytes = path.stat().st_size
                    place.size_bytes = max(file_bytes, after - before if after else _MEMORY_PER_FILE_BYTE * file_bytes)
                    place.batcher = Batcher(engine, limit)
                except BaseException:
                    with self._lock:
                        self._backbones.pop(key, None)
                    raise
            batcher = place.batcher
        with self._lock:
            self._make_room()
        return batcher

    def _make_room(self) -> None:
        """Drop what was not asked for longest, but never the newest; the caller holds the lock.

        Backbones that are too large together go with every model on them. If it is the many models, those go one by
        one, and a backbone after the last one on it.
        """
        while self._backbones_bytes() + self._models_bytes() > self._budget_bytes:
            used = {_key(predictor.bundle) for predictor in self._models.values()}
            oldest, *others = [key for key, place in self._backbones.items() if place.batcher is not None]
            idle = next((key for key in (oldest, *others[:-1]) if key not in used), None) if others else None
            if idle is not None:
                self._drop(idle)
            elif others and self._backbones_bytes() > self._budget_bytes:
                self._drop(oldest)
                self._models = OrderedDict(
                    (digest, model) for digest, model in self._models.items() if _key(model.bundle) != oldest
                )
            elif len(self._models) > 1:
                self._models.popitem(last=False)
            else:
                return

    def _drop(self, key: Key) -> None:
        batcher = self._backbones.pop(key).batcher
        if batcher is not None:  # who waits there is answered, and nobody waits for that here
            threading.Thread(target=batcher.close, name="put-away", daemon=True).start()

    def _backbones_bytes(self) -> int:
        return sum(place.size_bytes for place in self._backbones.values())

    def _models_bytes(self) -> int:
        return sum(predictor.size_bytes + _MODEL_BYTES for predictor in self._models.values())


def _key(bundle: Bundle) -> Key:
    return bundle.backbone, bundle.precision


def _seconds(engine: Engine, golden: Pixels, images: int) -> float:
    """Return the median time of a batch."""
    pixels = np.resize(golden, (images, *golden.shape[1:]))
    engine.features(pixels)  # the first of a size takes longer
    times: list[float] = []
    while len(times) < _TIMED and sum(times) < _TIMED_S:
        started = time.perf_counter()
        engine.features(pixels)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
