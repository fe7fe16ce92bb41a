"""Removes now and then what nothing needs any more: a thread of the worker that no job and no lease waits for."""

from __future__ import annotations

import threading
from dataclasses import asdict

import structlog

from artifacts.store import Store
from errors import DiskFull, Unavailable
from models import garbage
from models.garbage import GARBAGE_COLLECTION, CollectionSummary
from models.session import Database

log = structlog.get_logger()

_STOP_WITHIN_S = 5.0


class Collector:
    """Collects once at its start and then every `every_s`; on one database one process at a time does."""

    def __init__(self, database: Database, store: Store, every_s: float, older_than_s: float) -> None:
        self._database = database
        self._store = store
        self._every_s = every_s
        self._older_than_s = older_than_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Begin to collect."""
        self._thread.start()

    def stop(self) -> None:
        """Collect no more; one that waits for a bucket is left behind, since every step of it may be its last."""
        self._over.set()
        self._thread.join(_STOP_WITHIN_S)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.collect()
            except (Unavailable, DiskFull) as error:
                log.warning("not collected", error=error.detail)
            except Exception:
                log.exception("collection failed")
            self._over.wait(self._every_s)

    def collect(self) -> CollectionSummary | None:
        """Clear this machine's folder up, and collect; None if another process does that just now."""
        self._store.drop_unfinished(self._older_than_s)
        garbage.drop_copies(self._database, self._store, self._older_than_s)
        with self._database.exclusive(GARBAGE_COLLECTION) as is_held:
            if not is_held:
                return None
            found = garbage.collect_garbage(self._database, self._store, self._older_than_s, self._over.is_set)
        if found != CollectionSummary(0, 0, 0, 0):
            log.info("collected", **asdict(found))
        return found
