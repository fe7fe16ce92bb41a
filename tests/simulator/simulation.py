"""State shared by all parts of a schedule: time, randomness, one database, the invariants and a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog

from artifacts.store import Digest
from models.job import Lease
from simulator.databases import ScheduleDatabase
from simulator.faults import Chance
from simulator.invariants import Invariants, InvariantViolated, Writer
from simulator.stand_ins import MemoryStore, Mlflow
from simulator.virtual_threads import MachineKilled, Scheduler, ThreadGroup, ThreadPool, VirtualThread

Trace = Callable[[str], None]


class Simulation:
    """One simulated course of events, determined by its seed."""

    def __init__(self, seed: int, database: ScheduleDatabase, pool: ThreadPool, trace: Trace | None = None) -> None:
        self.chance = Chance(seed)
        self.scheduler = Scheduler(pool)
        self.database = database
        self.engine = database.engine
        database.start_schedule(self.scheduler, self.chance)
        self.store = MemoryStore()
        self.mlflow = Mlflow()
        self.invariants = Invariants(database.query, lambda digest: self.store.has(Digest(digest)))
        self.away_until = 0.0
        self.full_until = 0.0
        self.transactions = 0
        self.held_names: set[str] = set()
        self.thread_groups: list[ThreadGroup] = []
        self._unattached = self.new_thread_group()
        # The lease that a thread works under, and the run or comparison that its request cancels.
        self.leases: dict[VirtualThread, Lease] = {}
        self.cancels: dict[VirtualThread, str] = {}
        self._trace = trace

    def new_thread_group(self) -> ThreadGroup:
        """Return an empty thread group for a new machine."""
        self.thread_groups.append(ThreadGroup())
        return self.thread_groups[-1]

    def spawn(self, run: Callable[[], None], name: str) -> VirtualThread:
        """Start a thread that belongs to no machine, so that nothing kills it before the end."""
        thread = VirtualThread(self.scheduler, run, name, self._unattached)
        thread.start()
        return thread

    def log(self, text: str) -> None:
        """Write a line with the simulated time to the trace."""
        if self._trace is not None:
            self._trace(f"{self.scheduler.now:9.3f}  {text}")

    def check_invariants(self, is_committed: bool) -> None:
        """Check the invariants after the running thread has committed or rolled back.

        Raises MachineKilled if one is violated, which also ends the schedule.
        """
        try:
            self.transactions += 1
            if is_committed:
                writer = self._writer()
                for change in self.invariants.check(writer):
                    self.log(f"{writer.name}: {change}")
            else:
                self.invariants.check_files()
        except InvariantViolated as broken:
            self.abort(broken)

    def abort(self, error: BaseException) -> NoReturn:
        """End the schedule with an error in its main thread. Raises MachineKilled."""
        self.scheduler.fail(error)
        raise MachineKilled

    def is_held(self) -> bool:
        """Return whether the lease of the running thread is still valid."""
        lease = self.leases[self.scheduler.current]
        job = self.invariants.snapshot.jobs[lease.job_id]
        return job.state == "running" and job.epoch == lease.epoch

    def close(self) -> None:
        """Kill all threads and release the database."""
        for group in self.thread_groups:
            self.scheduler.kill(group)
        while any(group.threads for group in self.thread_groups):
            self.scheduler.wait(0.0)
        self.database.end_schedule()

    def _writer(self) -> Writer:
        thread = self.scheduler.current
        return Writer(thread.name, self.leases.get(thread), cancels=self.cancels.get(thread))


@contextmanager
def logs_in_trace(simulation: Simulation) -> Iterator[None]:
    """Write log lines of the code under test to the trace in a block; a logged exception fails the schedule."""

    def hear(logger: Any, method: str, event: Any) -> NoReturn:
        fields = {name: value for name, value in event.items() if name not in ("event", "exc_info")}
        simulation.log(f"{simulation.scheduler.current.name}: {event['event']} {fields or ''}")
        if event.get("exc_info"):
            broken = InvariantViolated(f"an unexpected exception was logged: {event['event']}: {sys.exception()!r}")
            broken.__cause__ = sys.exception()
            simulation.scheduler.fail(broken)
        raise structlog.DropEvent

    processors = structlog.get_config()["processors"]
    before = processors.copy()
    processors[:] = [hear]
    try:
        yield
    finally:
        processors[:] = before
