"""One schedule from its seed to its end: first things go wrong, then nothing does any more.

Whatever is still owed then must get done, and in a time that follows from the lengths of leases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from settings import Settings
from simulator.broker import SimulatedBroker
from simulator.clients import Api, Person
from simulator.databases import InMemoryDatabase, ScheduleDatabase
from simulator.faults import Fault
from simulator.invariants import InvariantViolated, RunRow
from simulator.machine import Machine
from simulator.simulation import Simulation, Trace, logs_in_trace
from simulator.stand_ins import Shown
from simulator.virtual_threads import ThreadPool
from simulator.workers import Crew

# Three attempts that are lost one after the other, a disk that was full and a machine with a GPU that never comes back.
_PATIENCE_S = 1500.0


@dataclass(frozen=True)
class Report:
    """What a schedule was like."""

    happened: Counter[Fault]
    simulated_s: float
    transactions: int
    waits: int
    runs: Counter[str]


class Failed(Exception):
    """A law broke under this seed."""

    def __init__(self, seed: int, broken: Exception) -> None:
        super().__init__(
            f"seed {seed}: {_sentence(broken)}. See it with: python -m simulator.explore --seed {seed} --trace"
        )
        self.seed = seed


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, InvariantViolated) else f"{type(error).__name__}: {error}"


class Simulator:
    """Runs schedules one after the other, on the same threads and the same database."""

    def __init__(self, database: ScheduleDatabase | None = None) -> None:
        self._database = database or InMemoryDatabase()
        self._pool = ThreadPool()
        self._settings = Settings()

    def run(self, seed: int, trace: Trace | None = None) -> Report:
        """Run one schedule. Raises Failed."""
        simulation = Simulation(seed, self._database, self._pool, trace)
        with logs_in_trace(simulation):
            try:
                _Schedule(simulation, self._settings).run()
            except Exception as broken:
                raise Failed(seed, broken) from broken
            finally:
                simulation.close()
        states = Counter(run.state for run in simulation.invariants.snapshot.runs.values())
        return Report(
            simulation.chance.happened,
            simulation.scheduler.now,
            simulation.transactions,
            simulation.scheduler.waits,
            states,
        )

    def close(self) -> None:
        """Let threads and database go."""
        self._pool.close()
        self._database.close()


class _Schedule:
    def __init__(self, simulation: Simulation, settings: Settings) -> None:
        self._simulation = simulation
        self._chance = simulation.chance
        self._broker = SimulatedBroker(simulation)
        self._crew = Crew(simulation, self._broker)
        self._api = Api(simulation, self._broker, settings)
        self._people = [
            Person(simulation, self._api, number) for number in range(1, self._chance.choice([1, 1, 1, 1, 2, 3]) + 1)
        ]

    def run(self) -> None:
        """Let everything happen."""
        self._acting = [
            self._simulation.spawn(person.act, f"person {number}") for number, person in enumerate(self._people, 1)
        ]
        self._go_wrong(self._chance.seconds(10.0, 100.0))
        if not self._is_over():
            self._simulation.log("from here on nothing goes wrong")
        self._chance.stop_faults()
        self._simulation.away_until = self._simulation.full_until = self._broker.away_until = 0.0
        calm_since = self._simulation.scheduler.now
        while not self._is_over():
            if self._simulation.scheduler.now - calm_since > _PATIENCE_S:
                self._simulation.invariants.check_end()
                raise InvariantViolated(f"not over after {_PATIENCE_S:g} s in which nothing went wrong")
            self._simulation.scheduler.wait(5.0)
        self._judge_end()

    def _go_wrong(self, within_s: float) -> None:
        """Let things happen to machines for a while."""
        chance, simulation = self._chance, self._simulation
        while simulation.scheduler.now < within_s and not self._is_over():
            simulation.scheduler.wait(chance.seconds(1.0, 15.0))
            if chance.strikes(Fault.FREEZE):
                self._freeze(chance.choice(self._machines()))
            if chance.strikes(Fault.OUTAGE):
                simulation.away_until = simulation.scheduler.now + chance.seconds(1.0, 60.0)
                simulation.log("the database is away")
            if chance.strikes(Fault.BROKER_AWAY):
                self._broker.away_until = simulation.scheduler.now + chance.seconds(1.0, 180.0)
                simulation.log("the broker is away")
            if chance.strikes(Fault.BROKER_EMPTIED):
                self._broker.lose_all()
                simulation.log("the broker lost its messages")
            if chance.strikes(Fault.DATABASE_FULL):
                simulation.full_until = simulation.scheduler.now + chance.seconds(1.0, 100.0)
                simulation.log("the database has no room")
            if chance.strikes(Fault.PARTITION):
                machine = chance.choice(self._machines())
                machine.cut_off_until = simulation.scheduler.now + chance.seconds(5.0, 100.0)
                simulation.log(f"{machine.name} is cut off")
            if chance.strikes(Fault.CLOCK_JUMP):
                chance.choice(self._machines()).clock_offset_s += 10.0 ** chance.seconds(0.0, 4.0)
            if chance.strikes(Fault.WALL_JUMP):
                chance.choice(self._machines()).wall_offset_s += chance.seconds(-7200.0, 7200.0)
            if self._crew.workers and chance.strikes(Fault.JOIN):
                self._crew.hire(chance.choice(self._crew.workers).queues)
            if self._crew.workers and chance.strikes(Fault.DRAIN):
                chance.choice(self._crew.workers).drain()

    def _freeze(self, machine: Machine) -> None:
        machine.thread_group.frozen_until = self._simulation.scheduler.now + self._chance.seconds(5.0, 100.0)
        self._simulation.log(f"{machine.name} stands still until {machine.thread_group.frozen_until:.3f}")

    def _machines(self) -> list[Machine]:
        return [self._api.machine, *(worker.machine for worker in self._crew.workers)]

    def _is_over(self) -> bool:
        invariants = self._simulation.invariants
        is_acting = any(not task.ended.is_set() for task in self._acting)
        return not is_acting and invariants.is_quiet() and not (self._crew.tracks and invariants.snapshot.outbox)

    def _judge_end(self) -> None:
        invariants, mlflow = self._simulation.invariants, self._simulation.mlflow
        invariants.check_end()
        ordered = sum(person.orders for person in self._people)
        if len(invariants.snapshot.runs) != ordered:
            raise InvariantViolated(f"{ordered} runs were ordered and there are {len(invariants.snapshot.runs)}")
        if self._crew.tracks:
            for run_id, run in invariants.snapshot.runs.items():
                _judge_shown(run_id, run, mlflow.shown.get(run_id, Shown()))


def _judge_shown(run_id: str, run: RunRow, shown: Shown) -> None:
    """See that MLflow shows what became of a run, if it was told of it and by nobody who had lost his lease."""
    if shown.is_doubtful or (not shown.is_started and run.state == "cancelled"):
        return
    if (shown.is_started, shown.state) != (True, run.state):
        raise InvariantViolated(f"MLflow shows {shown.state} of a run that is {run.state}: {run_id}")
    if run.state == "succeeded" and shown.folds != set(range(run.folds)):
        raise InvariantViolated(f"MLflow shows folds {sorted(shown.folds)} of {run.folds}: {run_id}")
