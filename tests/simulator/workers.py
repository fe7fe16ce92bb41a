"""The workers of a schedule: real runners, sweepers and dispatchers, on machines that die, freeze and come back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from artifacts.images import ImageLimits
from dispatch import ThreadDispatcher
from errors import DiskFull, Unavailable
from models.job import JobKind, Queue
from simulator.broker import SimulatedBroker
from simulator.faults import Fault
from simulator.machine import Machine
from simulator.simulation import Simulation
from simulator.stand_ins import ComparingChild, TrainingChild
from worker.handlers.compare import Compare
from worker.handlers.tracking import Publish, TrackingSettings
from worker.handlers.train import Train, TrainingSettings
from worker.job_runner import JobFailed, JobRunner, Outcome
from worker.lease import Timings, Work
from worker.messages import WeightsSource
from worker.sweeper import Sweeper

# In the proportions of `settings`, with fewer looks to the length of a lease: each is a transaction.
TIMINGS = Timings(look_every_s=12.0, renew_every_s=10.0, lease_s=40.0, let_go_s=30.0, cancel_every_s=6.0, stall_s=60.0)

LIVE_S = 3 * TIMINGS.look_every_s

_DRAIN_S = 25.0
_PLACE = TrainingSettings("", "", 0, ImageLimits(), 1, WeightsSource("", "", 1.0, 1.0), 1.0)


class Crew:
    """All workers; those that die or are drained are followed by others, as supervisors see to."""

    def __init__(self, simulation: Simulation, broker: SimulatedBroker) -> None:
        self.simulation = simulation
        self.broker = broker
        self.workers: list[SimulatedWorker] = []
        self._numbers = 0
        chance = simulation.chance
        self.tracks = chance.happens(0.25)
        main = [Queue.CPU, Queue.TRACKING] if self.tracks else [Queue.CPU]
        others = [chance.choice([[Queue.CPU], [Queue.CPU], [Queue.GPU]]) for _ in range(chance.choice([0, 1, 1, 2]))]
        for queues in [main, *others]:
            self.hire(queues)

    def hire(self, queues: Sequence[Queue]) -> None:
        """Start a worker."""
        self._numbers += 1
        worker = SimulatedWorker(self, f"worker {self._numbers}", queues)
        self.workers.append(worker)
        worker.start()

    def hire_later(self, gone: SimulatedWorker) -> None:
        """Start a worker in place of one that is gone, after a while; a machine with a GPU may be gone for good."""
        if gone not in self.workers:
            return
        self.workers.remove(gone)
        if Queue.GPU in gone.queues and self.simulation.chance.happens(0.3):
            return

        def hire() -> None:
            self.simulation.scheduler.wait(self.simulation.chance.seconds(0.0, 40.0))
            self.hire(gone.queues)

        self.simulation.spawn(hire, "supervisor")


class SimulatedWorker:
    """What `worker.app` has in a process, and a thread that fetches messages as Celery does."""

    def __init__(self, crew: Crew, name: str, queues: Sequence[Queue]) -> None:
        simulation = crew.simulation
        self.queues = queues
        self.machine = machine = Machine(simulation, name, Fault.CRASH, lambda: crew.hire_later(self))
        self._crew = crew
        train = Train(simulation.store, _PLACE, lambda environment: TrainingChild(machine, simulation.store))
        compare = Compare(simulation.store, 1, partial(ComparingChild, machine, simulation.store))
        pages = simulation.mlflow.pages(machine, simulation.is_held)
        handlers = {
            **dict.fromkeys((JobKind.TRAIN, JobKind.FOLD, JobKind.FINAL), train),
            JobKind.COMPARE: compare,
            JobKind.PUBLISH: Publish(simulation.store, TrackingSettings("", 1.0, ""), pages),
        }
        clock, database = machine.clock, machine.database
        self._dispatcher = ThreadDispatcher(database, crew.broker, LIVE_S, clock)
        self._runner = WatchedRunner(
            simulation, database, queues, handlers, name, TIMINGS, clock, self._dispatcher.request
        )
        self._sweeper = Sweeper(database, queues, handlers, name, TIMINGS, clock, self._after_sweep)
        self._draining, self._is_idle = clock.flag(), clock.flag()

    def start(self) -> None:
        """Begin to work."""
        self._dispatcher.start()
        self._sweeper.start()
        self.machine.thread(self._consume, "pool").start()

    def drain(self) -> None:
        """Give the present job back, take no more, and end; killed if that takes too long."""
        self._crew.hire_later(self)
        self.machine.thread(self._end, "main").start()

    def _consume(self) -> None:
        while not self._draining.is_set():
            job_id = self._crew.broker.fetch(self.queues)
            if job_id is None:
                continue
            try:
                self._runner.run(job_id)
            except (JobFailed, Unavailable, DiskFull) as error:
                self._crew.simulation.log(f"{self.machine.name}: task failed: {error}")
        self._is_idle.set()

    def _end(self) -> None:
        self._draining.set()
        self._runner.drain()
        self._is_idle.wait(_DRAIN_S)
        self._sweeper.stop()
        self._crew.simulation.log(f"{self.machine.name} ends")
        self._crew.simulation.scheduler.kill(self.machine.thread_group)

    def _after_sweep(self) -> None:
        self._runner.stop_idle_child(2 * TIMINGS.look_every_s)
        self._dispatcher.request()


class WatchedRunner(JobRunner):
    """A runner of which the simulation knows under which lease it works."""

    def __init__(self, simulation: Simulation, *given: Any) -> None:
        super().__init__(*given)
        self._simulation = simulation

    def see_through(self, work: Work) -> Outcome:
        task, leases = self._simulation.scheduler.current, self._simulation.leases
        holders = [other for other in task.thread_group.threads if other.parent is task]
        leases |= dict.fromkeys([task, *holders], work.lease)
        try:
            return super().see_through(work)
        finally:
            del leases[task]
