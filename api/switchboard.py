"""Which version answers for a name, kept in memory. Predictions ask no database, and go on while it is away.

Every process looks at the registry's revision a few times a second. When it moved, aliases are read anew: one whose new
version is loaded, or needs a head only, moves at once; any other goes on with the old version until the new one is
warm. What cannot be loaded is told in the log, and the old version stays.
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

LOOK_EVERY_S = 0.25
# Until a version that could not be loaded is tried again.
AGAIN_S = 5.0
# Networks that load side by side: it is the store that one waits for, not the processor.
_LOADS = 2

log = structlog.get_logger()


@dataclass(frozen=True)
class Served:
    """A version of a model, the bundle that answers for it, and the backbone that it is on."""

    version: int
    bundle: Digest
    backbone: Digest


@dataclass(frozen=True)
class _Name:
    """An alias of a model, as clients ask for it."""

    project_id: str
    model: str
    alias: str


@dataclass
class _Line:
    """What answers for a name, and what should."""

    serving: Served
    wanted: Served


class Switchboard:
    """Versions by name, for one process."""

    def __init__(self, database: Database, shelf: Shelf, look_every_s: float = LOOK_EVERY_S) -> None:
        """Begin to know nothing; `start` looks for changes from time to time."""
        self._database = database
        self._shelf = shelf
        self._look_every_s = look_every_s
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._revision = -1
        self._again_at: float | None = None
        self._lines: dict[_Name, _Line] = {}
        self._versions: dict[tuple[str, str, int], Served] = {}
        self._warming: set[Digest] = set()
        self._loads = ThreadPoolExecutor(_LOADS, "warm")
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look for changes until closed."""
        self._thread = threading.Thread(target=self._run, name="switchboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self._loads.shutdown(wait=False, cancel_futures=True)

    def known(self, principal: Principal, model: str, version: int | None, alias: str) -> Served | None:
        """Return what answers for a name if somebody asked for it before; `version` goes before `alias`."""
        with self._lock:
            if version is not None:
                return self._versions.get((principal.project_id, model, version))
            line = self._lines.get(_Name(principal.project_id, model, alias))
            return line.serving if line else None

    def find(self, principal: Principal, model: str, version: int | None, alias: str) -> Served:
        """Return what answers for a name, from the database if it must be. Raises NotFound or Unavailable."""
        while True:
            found = self.known(principal, model, version, alias)
            if found is not None:
                return found
            with self._database.reading() as session:
                revision = registry.get_revision(session)  # before the rest, which is then at least as new
                of_model = registry.get_model(session, principal, model)
                if version is not None:
                    row = registry.get_model_version(session, of_model, version)
                else:
                    row = registry.get_alias(session, of_model, alias)
                found = _served(row)
            with self._lock:
                if version is not None:  # it never changes
                    return self._versions.setdefault((principal.project_id, model, version), found)
                if revision >= self._revision:
                    name = _Name(principal.project_id, model, alias)
                    return self._lines.setdefault(name, _Line(found, found)).serving

    def serves(self, principal: Principal, model: str, alias: str, version: int) -> bool:
        """Say whether a name is answered by this version here and now, or by none so that it will be."""
        with contextlib.suppress(Unavailable):  # the next look sees it
            self.look()
        found = self.known(principal, model, None, alias)
        return found is None or found.version == version

    def look(self) -> None:
        """Read the aliases anew if the registry moved. Raises Unavailable while the database is away."""
        with self._looking:
            with self._database.reading() as session:
                revision = registry.get_revision(session)
                if revision == self._revision and not self._is_due():
                    return
                targets = self._targets(session)
            with self._lock:
                self._revision = revision
                self._again_at = None
                for name, line in list(self._lines.items()):
                    line.wanted = targets.get(name, line.wanted)
                changed = [line for line in self._lines.values() if line.wanted != line.serving]
        for line in changed:
            self._switch(line)

    def _run(self) -> None:
        is_away = False
        while not self._is_over.wait(self._look_every_s):
            try:
                self.look()
                is_away = False
            except Unavailable as error:
                if not is_away:
                    log.warning("aliases cannot be read; the known ones are served", error=error.detail)
                is_away = True
            except Exception:  # whatever it is, the next look may see more
                log.exception("aliases were not read")

    def _is_due(self) -> bool:
        return self._again_at is not None and time.monotonic() > self._again_at

    def _targets(self, session: Session) -> dict[_Name, Served]:
        return {
            _Name(model.project_id, model.name, alias): _served(version)
            for model, alias, version in registry.get_all_aliases(session)
        }

    def _switch(self, line: _Line) -> None:
        """Have a line answer as wanted: at once if only a head is missing, else when its backbone is warm."""
        wanted = line.wanted
        try:
            if self._shelf.predictor_if_warm(wanted.bundle, wanted.backbone):
                self._move(line, wanted)
                return
        except Exception as error:  # whatever it is, the other lines go on
            self._tell(wanted, error)
            return
        with self._lock:
            if wanted.bundle in self._warming:
                self._again_at = time.monotonic() + AGAIN_S  # another name waits for it, too
                return
            self._warming.add(wanted.bundle)
        self._loads.submit(self._warm, line, wanted)

    def _warm(self, line: _Line, wanted: Served) -> None:
        try:
            self._shelf.predictor(wanted.bundle)
            self._move(line, wanted)
        except Exception as error:  # whatever it is, the old one answers and this is tried again
            self._tell(wanted, error)
        finally:
            with self._lock:
                self._warming.discard(wanted.bundle)

    def _move(self, line: _Line, wanted: Served) -> None:
        with self._lock:
            if line.wanted == wanted:  # else it was moved again meanwhile
                line.serving = wanted

    def _tell(self, wanted: Served, error: Exception) -> None:
        told = error.record() if isinstance(error, EspalierError) else repr(error)
        log.error("a version cannot be served; the old one stays", bundle=wanted.bundle, error=told)
        with self._lock:
            self._again_at = time.monotonic() + AGAIN_S


def _served(version: ModelVersion) -> Served:
    return Served(version.number, Digest(version.bundle_sha256), Digest(version.backbone_sha256))
