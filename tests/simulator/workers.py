"""The workers of a schedule: real runners, sweepers and dispatchers on machines that crash and freeze."""

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

# Proportions as in `settings`, but with fewer sweeps per lease, since each costs a transaction.
TIMINGS = Timings(look_every_s=12.0, renew_every_s=10.0, lease_s=40.0, let_go_s=30.0, cancel_every_s=6.0, stall_s=60.0)

LIVE_S = 3 * TIMINGS.look_every_s

_DRAIN_S = 25.0
_TRAINING = TrainingSettings("", "", 0, ImageLimits(), 1, WeightsSource("", "", 1.0, 1.0), 1.0)


class WorkerPool:
    """All workers. As a supervisor would, it replaces workers that crash or are drained."""

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
            self.start_worker(queues)

    def start_worker(self, queues: Sequence[Queue]) -> None:
        """Start a worker that serves these queues."""
        self._numbers += 1
        worker = SimulatedWorker(self, f"worker {self._numbers}", queues)
        self.workers.append(worker)
        worker.start()

    def replace_later(self, gone: SimulatedWorker) -> None:
        """Replace a worker that is gone after some time; a machine with a GPU may never come back."""
        if gone not in self.workers:
            return
        self.workers.remove(gone)
        if Queue.GPU in gone.queues and self.simulation.chance.happens(0.3):
            return

        def start_worker() -> None:
            self.simulation.scheduler.wait(self.simulation.chance.seconds(0.0, 40.0))
            self.start_worker(gone.queues)

        self.simulation.spawn(start_worker, "supervisor")


class SimulatedWorker:
    """The parts that `worker.app` runs in a process, and a thread that fetches messages as Celery does."""

    def __init__(self, pool: WorkerPool, name: str, queues: Sequence[Queue]) -> None:
        simulation = pool.simulation
        self.queues = queues
        self.machine = machine = Machine(simulation, name, Fault.CRASH, lambda: pool.replace_later(self))
        self._pool = pool
        train = Train(simulation.store, _TRAINING, lambda environment: TrainingChild(machine, simulation.store))
        compare = Compare(simulation.store, 1, partial(ComparingChild, machine, simulation.store))
        pages = simulation.mlflow.pages(machine, simulation.is_held)
        handlers = {
            **dict.fromkeys((JobKind.TRAIN, JobKind.FOLD, JobKind.FINAL), train),
            JobKind.COMPARE: compare,
            JobKind.PUBLISH: Publish(simulation.store, TrackingSettings("", 1.0, ""), pages),
        }
        clock, database = machine.clock, machine.database
        self._dispatcher = ThreadDispatcher(database, pool.broker, LIVE_S, clock)
        self._runner = TrackedRunner(
            simulation, database, queues, handlers, name, TIMINGS, clock, self._dispatcher.request
        )
        self._sweeper = Sweeper(database, queues, handlers, name, TIMINGS, clock, self._after_sweep)
        self._draining, self._is_idle = clock.flag(), clock.flag()

    def start(self) -> None:
        """Start the threads of the worker."""
        self._dispatcher.start()
        self._sweeper.start()
        self.machine.thread(self._consume, "pool").start()

    def drain(self) -> None:
        """Give the current job back, accept no more, and end; the process is killed if that takes too long."""
        self._pool.replace_later(self)
        self.machine.thread(self._end, "main").start()

    def _consume(self) -> None:
        while not self._draining.is_set():
            job_id = self._pool.broker.fetch(self.queues)
            if job_id is None:
                continue
            try:
                self._runner.run(job_id)
            except (JobFailed, Unavailable, DiskFull) as error:
                self._pool.simulation.log(f"{self.machine.name}: task failed: {error}")
        self._is_idle.set()

    def _end(self) -> None:
        self._draining.set()
        self._runner.drain()
        self._is_idle.wait(_DRAIN_S)
        self._sweeper.stop()
        self._pool.simulation.log(f"{self.machine.name} ends")
        self._pool.simulation.scheduler.kill(self.machine.thread_group)

    def _after_sweep(self) -> None:
        self._runner.stop_idle_child(2 * TIMINGS.look_every_s)
        self._dispatcher.request()


class TrackedRunner(JobRunner):
    """A runner that tells the simulation which lease each of its threads holds."""

    def __init__(self, simulation: Simulation, *given: Any) -> None:
        super().__init__(*given)
        self._simulation = simulation

    def run_claimed(self, work: Work) -> Outcome:
        task, leases = self._simulation.scheduler.current, self._simulation.leases
        holders = [other for other in task.thread_group.threads if other.parent is task]
        leases |= dict.fromkeys([task, *holders], work.lease)
        try:
            return super().run_claimed(work)
        finally:
            del leases[task]
