"""A simulated machine: its own clocks, threads, and a connection to the database that may fail."""

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
from simulator.faults import Chance, Fault
from simulator.virtual_threads import Scheduler, ThreadGroup, VirtualEvent, VirtualThread

_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)

# How long one thread may pause while others run: longer than a lease.
_SLOW_S = 60.0


class MachineEnvironment(Protocol):
    """What a machine needs of the simulation."""

    scheduler: Scheduler
    chance: Chance
    engine: Engine
    away_until: float
    full_until: float
    held_names: set[str]

    def new_thread_group(self) -> ThreadGroup:
        """Return an empty thread group for a new machine."""

    def log(self, text: str) -> None:
        """Write a line to the trace."""

    def check_invariants(self, is_committed: bool) -> None:
        """Check the invariants after the running thread has committed or rolled back. Raises MachineKilled."""


class Machine:
    """A machine; `crash` is the fault that kills it, and `on_crash` is called then."""

    def __init__(self, simulation: MachineEnvironment, name: str, crash: Fault, on_crash: Callable[[], None]) -> None:
        self.simulation = simulation
        self.name = name
        self.thread_group = simulation.new_thread_group()
        self.cut_off_until = 0.0
        # A monotonic clock starts anywhere.
        self.clock_offset_s = simulation.chance.seconds(0.0, 1e6)
        self.wall_offset_s = 0.0
        self.clock = Clock(self.monotonic, self.sleep, lambda: VirtualEvent(simulation.scheduler), self.thread)
        self.database = FaultyDatabase(self)
        self._crash = crash
        self._on_crash = on_crash

    def monotonic(self) -> float:
        """Return the seconds of this machine's monotonic clock."""
        return self.simulation.scheduler.now + self.clock_offset_s

    def wall(self) -> datetime:
        """Return the time of this machine's wall clock."""
        return _BEGINNING + timedelta(seconds=self.simulation.scheduler.now + self.wall_offset_s)

    def sleep(self, seconds: float) -> None:
        """Let simulated time pass and other threads run."""
        self.simulation.scheduler.wait(seconds)

    def thread(self, run: Callable[[], None], name: str) -> VirtualThread:
        """Return a new thread of this machine, not yet started."""

        def work() -> None:
            wall_clock.set(self.wall)
            run()

        return VirtualThread(self.simulation.scheduler, work, f"{self.name} {name}", self.thread_group)

    def step(self) -> None:
        """Let other threads run for a random time, so that threads interleave at every step."""
        chance = self.simulation.chance
        if chance.strikes(Fault.SLOW):
            self.sleep(chance.seconds(1.0, _SLOW_S))
        else:
            self.sleep(chance.seconds(0.0, 1.0 if chance.happens(0.2) else 0.02))

    def may_crash(self) -> None:
        """Kill this machine if its crash fault strikes now."""
        if self.simulation.chance.strikes(self._crash):
            self.crash()

    def crash(self) -> None:
        """Kill this machine and call `on_crash`. Raises MachineKilled in its own threads."""
        self.simulation.log(f"{self.name} dies")
        self._on_crash()
        self.simulation.scheduler.kill(self.thread_group)


class FaultyDatabase(Database):
    """The database as one machine sees it: it may be away, cut off, full, or lose the answer to a COMMIT."""

    def __init__(self, machine: Machine) -> None:
        self.is_sqlite = machine.simulation.engine.dialect.name == "sqlite"
        self._writer = self._reader = machine.simulation.engine
        self._machine = machine
        self._simulation = machine.simulation

    @contextmanager
    def reading(self) -> Iterator[Session]:
        self._reach()
        with super().reading() as session:
            yield session
        if self._simulation.chance.strikes(Fault.CUT_READING):
            raise self._cut("while reading")

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        self._reach()
        try:
            with super()._transaction() as session:
                yield session
                self._machine.may_crash()
                if self._simulation.scheduler.now < self._simulation.full_until:
                    raise DiskFull("The database has no room.")
                if self._simulation.chance.strikes(Fault.CUT_BEFORE):
                    raise self._cut("before COMMIT")
        except BaseException:
            self._simulation.check_invariants(is_committed=False)
            raise
        self._simulation.check_invariants(is_committed=True)
        self._machine.may_crash()
        self._machine.step()
        if self._simulation.chance.strikes(Fault.CUT_AFTER):
            raise self._cut("after COMMIT")

    @contextmanager
    def exclusive(self, name: str) -> Iterator[bool]:
        held_names = self._simulation.held_names
        is_held = name not in held_names
        held_names.add(name)
        try:
            yield is_held
        finally:
            if is_held:
                held_names.remove(name)

    def _reach(self) -> None:
        """Reach the database, or raise Unavailable while it is away or this machine is cut off."""
        self._machine.step()
        if self._simulation.scheduler.now < max(self._simulation.away_until, self._machine.cut_off_until):
            self._machine.sleep(self._simulation.chance.seconds(0.0, 5.0))
            raise self._cut("before BEGIN")

    def _cut(self, when: str) -> Unavailable:
        self._simulation.log(f"{self._simulation.scheduler.current.name}: no connection {when}")
        return Unavailable(f"The connection was cut {when}.")
