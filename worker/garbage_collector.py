"""Removes unreferenced files regularly, in a thread of the worker. Jobs and leases do not wait for it."""

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
    """Collects garbage at its start and then every `every_s`; on one database, one process at a time."""

    def __init__(self, database: Database, store: Store, every_s: float, older_than_s: float) -> None:
        self._database = database
        self._store = store
        self._every_s = every_s
        self._older_than_s = older_than_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Start the thread, which collects at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop collecting. A collection that waits for a bucket is abandoned, which is safe after any step."""
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
        """Clean up this machine's folder and collect garbage; return None if another process is collecting."""
        self._store.drop_unfinished(self._older_than_s)
        garbage.drop_copies(self._database, self._store, self._older_than_s)
        with self._database.exclusive(GARBAGE_COLLECTION) as is_held:
            if not is_held:
                return None
            found = garbage.collect_garbage(self._database, self._store, self._older_than_s, self._over.is_set)
        if found != CollectionSummary(0, 0, 0, 0):
            log.info("collected", **asdict(found))
        return found
