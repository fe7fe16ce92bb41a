"""Removes files that no database row names, regularly, in a thread of the worker. Jobs do not wait for it."""

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
    """Removes unreferenced files when it starts and then every `every_s` seconds.

    Several workers may run a collector on one database: only one of them works at a time.
    """

    def __init__(self, database: Database, store: Store, every_s: float, older_than_s: float) -> None:
        self._database = database
        self._store = store
        self._every_s = every_s
        self._older_than_s = older_than_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Start the thread. Its first collection begins at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop collecting. Wait at most 5 s for a collection in progress: it can be abandoned safely at any step."""
        self._over.set()
        self._thread.join(_STOP_WITHIN_S)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.collect()
            except (Unavailable, DiskFull) as error:
                log.warning("garbage not collected", error=error.detail)
            except Exception:
                log.exception("garbage collection failed")
            self._over.wait(self._every_s)

    def collect(self) -> CollectionSummary | None:
        """Remove unfinished files and stale copies on this machine, then unreferenced files from the store.

        Return how much was removed, or None if another process is collecting now.
        """
        self._store.drop_unfinished(self._older_than_s)
        garbage.drop_copies(self._database, self._store, self._older_than_s)
        with self._database.exclusive(GARBAGE_COLLECTION) as is_held:
            if not is_held:
                return None
            found = garbage.collect_garbage(self._database, self._store, self._older_than_s, self._over.is_set)
        if found != CollectionSummary(0, 0, 0, 0):
            log.info("garbage collected", **asdict(found))
        return found
