"""A computer of the simulated world: clocks of its own, tasks, and a connection to the database that may be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from clock import Clock
from errors import DiskFull, Unavailable
from models.base import wall_clock
from models.session import Database
from simulator.faults import Fault, Luck
from simulator.virtual_threads import Baton, Flag, Power, Task

_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)

# How long one thread may stand still while others go on: longer than a lease.
_SLOW_S = 60.0


class Surroundings(Protocol):
    """What a machine has around it."""

    baton: Baton
    luck: Luck
    engine: Engine
    away_until: float
    full_until: float
    names: set[str]

    def power(self) -> Power:
        """Return what the tasks of a new machine have in common."""

    def say(self, text: str) -> None:
        """Put a line into the trace."""

    def judge(self, is_committed: bool) -> None:
        """Judge what the present task has just committed, or that it committed nothing. Raises Gone."""


class Machine:
    """A computer; `crash` is the fault that ends it, `on_crash` what happens then."""

    def __init__(self, world: Surroundings, name: str, crash: Fault, on_crash: Callable[[], None]) -> None:
        self.world = world
        self.name = name
        self.power = world.power()
        self.cut_off_until = 0.0
        # A monotonic clock starts anywhere.
        self.ahead_s = world.luck.seconds(0.0, 1e6)
        self.wall_off_s = 0.0
        self.clock = Clock(self.monotonic, self.sleep, lambda: Flag(world.baton), self.thread)
        self.database = CutDatabase(self)
        self._crash = crash
        self._on_crash = on_crash

    def monotonic(self) -> float:
        """Return the seconds of its monotonic clock."""
        return self.world.baton.now + self.ahead_s

    def wall(self) -> datetime:
        """Return what its calendar says."""
        return _BEGINNING + timedelta(seconds=self.world.baton.now + self.wall_off_s)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.world.baton.wait(seconds)

    def thread(self, run: Callable[[], None], name: str) -> Task:
        """Return a thread of this machine."""

        def work() -> None:
            wall_clock.set(self.wall)
            run()

        return Task(self.world.baton, work, f"{self.name} {name}", self.power)

    def step(self) -> None:
        """Let others act, for a moment or longer: nothing else says when a thread runs."""
        luck = self.world.luck
        if luck.strikes(Fault.SLOW):
            self.sleep(luck.seconds(1.0, _SLOW_S))
        else:
            self.sleep(luck.seconds(0.0, 1.0 if luck.is_so(0.2) else 0.02))

    def may_crash(self) -> None:
        """Die here, perhaps."""
        if self.world.luck.strikes(self._crash):
            self.crash()

    def crash(self) -> None:
        """Die here and now."""
        self.world.say(f"{self.name} dies")
        self._on_crash()
        self.world.baton.kill(self.power)


class CutDatabase(Database):
    """The database as one machine sees it: away, cut off, or written without an answer. Its engines are given."""

    def __init__(self, machine: Machine) -> None:
        self.is_sqlite = machine.world.engine.dialect.name == "sqlite"
        self._writer = self._reader = machine.world.engine
        self._machine = machine
        self._world = machine.world

    @contextmanager
    def reading(self) -> Iterator[Session]:
        self._reach()
        with super().reading() as session:
            yield session
        if self._world.luck.strikes(Fault.CUT_READING):
            raise self._cut("while reading")

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        self._reach()
        try:
            with super()._transaction() as session:
                yield session
                self._machine.may_crash()
                if self._world.baton.now < self._world.full_until:
                    raise DiskFull("The database has no room.")
                if self._world.luck.strikes(Fault.CUT_BEFORE):
                    raise self._cut("before COMMIT")
        except BaseException:
            self._world.judge(is_committed=False)
            raise
        self._world.judge(is_committed=True)
        self._machine.may_crash()
        self._machine.step()
        if self._world.luck.strikes(Fault.CUT_AFTER):
            raise self._cut("after COMMIT")

    @contextmanager
    def exclusive(self, name: str) -> Iterator[bool]:
        names = self._world.names
        is_held = name not in names
        names.add(name)
        try:
            yield is_held
        finally:
            if is_held:
                names.remove(name)

    def _reach(self) -> None:
        """Get there, or find out that it cannot be reached."""
        self._machine.step()
        if self._world.baton.now < max(self._world.away_until, self._machine.cut_off_until):
            self._machine.sleep(self._world.luck.seconds(0.0, 5.0))
            raise self._cut("before BEGIN")

    def _cut(self, when: str) -> Unavailable:
        self._world.say(f"{self._world.baton.current.name}: no connection {when}")
        return Unavailable(f"The connection was cut {when}.")
