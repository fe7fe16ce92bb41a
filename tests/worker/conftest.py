"""What the worker's tests share: loops that end with their test, and databases that go away for a while."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from working import QUICK, Outage, StartLoop

from models.job import JobKind, Queue
from models.session import Database
from ops.migrate import upgrade
from worker.loop import Handler, Loop, Timings


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite database, for what does not depend on the kind."""
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    upgrade(database)
    yield database
    database.close()


@pytest.fixture
def impatient(database: Database) -> Iterator[Database]:
    """The same database through connections that notice quickly when it is away."""
    hasty = Database(database.engine.url, busy_timeout_s=0.05)
    yield hasty
    hasty.close()


@pytest.fixture
def outage(database: Database) -> Iterator[Outage]:
    """What takes the database away."""
    outage = Outage(database)
    yield outage
    outage.end()


@pytest.fixture
def start_loop() -> Iterator[StartLoop]:
    """Start loops that are drained at the end of the test."""
    loops: list[Loop] = []

    def start(
        database: Database,
        handler: Handler,
        *,
        kind: JobKind = JobKind.TRAIN,
        queue: Queue = Queue.CPU,
        timings: Timings = QUICK,
        worker: str = "here",
    ) -> Loop:
        loop = Loop(database, queue, {kind: handler}, worker, timings)
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.drain()
    for loop in loops:
        loop.join(20)
