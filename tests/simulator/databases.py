"""Databases for schedules: each schedule starts with only one ready data set in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event

from artifacts.store import digest_of
from models import dataset as datasets
from models.project import Principal
from models.session import Database
from ops.migrate import upgrade
from recipes.defaults import ClassCount
from recipes.recipe import Task
from simulator.faults import Chance
from simulator.virtual_threads import Scheduler


class ScheduleDatabase(Protocol):
    """A database that schedules use one after the other."""

    engine: Engine
    dataset_id: str

    def start_schedule(self, scheduler: Scheduler, chance: Chance) -> None:
        """Reset the content for the next schedule, whose threads and randomness are these."""

    def end_schedule(self) -> None:
        """Stop using the scheduler of the schedule that has ended."""

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        """Run a statement that reads committed rows."""

    def close(self) -> None:
        """Close all connections."""


class InMemoryDatabase:
    """SQLite in memory with one connection: transactions run strictly one after the other."""

    def __init__(self) -> None:
        self.engine = _engine()
        self.dataset_id = prepare(self.engine)
        connection = self.engine.raw_connection().driver_connection
        assert isinstance(connection, sqlite3.Connection)
        self._connection = connection
        self._empty = connection.serialize()

    def start_schedule(self, scheduler: Scheduler, chance: Chance) -> None:
        self._connection.deserialize(self._empty)

    def end_schedule(self) -> None:
        """Do nothing: this database does not use the scheduler."""

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        found: list[Sequence[Any]] = self._connection.execute(statement).fetchall()
        return found

    def close(self) -> None:
        self.engine.dispose()


class EngineDatabase(Database):
    """A `Database` on an existing engine."""

    def __init__(self, engine: Engine) -> None:
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writer = self._reader = engine


def prepare(engine: Engine) -> str:
    """Create the schema and a ready data set; return the id of the data set."""
    database = EngineDatabase(engine)
    upgrade(database)
    with database.writing() as session:
        dataset = datasets.create_dataset(session, Principal(), "flowers")
        version = datasets.add_version(session, dataset, digest_of(b"archive"))
        datasets.start_ingest(session, version.id)
        datasets.mark_ready(
            session,
            version.id,
            manifest=digest_of(b"manifest"),
            task=Task.BINARY,
            images=20,
            duplicates=0,
            ignored=0,
            classes=[ClassCount("daisy", 10, 10), ClassCount("rose", 10, 10)],
            target=None,
            refused=[],
        )
        return dataset.id


def _engine() -> Engine:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
