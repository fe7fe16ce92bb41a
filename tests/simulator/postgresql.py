"""PostgreSQL for schedules: transactions overlap, and a statement that needs a locked row really waits for it.

Other threads may run between any two statements. The server decides which statement waits for which, and which one it
aborts in a deadlock; everything else follows from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url

from models.base import Base
from simulator.databases import prepare
from simulator.faults import Chance
from simulator.virtual_threads import Scheduler

# A deadlock costs real time until the server detects it; data of tests need not be synced to disk.
_OPTIONS = "-c timezone=utc -c synchronous_commit=off -c deadlock_timeout=20ms"
_CONNECTIONS = 50
# Parts of a SELECT that can make it wait for locks.
_LOCKS = ("FOR UPDATE", "FOR NO KEY UPDATE", "advisory")
# Tables with the data set that every schedule starts with, and rows that migrations wrote.
_KEPT = {"dataset", "dataset_version", "image", "membership", "project", "registry_revision"}


class PostgresqlDatabase:
    """An empty database on a PostgreSQL server; its user needs superuser rights to set `deadlock_timeout`."""

    def __init__(self, url: str | URL) -> None:
        address = make_url(url).set(drivername="postgresql+psycopg")
        self.engine = _engine(address)
        self.dataset_id = prepare(self.engine)
        self._watching = psycopg.connect(
            address.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
        )
        self._scheduler: Scheduler | None = None
        self._chance: Chance | None = None
        for name in ("do_execute", "do_executemany"):
            event.listen(self.engine, name, self._listener(name), retval=True)

    def start_schedule(self, scheduler: Scheduler, chance: Chance) -> None:
        emptied = ", ".join(f'"{name}"' for name in sorted(Base.metadata.tables.keys() - _KEPT))
        self._watching.execute(f"TRUNCATE {emptied}")
        self._scheduler, self._chance = scheduler, chance

    def end_schedule(self) -> None:
        self._scheduler = None

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        return self._watching.execute(statement).fetchall()

    def close(self) -> None:
        self._watching.close()
        self.engine.dispose()

    def _listener(self, name: str) -> Callable[..., bool]:
        how = {"do_execute": "execute", "do_executemany": "executemany"}[name]

        def act(cursor: Any, statement: str, parameters: Any, context: object) -> bool:
            if self._scheduler is None or self._chance is None:
                return False
            if self._chance.happens(0.5):
                self._scheduler.wait(self._chance.seconds(0.0, 2.0 if self._chance.happens(0.15) else 0.05))
            call = Statement(self._watching, cursor.connection, lambda: getattr(cursor, how)(statement, parameters))
            if _may_wait(statement):
                self._scheduler.run_blocking(call)
            else:
                call.make()
            return True

        return act


class Statement:
    """A statement that the server executes; `number` is the process id of its server process."""

    def __init__(self, watching: Any, connection: Any, make: Callable[[], object]) -> None:
        self.number = int(connection.info.backend_pid)
        self._watching = watching
        self._make = make

    def make(self) -> None:
        self._make()

    def blockers(self) -> set[int]:
        return set(self._watching.execute("SELECT pg_blocking_pids(%s)", [self.number]).fetchone()[0])

    def give_up(self) -> None:
        self._watching.execute("SELECT pg_terminate_backend(%s)", [self.number])


def _may_wait(statement: str) -> bool:
    return not statement.startswith("SELECT") or any(lock in statement for lock in _LOCKS)


def _engine(address: URL) -> Engine:
    return create_engine(address, pool_size=_CONNECTIONS, connect_args={"options": _OPTIONS})
