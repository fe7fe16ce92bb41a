"""Connections to the database, with the same interface for SQLite and PostgreSQL. Knows no records.

`reading()` and `writing()` are one transaction each; `writing()` commits at its end. On SQLite a writer takes the lock
at once (`BEGIN IMMEDIATE`), since upgrading a read transaction to a write can fail at any statement.
"""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, event, func, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from errors import DiskFull, Unavailable

BUSY_TIMEOUT_S = 10.0

# PostgreSQL's `disk_full`.
_FULL = "53100"

_AFTER_COMMIT = "after commit"

# Release lines and first patches with a fix of the WAL-reset bug (a checkpoint racing a writer can lose pages).
_WAL_FIXED = {(3, 44): 6, (3, 50): 7, (3, 51): 3}


class Database:
    """A database that opens sessions for reading and writing. SQLite waits `busy_timeout_s` for another writer."""

    def __init__(self, url: str | URL, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._writer = _sqlite_engine(parsed, "BEGIN IMMEDIATE", busy_timeout_s)
            self._reader = _sqlite_engine(parsed, "BEGIN", busy_timeout_s)
        else:
            self._writer = self._reader = _postgresql_engine(parsed)
        self._locks = _FileLocks(parsed) if self.is_sqlite else _AdvisoryLocks(parsed)

    @property
    def engine(self) -> Engine:
        """The engine that may write, for migrations."""
        return self._writer

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a transaction that only reads. Raises Unavailable if the database cannot be reached."""
        with _reachable(), Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction and commit it at the end.

        Raises Unavailable if the database cannot be reached, DiskFull if its disk is full.
        """
        session: Session | None = None
        try:
            with self._transaction() as session:
                yield session
        except Unavailable:
            if session is not None:  # the commit may have succeeded all the same
                self._run_after_commit(session)
            raise
        self._run_after_commit(session)

    def _run_after_commit(self, session: Session) -> None:
        """Run the functions registered by `after_commit`; the caller of the transaction does not see their errors."""
        for change in session.info.pop(_AFTER_COMMIT, ()):
            with suppress(Unavailable, DiskFull), self.writing() as own:
                change(own)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with _reachable(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def exclusive(self, name: str) -> Iterator[bool]:
        """Lock a name for the block; yield False if this or another process on the same database holds the lock.

        The lock of a process that dies is released. Raises Unavailable if the database cannot be reached.
        """
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        with _reachable(), self._locks.hold(number) as is_held:
            yield is_held

    def ping(self) -> None:
        """Ask the database for an answer. Raises Unavailable if it gives none."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close every connection."""
        self._writer.dispose()
        self._reader.dispose()
        self._locks.close()


def after_commit(session: Session, change: Callable[[Session], object]) -> None:
    """Run `change` in its own transaction after this one is committed: for actions that cannot be rolled back.

    It also runs if the result of the commit is unknown, so it must check itself whether there is anything to do. It
    does not run if the process dies or loses the database in between: nothing may depend on it.
    """
    session.info.setdefault(_AFTER_COMMIT, []).append(change)


class _FileLocks:
    """Named locks on one machine: each is a lock on one byte of a file, and in a set shared by threads."""

    def __init__(self, url: URL) -> None:
        self._guard = threading.Lock()
        self._held: set[int] = set()
        self._path = Path(f"{url.database}.names")
        self._file: IO[bytes] | None = None

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        with self._guard:
            is_held = number not in self._held and self._lock(number)
            if is_held:
                self._held.add(number)
        try:
            yield is_held
        finally:
            if is_held:
                with self._guard:
                    self._held.remove(number)
                    assert self._file is not None
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def _lock(self, number: int) -> bool:
        self._file = self._file or self._path.open("ab")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _AdvisoryLocks:
    """Named locks on PostgreSQL: advisory locks in separate sessions, released when the session ends."""

    def __init__(self, url: URL) -> None:
        self._engine = _postgresql_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        with self._engine.connect() as connection:
            is_held = bool(connection.scalar(select(func.pg_try_advisory_lock(number))))
            try:
                yield is_held
            finally:
                # A closed session releases its locks a moment later; a request in between would be refused.
                if is_held:
                    with suppress(DBAPIError):  # a connection that is lost has no lock any more
                        connection.scalar(select(func.pg_advisory_unlock(number)))

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if _is_full(error):
            raise DiskFull(
                "The disk of the database is full; nothing was written. Free some space, then try again."
            ) from error
        raise Unavailable("The database cannot be reached. Try again in a moment.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("The database connection was lost. Try again in a moment.") from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error was caused by a full disk.

    SQLite then rolls the transaction back itself, so the error that is raised may be about a missing savepoint.
    """
    while error is not None:
        cause = error.orig if isinstance(error, DBAPIError) else None
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Return whether this version of SQLite has the fix of the WAL-reset bug."""
    line, patch = version[:2], version[2]
    if line in _WAL_FIXED:
        return patch >= _WAL_FIXED[line]
    return line > max(_WAL_FIXED)


def _sqlite_engine(url: URL, begin: str, busy_timeout_s: float) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": busy_timeout_s})
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version_info) else "DELETE"

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver opens no transactions itself
        for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


# A machine that vanishes closes no connection: without these probes the other side waits for hours with its locks.
_PROBES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
_SERVER_PROBES = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"


def _postgresql_engine(url: URL, **options: Any) -> Engine:
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "options": f"-c timezone=utc {_SERVER_PROBES}", **_PROBES},
        **options,
    )
