"""What everything in a schedule shares: time, chance, one database, the laws, and a trace. Starts nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog

from artifacts.store import Digest
from models.job import Lease
from simulator.databases import Ground
from simulator.faults import Luck
from simulator.invariants import Broken, Laws, Writer
from simulator.stand_ins import MemoryStore, Mlflow
from simulator.virtual_threads import Baton, Gone, Hands, Power, Task

Trace = Callable[[str], None]


class World:
    """One course of events, decided by its seed."""

    def __init__(self, seed: int, ground: Ground, hands: Hands, trace: Trace | None = None) -> None:
        self.luck = Luck(seed)
        self.baton = Baton(hands)
        self.ground = ground
        self.engine = ground.engine
        ground.begin(self.baton, self.luck)
        self.store = MemoryStore()
        self.mlflow = Mlflow()
        self.laws = Laws(ground.query, lambda digest: self.store.has(Digest(digest)))
        self.away_until = 0.0
        self.full_until = 0.0
        self.transactions = 0
        self.names: set[str] = set()
        self.powers: list[Power] = []
        self._people = self.power()
        # What a task works under, and whom a person's request ends.
        self.leases: dict[Task, Lease] = {}
        self.cancels: dict[Task, str] = {}
        self._trace = trace

    def power(self) -> Power:
        """Return what the tasks of a new machine have in common."""
        self.powers.append(Power())
        return self.powers[-1]

    def people(self, run: Callable[[], None], name: str) -> Task:
        """Start something that is not on any machine, and so lives on."""
        task = Task(self.baton, run, name, self._people)
        task.start()
        return task

    def say(self, text: str) -> None:
        """Put a line into the trace."""
        if self._trace is not None:
            self._trace(f"{self.baton.now:9.3f}  {text}")

    def judge(self, is_committed: bool) -> None:
        """Judge what the present task has just committed, or that it committed nothing. Raises Gone if a law broke."""
        try:
            self.transactions += 1
            if is_committed:
                writer = self._writer()
                for change in self.laws.judge(writer):
                    self.say(f"{writer.name}: {change}")
            else:
                self.laws.judge_files()
        except Broken as broken:
            self.break_off(broken)

    def break_off(self, error: BaseException) -> NoReturn:
        """End the schedule with an error."""
        self.baton.fail(error)
        raise Gone

    def is_held(self) -> bool:
        """Say whether the lease still holds under which the present task works."""
        lease = self.leases[self.baton.current]
        job = self.laws.seen.jobs[lease.job_id]
        return job.state == "running" and job.epoch == lease.epoch

    def close(self) -> None:
        """End every task."""
        for power in self.powers:
            self.baton.kill(power)
        while any(power.tasks for power in self.powers):
            self.baton.wait(0.0)
        self.ground.end()

    def _writer(self) -> Writer:
        task = self.baton.current
        return Writer(task.name, self.leases.get(task), cancels=self.cancels.get(task))


@contextmanager
def listening(world: World) -> Iterator[None]:
    """Put what the code logs into the trace while a block runs; an exception that is logged is one too many."""

    def hear(logger: Any, method: str, event: Any) -> NoReturn:
        fields = {name: value for name, value in event.items() if name not in ("event", "exc_info")}
        world.say(f"{world.baton.current.name}: {event['event']} {fields or ''}")
        if event.get("exc_info"):
            broken = Broken(f"an exception that nobody expects: {event['event']}: {sys.exception()!r}")
            broken.__cause__ = sys.exception()
            world.baton.fail(broken)
        raise structlog.DropEvent

    processors = structlog.get_config()["processors"]
    before = processors.copy()
    processors[:] = [hear]
    try:
        yield
    finally:
        processors[:] = before
