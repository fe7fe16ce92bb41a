"""The workers of a schedule: the real loops and sweepers, on machines that die, freeze and come back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from artifacts.images import ImageLimits
from models.job import JobKind, Queue
from simulator.faults import Fault
from simulator.machine import Machine
from simulator.simulation import Simulation
from simulator.stand_ins import ComparingChild, TrainingChild
from worker.handlers.compare import Compare
from worker.handlers.tracking import Publish, TrackingPlace
from worker.handlers.train import Train, TrainingPlace
from worker.lease import Timings, Work
from worker.loop import Loop
from worker.messages import WeightsSource
from worker.sweeper import Sweeper

# In the proportions of `settings`, with fewer looks to the length of a lease: each is a transaction.
TIMINGS = Timings(look_every_s=12.0, renew_every_s=10.0, lease_s=40.0, let_go_s=30.0, cancel_every_s=6.0, stall_s=60.0)

_DRAIN_S = 25.0
_PLACE = TrainingPlace("", "", 0, ImageLimits(), 1, WeightsSource("", "", 1.0, 1.0), 1.0)


class Crew:
    """All workers; those that die or are drained are followed by others, as supervisors see to."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
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

    def hear(self, queue: Queue, is_for_all: bool) -> None:
        """Wake a worker that serves a queue, or all of them."""
        serving = [worker for worker in self.workers if queue in worker.queues]
        for worker in serving if is_for_all else [self.simulation.chance.choice(serving)] if serving else []:
            worker.wake()


class SimulatedWorker:
    """The real loops and sweeper of a worker process, as `worker.app` has them."""

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
            JobKind.PUBLISH: Publish(simulation.store, TrackingPlace("", 1.0, ""), pages),
        }
        self._loops = [
            WatchedLoop(simulation, machine.database, queue, handlers, name, TIMINGS, machine.clock) for queue in queues
        ]
        self._sweeper = Sweeper(machine.database, queues, handlers, name, TIMINGS, machine.clock)

    def start(self) -> None:
        """Begin to work."""
        for loop in self._loops:
            loop.start()
        self._sweeper.start()

    def wake(self) -> None:
        """Look for work now."""
        for loop in self._loops:
            loop.ring()

    def drain(self) -> None:
        """Give the present jobs back, take no more, and end; killed if that takes too long."""
        self._crew.hire_later(self)
        self.machine.thread(self._end, "main").start()

    def _end(self) -> None:
        clock = self.machine.clock
        for loop in self._loops:
            loop.drain()
        until = clock.now() + _DRAIN_S
        for loop in self._loops:
            loop.join(max(0.0, until - clock.now()))
        self._sweeper.stop()
        self._crew.simulation.log(f"{self.machine.name} ends")
        self._crew.simulation.scheduler.kill(self.machine.thread_group)


class WatchedLoop(Loop):
    """A loop of which the world knows under which lease it works."""

    def __init__(self, simulation: Simulation, *given: Any) -> None:
        super().__init__(*given)
        self._simulation = simulation

    def see_through(self, work: Work) -> None:
        task, leases = self._simulation.scheduler.current, self._simulation.leases
        holders = [other for other in task.thread_group.threads if other.parent is task]
        leases |= dict.fromkeys([task, *holders], work.lease)
        try:
            super().see_through(work)
        finally:
            del leases[task]
