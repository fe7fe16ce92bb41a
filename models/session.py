"""Connections to the database, with the same interface for SQLite and PostgreSQL. Knows no records.

`reading()` and `writing()` each open one transaction; `writing()` commits it at the end. On SQLite, a writing
transaction takes the write lock at its beginning (`BEGIN IMMEDIATE`). If it took the lock at its first write, that
statement could fail because of another writer.
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

# PostgreSQL's error code `disk_full`.
_FULL = "53100"

_AFTER_COMMIT = "after commit"

# SQLite's WAL-reset bug: if a checkpoint races a writer, pages can be lost. For each release line with a fix, this is
# the first patch that has it.
_WAL_FIXED = {(3, 44): 6, (3, 50): 7, (3, 51): 3}


class Database:
    """A database, which opens sessions for reading and writing.

    On SQLite, a writer waits at most `busy_timeout_s` seconds for another writer.
    """

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
        """The SQLAlchemy engine of writing connections. Migrations use it directly."""
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
            if session is not None:  # although the connection was lost, the commit may have succeeded
                self._run_after_commit(session)
            raise
        self._run_after_commit(session)

    def _run_after_commit(self, session: Session) -> None:
        """Run the functions that `after_commit` has registered, and ignore errors because of the database."""
        for change in session.info.pop(_AFTER_COMMIT, ()):
            with suppress(Unavailable, DiskFull), self.writing() as own:
                change(own)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with _reachable(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def exclusive(self, name: str) -> Iterator[bool]:
        """Try to lock a name while the block runs; yield whether this succeeded.

        It fails if another thread or another process on the same database holds the lock. The lock of a process that
        dies is released. Raises Unavailable if the database cannot be reached.
        """
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        with _reachable(), self._locks.hold(number) as is_held:
            yield is_held

    def ping(self) -> None:
        """Check that the database answers a query. Raises Unavailable if it does not."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections to the database."""
        self._writer.dispose()
        self._reader.dispose()
        self._locks.close()


def after_commit(session: Session, change: Callable[[Session], object]) -> None:
    """Register `change` to run in a new transaction after this one is committed. Use it for what cannot be rolled back.

    `change` also runs if it is unknown whether the commit has succeeded, so it must check whether there is anything to
    do. It does not run if the process dies or loses the database before, so nothing may depend on it.
    """
    session.info.setdefault(_AFTER_COMMIT, []).append(change)


class _FileLocks:
    """Named locks between the processes and threads of one machine, for SQLite.

    A lock between processes is a lock on one byte of a file. A lock between threads is an entry in a set.
    """

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
        except (BlockingIOError, PermissionError):  # POSIX allows either error for a lock that is held
            return False
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _AdvisoryLocks:
    """Named locks on PostgreSQL. Each is an advisory lock in a connection of its own, released when that closes."""

    def __init__(self, url: URL) -> None:
        self._engine = _postgresql_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        with self._engine.connect() as connection:
            is_held = bool(connection.scalar(select(func.pg_try_advisory_lock(number))))
            try:
                yield is_held
            finally:
                # Closing the connection releases the lock only a moment later, and until then others could not get it.
                if is_held:
                    with suppress(DBAPIError):  # the lock of a lost connection is already released
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
                "The disk of the database is full, so nothing was written. Free some space, then try again."
            ) from error
        raise Unavailable("The database cannot be reached. Try again in a moment.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("The database connection was lost. Try again in a moment.") from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Return whether the cause of an error, direct or indirect, is a full disk.

    When the disk is full, SQLite itself rolls back the transaction. SQLAlchemy may then report a missing savepoint.
    """
    while error is not None:
        cause = error.orig if isinstance(error, DBAPIError) else None
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Return whether a version of SQLite has the fix of the WAL-reset bug."""
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
        connection.isolation_level = None  # otherwise the driver would begin transactions by itself
        for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


# A machine that loses power or network closes no connection. These probes notice it within half a minute. Without them,
# the other side would keep the connection and its locks for hours.
_PROBES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
_SERVER_PROBES = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"


def _postgresql_engine(url: URL, **options: Any) -> Engine:
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "options": f"-c timezone=utc {_SERVER_PROBES}", **_PROBES},
        **options,
    )
