"""Finds the model version that answers for a name, from memory, so that predictions work while the database is away.

Every API process reads the registry's revision four times a second. If the revision has changed, the process reads all
aliases. If an alias points to a new version whose backbone is loaded, the new version answers at once. Otherwise the
old version answers until the backbone is loaded. If loading fails, the log reports it and the old version stays.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from sqlalchemy.orm import Session

from artifacts.store import Digest
from errors import EspalierError, Unavailable
from inference.shelf import Shelf
from models import registry
from models.project import Principal
from models.registry import ModelVersion
from models.session import Database

REFRESH_EVERY_S = 0.25
# Seconds until a version that could not be loaded is tried again.
RETRY_AFTER_S = 5.0
# Number of networks that load in parallel. Loading mostly waits for the store, not for the processor.
_LOADS = 2

log = structlog.get_logger()


@dataclass(frozen=True)
class ServedVersion:
    """The number of a model version, with the digests of its bundle and its backbone."""

    version: int
    bundle: Digest
    backbone: Digest


@dataclass(frozen=True)
class _AliasKey:
    """Identifies an alias of a model in a project."""

    project_id: str
    model: str
    alias: str


@dataclass
class _AliasState:
    """The version that answers for an alias now, and the version to which the alias points in the database."""

    serving: ServedVersion
    target: ServedVersion


class VersionResolver:
    """Finds the version that answers for a model name. Each API process has one resolver."""

    def __init__(self, database: Database, shelf: Shelf, refresh_every_s: float = REFRESH_EVERY_S) -> None:
        """Create a resolver with an empty cache. `start` starts the thread that keeps the cache up to date."""
        self._database = database
        self._shelf = shelf
        self._refresh_every_s = refresh_every_s
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._revision = -1
        self._retry_at: float | None = None
        self._aliases: dict[_AliasKey, _AliasState] = {}
        self._versions: dict[tuple[str, str, int], ServedVersion] = {}
        self._warming: set[Digest] = set()
        self._loads = ThreadPoolExecutor(_LOADS, "warm")
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start a thread that refreshes the aliases until `close` is called."""
        self._thread = threading.Thread(target=self._run, name="version-resolver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and cancel loads that have not begun."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self._loads.shutdown(wait=False, cancel_futures=True)

    def find_cached(self, principal: Principal, model: str, version: int | None, alias: str) -> ServedVersion | None:
        """Return the version that answers for a model and a version number or an alias; None if it is not cached.

        If `version` is a number, `alias` is ignored.
        """
        with self._lock:
            if version is not None:
                return self._versions.get((principal.project_id, model, version))
            state = self._aliases.get(_AliasKey(principal.project_id, model, alias))
            return state.serving if state else None

    def resolve(self, principal: Principal, model: str, version: int | None, alias: str) -> ServedVersion:
        """Return the version that answers for a model and a version number or an alias.

        The version comes from the cache if possible, otherwise from the database. Raises NotFound or Unavailable.
        """
        while True:
            found = self.find_cached(principal, model, version, alias)
            if found is not None:
                return found
            with self._database.reading() as session:
                revision = registry.get_revision(session)  # read first, so that the rows are not older than it
                of_model = registry.get_model(session, principal, model)
                if version is not None:
                    row = registry.get_model_version(session, of_model, version)
                else:
                    row = registry.get_alias(session, of_model, alias)
                found = _served_version(row)
            with self._lock:
                if version is not None:  # a version never changes, so it may be cached for good
                    return self._versions.setdefault((principal.project_id, model, version), found)
                if revision >= self._revision:
                    name = _AliasKey(principal.project_id, model, alias)
                    return self._aliases.setdefault(name, _AliasState(found, found)).serving

    def serves(self, principal: Principal, model: str, alias: str, version: int) -> bool:
        """Return whether this process answers an alias with this version, now or as soon as the alias is requested."""
        with contextlib.suppress(Unavailable):  # the next refresh will read the aliases
            self.refresh()
        found = self.find_cached(principal, model, None, alias)
        return found is None or found.version == version

    def refresh(self) -> None:
        """Read the aliases again if the registry has changed. Raises Unavailable if the database does not answer."""
        with self._refreshing:
            with self._database.reading() as session:
                revision = registry.get_revision(session)
                if revision == self._revision and not self._is_retry_due():
                    return
                targets = self._targets(session)
            with self._lock:
                self._revision = revision
                self._retry_at = None
                for name, state in list(self._aliases.items()):
                    state.target = targets.get(name, state.target)
                changed = [state for state in self._aliases.values() if state.target != state.serving]
        for state in changed:
            self._switch(state)

    def _run(self) -> None:
        is_away = False
        while not self._is_over.wait(self._refresh_every_s):
            try:
                self.refresh()
                is_away = False
            except Unavailable as error:
                if not is_away:
                    log.warning("aliases cannot be read; cached versions answer", error=error.detail)
                is_away = True
            except Exception:  # after any error, the next refresh may succeed
                log.exception("aliases were not read")

    def _is_retry_due(self) -> bool:
        return self._retry_at is not None and time.monotonic() > self._retry_at

    def _targets(self, session: Session) -> dict[_AliasKey, ServedVersion]:
        return {
            _AliasKey(model.project_id, model.name, alias): _served_version(version)
            for model, alias, version in registry.get_all_aliases(session)
        }

    def _switch(self, state: _AliasState) -> None:
        """Serve the version to which an alias points: at once if its backbone is loaded, else when it is loaded."""
        target = state.target
        try:
            if self._shelf.predictor_if_warm(target.bundle, target.backbone):
                self._move(state, target)
                return
        except Exception as error:  # an error of one alias must not stop the others
            self._note_failure(target, error)
            return
        with self._lock:
            if target.bundle in self._warming:
                self._retry_at = time.monotonic() + RETRY_AFTER_S  # another alias is already loading this bundle
                return
            self._warming.add(target.bundle)
        self._loads.submit(self._warm, state, target)

    def _warm(self, state: _AliasState, target: ServedVersion) -> None:
        try:
            self._shelf.predictor(target.bundle)
            self._move(state, target)
        except Exception as error:  # the old version answers, and the new one is tried again later
            self._note_failure(target, error)
        finally:
            with self._lock:
                self._warming.discard(target.bundle)

    def _move(self, state: _AliasState, target: ServedVersion) -> None:
        with self._lock:
            if state.target == target:  # otherwise the alias was moved again meanwhile
                state.serving = target

    def _note_failure(self, target: ServedVersion, error: Exception) -> None:
        record = error.record() if isinstance(error, EspalierError) else repr(error)
        log.error("a model version cannot be loaded; the old version answers", bundle=target.bundle, error=record)
        with self._lock:
            self._retry_at = time.monotonic() + RETRY_AFTER_S


def _served_version(version: ModelVersion) -> ServedVersion:
    return ServedVersion(version.number, Digest(version.bundle_sha256), Digest(version.backbone_sha256))
