"""Databases that schedules run on: empty but for one data set that is ready, and soon empty again."""

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
    """A database that one schedule after the other runs on."""

    engine: Engine
    dataset_id: str

    def start_schedule(self, scheduler: Scheduler, chance: Chance) -> None:
        """Make it as it was at first, for a schedule."""

    def end_schedule(self) -> None:
        """Hear that the schedule is over."""

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        """Read what is committed."""

    def close(self) -> None:
        """Drop it."""


class InMemoryDatabase:
    """SQLite in memory, with one connection: a transaction is over before the next one begins."""

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
        """Need no telling."""

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        found: list[Sequence[Any]] = self._connection.execute(statement).fetchall()
        return found

    def close(self) -> None:
        self.engine.dispose()


class EngineDatabase(Database):
    """A database whose engine is there already."""

    def __init__(self, engine: Engine) -> None:
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writer = self._reader = engine


def prepare(engine: Engine) -> str:
    """Make the schema and a data set that is ready; return its id."""
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
