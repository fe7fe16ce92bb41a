"""Connections to the database, the same from SQLite and PostgreSQL. Knows no records.

`reading()` and `writing()` are one transaction each; `writing()` commits at its end. On SQLite a writer takes the lock
at once (`BEGIN IMMEDIATE`), since a read that is upgraded to a write later can fail at any statement.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from errors import Unavailable

BUSY_TIMEOUT_S = 10.0

# The lines in which the WAL-reset bug (a checkpoint racing a writer can lose pages) is mended.
_WAL_FIXED = {(3, 44): 6, (3, 50): 7, (3, 51): 3}


class Database:
    """A database, as sessions for reading and for writing. SQLite waits `busy_timeout_s` for another writer."""

    def __init__(self, url: str | URL, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._writer = _sqlite_engine(parsed, "BEGIN IMMEDIATE", busy_timeout_s)
            self._reader = _sqlite_engine(parsed, "BEGIN", busy_timeout_s)
        else:
            self._writer = self._reader = _postgresql_engine(parsed)

    @property
    def engine(self) -> Engine:
        """The engine that may write, for migrations."""
        return self._writer

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a transaction that only reads. Raises Unavailable while the database is away."""
        with _reachable(), Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction and commit it at the end. Raises Unavailable while the database is away."""
        with _reachable(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close every connection."""
        self._writer.dispose()
        self._reader.dispose()


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise Unavailable("The database does not answer. Try again in a moment.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("The database connection was lost. Try again in a moment.") from error
        raise


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Say whether this SQLite has the fix of the WAL-reset bug."""
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
        connection.isolation_level = None  # the driver begins nothing by itself
        for pragma in (f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgresql_engine(url: URL) -> Engine:
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "options": "-c timezone=utc"},
    )
