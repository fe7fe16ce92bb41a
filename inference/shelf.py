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


@dataclass(frozen=True)
class _Model:
    """A bundle that is loaded, and the bytes that it takes."""

    predictor: Predictor
    size_bytes: int

    @property
    def engine(self) -> tuple[Digest, Precision]:
        """The key of its backbone."""
        return self.predictor.bundle.backbone, self.predictor.bundle.precision


class Shelf:
    """Predictors by bundle digest."""

    def __init__(self, store: Store, threads: int, budget_bytes: int, load: Load = OpenVinoEngine) -> None:
        self._store = store
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._load = load
        self._lock = threading.Lock()
        self._engines: OrderedDict[tuple[Digest, Precision], _Place] = OrderedDict()
        self._models: OrderedDict[Digest, _Model] = OrderedDict()

    def predictor(self, digest: Digest) -> Predictor:
        """Return the predictor of a bundle, loading what is missing. Raises NotFound, Corrupt or BundleRefused."""
        with self._lock:
            model = self._models.get(digest)
            if model is not None:
                self._models.move_to_end(digest)
                self._engines.move_to_end(model.engine)
                return model.predictor
        data = self._store.read(digest)
        bundle = bundles.load(data)
        engine, turn = self._engine(bundle.backbone, bundle.precision)
        predictor = Predictor(bundle, engine, turn)
        predictor.check()
        with self._lock:
            if (bundle.backbone, bundle.precision) in self._engines:  # else it was dropped meanwhile; serve this once
                self._models[digest] = _Model(predictor, len(data))
                self._make_room()
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
        with self._lock:
            self._make_room()
        return engine, place.turn

    def _make_room(self) -> None:
        """Drop what was not asked for longest, but never the newest; the caller holds the lock.

        Backbones that are too large together go with every model on them. If it is the many models, those go one by
        one, and a backbone after the last one on it.
        """
        while self._networks_bytes() + self._models_bytes() > self._budget_bytes:
            used = {model.engine for model in self._models.values()}
            oldest, *others = self._engines
            idle = next((key for key in (oldest, *others[:-1]) if key not in used), None) if others else None
            if idle is not None:
                del self._engines[idle]
            elif others and self._networks_bytes() > self._budget_bytes:
                del self._engines[oldest]
                self._models = OrderedDict(
                    (key, model) for key, model in self._models.items() if model.engine != oldest
                )
            elif len(self._models) > 1:
                self._models.popitem(last=False)
            else:
                return

    def _networks_bytes(self) -> int:
        return sum(place.size_bytes for place in self._engines.values())

    def _models_bytes(self) -> int:
        return sum(model.size_bytes for model in self._models.values())
