"""The shelf: the models that a process has loaded, within a memory budget. Knows no names, no aliases and no SQL.

Models are loaded from the store by the digest of their bundle. A backbone is loaded once, with one engine and one
batcher, and all models on this backbone share it. Concurrent requests for a backbone wait for the same load. Loading
includes warming up the engine and measuring its best batch size.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from artifacts import bundle as bundles
from artifacts.bundle import Bundle
from artifacts.images import Pixels
from artifacts.store import Digest, Store
from errors import Unavailable
from inference.batcher import Batcher, best_batch, time_batches
from inference.engine import Engine, OpenVinoEngine
from inference.predictor import Predictor
from recipes.recipe import Precision

# Estimated memory of a network if it cannot be measured: the weights as read from the file, and the engine's own copy.
_MEMORY_PER_FILE_BYTE = 2
# How often the memory of the process is read, and the seconds between two readings. Decoding images causes short peaks.
_READINGS = 5
_READ_EVERY_S = 0.01
# Memory of a model besides the arrays of its head: labels and objects.
_MODEL_BYTES = 4096

EngineLoader = Callable[[Path, Precision, int], Engine]
Key = tuple[Digest, Precision]


def resident_bytes() -> int:
    """Return the resident memory of this process, 0 if the kernel does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class _Backbone:
    """The batcher of a loaded backbone, and the memory that the backbone takes."""

    batcher: Batcher
    size_bytes: int


@dataclass(frozen=True)
class LoadedBackbone:
    """A loaded backbone in the report of `Shelf.loaded`. `models` is the number of loaded models that share it."""

    digest: Digest
    precision: Precision
    batcher: Batcher
    size_bytes: int
    models: int


