"""Loaded models under a memory budget. Loads from the store by digest; knows no names, aliases or SQL.

A backbone is loaded once and shared by every bundle that names it. Whoever asks for something that is being loaded
waits for that one load.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from artifacts import bundle as bundles
from artifacts.recipe import Precision
from artifacts.store import Digest, Store
from inference.engine import Engine, OpenVinoEngine
from inference.predictor import Predictor

# A loaded network holds its weights once as read and once as the engine lays them out.
_MEMORY_PER_FILE_BYTE = 2

Load = Callable[[Path, Precision, int], Engine]


@dataclass
class _Place:
    """A backbone that is loaded or being loaded."""

    loading: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)
    engine: Engine | None = None
    size_bytes: int = 0


class Shelf:
    """Predictors by bundle digest."""

    def __init__(self, store: Store, threads: int, budget_bytes: int, load: Load = OpenVinoEngine) -> None:
        self._store = store
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._load = load
        self._lock = threading.Lock()
        self._engines: OrderedDict[tuple[Digest, Precision], _Place] = OrderedDict()
        self._predictors: dict[Digest, Predictor] = {}

    def predictor(self, digest: Digest) -> Predictor:
        """Return the predictor of a bundle, loading what is missing. Raises NotFound, Corrupt or BundleRefused."""
        with self._lock:
            predictor = self._predictors.get(digest)
            if predictor is not None:
                self._engines.move_to_end((predictor.bundle.backbone, predictor.bundle.precision))
                return predictor
        bundle = bundles.load(self._store.read(digest))
        engine, turn = self._engine(bundle.backbone, bundle.precision)
        predictor = Predictor(bundle, engine, turn)
        predictor.check()
        with self._lock:
            if (bundle.backbone, bundle.precision) in self._engines:  # else it was dropped meanwhile; serve this once
                self._predictors[digest] = predictor
        return predictor

    def _engine(self, backbone: Digest, precision: Precision) -> tuple[Engine, threading.Lock]:
        with self._lock:
            place = self._engines.setdefault((backbone, precision), _Place())
            self._engines.move_to_end((backbone, precision))
        with place.loading:
            if place.engine is None:
                try:
                    path = self._store.verified_path(backbone)
                    place.engine = self._load(path, precision, self._threads)
                    place.size_bytes = _MEMORY_PER_FILE_BYTE * path.stat().st_size
                except BaseException:
                    with self._lock:
                        self._engines.pop((backbone, precision), None)
                    raise
            engine = place.engine
        self._make_room()
        return engine, place.turn

    def _make_room(self) -> None:
        """Drop the backbones that were not asked for longest, but never the last one."""
        with self._lock:
            while len(self._engines) > 1 and self._size_bytes() > self._budget_bytes:
                (backbone, precision), _ = self._engines.popitem(last=False)
                self._predictors = {
                    digest: predictor
                    for digest, predictor in self._predictors.items()
                    if (predictor.bundle.backbone, predictor.bundle.precision) != (backbone, precision)
                }

    def _size_bytes(self) -> int:
        return sum(place.size_bytes for place in self._engines.values())