class Shelf:
    """Loads predictors by the digest of their bundle, and keeps them in memory.

    If they exceed the memory budget, the least recently used ones are evicted.
    """

    def __init__(
        self,
        store: Store,
        threads: int,
        budget_bytes: int,
        load: EngineLoader = OpenVinoEngine,
        resident_bytes: Callable[[], int] = resident_bytes,
    ) -> None:
        """Start with an empty shelf.

        Args:
            store: the store with bundles and networks.
            threads: number of threads of each engine.
            budget_bytes: the memory that all loaded models together may take.
            load: loads a network file into an engine.
            resident_bytes: returns the memory of the process, whose growth is the memory of a network. If it returns 0,
                the memory is estimated from the file size.
        """
        self._store = store
        self._resident_bytes = resident_bytes
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._load = load
        self._lock = threading.Lock()
        self._under_way = self._begun = 0  # loads of backbones
        self._loading: dict[Key, threading.Lock] = {}  # a lock for each backbone that was ever requested
        self._backbones: OrderedDict[Key, _Backbone] = OrderedDict()
        self._models: OrderedDict[Digest, Predictor] = OrderedDict()
        self._is_closed = False

    def find(self, digest: Digest) -> Predictor | None:
        """Return the predictor of a bundle and mark it as recently used; None if it is not loaded."""
        with self._lock:
            predictor = self._models.get(digest)
            if predictor is None:
                return None
            key = _key(predictor.bundle)
            if predictor.is_closed:  # a thread of its batcher has died
                self._drop(key)
                return None
            self._models.move_to_end(digest)
            self._backbones.move_to_end(key)
            return predictor

    def check_files(self, digest: Digest) -> None:
        """Check that a bundle and its backbone are stored undamaged. Raises NotFound, Corrupt or BundleRefused."""
        self._store.verified_path(bundles.load(self._store.read(digest)).backbone)

    def predictor(self, digest: Digest) -> Predictor:
        """Return the predictor of a bundle; load it if necessary. Raises NotFound, Corrupt or BundleRefused."""
        return self.find(digest) or self._load_bundle(digest, bundles.load(self._store.read(digest)))

    def predictor_if_warm(self, digest: Digest, backbone: Digest) -> Predictor | None:
        """Return the predictor of a bundle if its backbone is already loaded; None otherwise.

        This takes milliseconds, because at most the bundle is read from the store. Raises the same errors as
        `predictor`.
        """
        found = self.find(digest)
        if found is not None or not self._has(lambda key: key[0] == backbone):
            return found
        bundle = bundles.load(self._store.read(digest))
        return self._load_bundle(digest, bundle) if self._has(lambda key: key == _key(bundle)) else None

    def _has(self, is_meant: Callable[[Key], bool]) -> bool:
        with self._lock:
            return any(map(is_meant, self._backbones))

    def _load_bundle(self, digest: Digest, bundle: Bundle) -> Predictor:
        """Load a bundle, or wait for another thread that loads it; return its predictor."""
        with self._lock:
            loading = self._loading.setdefault(_key(bundle), threading.Lock())
        found = None
        with loading:
            while found is None:
                found = self.find(digest) or self._load_model(digest, bundle)
        return found

    def _load_model(self, digest: Digest, bundle: Bundle) -> Predictor | None:
        """Load a model, and its backbone if necessary. Return None if the backbone was evicted in the meantime."""
        key = _key(bundle)
        with self._lock:
            held = self._backbones.get(key)
        backbone = held or self._load_backbone(bundle)
        is_kept = False
        try:
            predictor = Predictor(bundle, backbone.batcher, self._store.read, self._on_growth)
            with self._lock:  # add both at once, because a backbone without a model would be evicted first
                if self._is_closed:
                    raise Unavailable("The service is shutting down. Try again in a moment.")
                if held is not None and self._backbones.get(key) is not held:
                    return None
                self._backbones[key] = backbone
                self._backbones.move_to_end(key)
                self._models[digest] = predictor
                is_kept = True
                self._make_room()
            return predictor
        except Unavailable:
            if held is None or self._is_closed:
                raise
            with self._lock:
                if self._backbones.get(key) is held:
                    self._drop(key)
            return None
        finally:
            if held is None and not is_kept:
                backbone.batcher.close()

    def _load_backbone(self, bundle: Bundle) -> _Backbone:
        path = self._store.verified_path(bundle.backbone)
        with self._lock:
            self._under_way += 1
            self._begun += 1
            begun, is_alone = self._begun, self._under_way == 1
        try:
            before = self._least_bytes()
            engine = self._load(path, bundle.precision, self._threads)
            timed = time_batches(lambda images: _seconds(engine, bundle.golden_input, images))
            grown = self._least_bytes() - before
        finally:
            with self._lock:
                self._under_way -= 1
                is_alone = is_alone and self._begun == begun
        file_bytes = path.stat().st_size
        expected = _MEMORY_PER_FILE_BYTE * file_bytes
        if not before:
            grown = expected
        elif not is_alone:  # the growth includes other loads
            grown = min(grown, expected)
        return _Backbone(Batcher(engine, best_batch(timed), timed), max(file_bytes, grown))

    def _least_bytes(self) -> int:
        """Return the minimum of several readings of the process's memory, to ignore short peaks; 0 if unknown."""
        least = self._resident_bytes()
        for _ in range(_READINGS - 1 if least else 0):
            time.sleep(_READ_EVERY_S)
            least = min(least, self._resident_bytes())
        return least

    def loaded(self) -> list[LoadedBackbone]:
        """Return the loaded backbones, the least recently used first."""
        with self._lock:
            models = Counter(_key(predictor.bundle) for predictor in self._models.values())
            return [
                LoadedBackbone(*key, backbone.batcher, backbone.size_bytes, models[key])
                for key, backbone in self._backbones.items()
            ]

    def close(self) -> None:
        """Answer waiting requests, unload everything and refuse further loads."""
        with self._lock:
            self._is_closed = True
            backbones, self._backbones, self._models = self._backbones, OrderedDict(), OrderedDict()
        for backbone in backbones.values():
            backbone.batcher.close()

    def _on_growth(self) -> None:
        with self._lock:
            self._make_room()

    def _make_room(self) -> None:
        """Evict the least recently used models and backbones until the rest fits the budget.

        If the backbones alone exceed the budget, the least recently used backbone is evicted with all its models.
        Otherwise models are evicted one by one, and a backbone once it has no models. The most recently used model and
        backbone always stay. The caller holds the lock.
        """
        while self._backbones_bytes() + self._models_bytes() > self._budget_bytes:
            used = {_key(predictor.bundle) for predictor in self._models.values()}
            oldest, *others = self._backbones
            idle = next((key for key in (oldest, *others[:-1]) if key not in used), None) if others else None
            if idle is not None:
                self._drop(idle)
            elif others and self._backbones_bytes() > self._budget_bytes:
                self._drop(oldest)
            elif len(self._models) > 1:
                self._models.popitem(last=False)
            else:
                return

    def _drop(self, key: Key) -> None:
        """Unload a backbone and all its models; the caller holds the lock."""
        backbone = self._backbones.pop(key, None)
        self._models = OrderedDict(
            (digest, model) for digest, model in self._models.items() if _key(model.bundle) != key
        )
        if backbone is not None:  # in a thread, because closing waits until all requests are answered
            threading.Thread(target=backbone.batcher.close, name="close-backbone", daemon=True).start()

    def _backbones_bytes(self) -> int:
        return sum(backbone.size_bytes for backbone in self._backbones.values())

    def _models_bytes(self) -> int:
        return sum(predictor.size_bytes + _MODEL_BYTES for predictor in self._models.values())


def _key(bundle: Bundle) -> Key:
    return bundle.backbone, bundle.precision


def _seconds(engine: Engine, golden: Pixels, images: int) -> float:
    """Return the seconds that the engine takes for a batch of `images` copies of the golden image."""
    pixels = np.resize(golden, (images, *golden.shape[1:]))
    started = time.perf_counter()
    engine.features(pixels)
    return time.perf_counter() - started
