"""One schedule from its seed to its end: a time with faults, then a time without.

In the second, all remaining work must finish within a time that follows from the lengths of leases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from settings import Settings
from simulator.broker import SimulatedBroker
from simulator.clients import Api, Client
from simulator.databases import InMemoryDatabase, ScheduleDatabase
from simulator.faults import Fault
from simulator.invariants import InvariantViolated, RunRow
from simulator.machine import Machine
from simulator.simulation import Simulation, Trace, logs_in_trace
from simulator.stand_ins import PageState
from simulator.virtual_threads import ThreadPool
from simulator.workers import WorkerPool

# Enough for three lost attempts in a row, after a full disk, with a GPU machine that never comes back.
_ENDS_WITHIN_S = 1500.0


@dataclass(frozen=True)
class Report:
    """Counts of what happened in a schedule, and the final states of its runs."""

    happened: Counter[Fault]
    simulated_s: float
    transactions: int
    waits: int
    runs: Counter[str]


class ScheduleFailed(Exception):
    """The schedule of this seed violated an invariant or raised an error."""

    def __init__(self, seed: int, broken: Exception) -> None:
        super().__init__(
            f"seed {seed}: {_sentence(broken)}. Repeat it with: python -m simulator.explore --seed {seed} --trace"
        )
        self.seed = seed


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, InvariantViolated) else f"{type(error).__name__}: {error}"


class Simulator:
    """Runs schedules one after the other, and reuses threads and database."""

    def __init__(self, database: ScheduleDatabase | None = None) -> None:
        self._database = database or InMemoryDatabase()
        self._pool = ThreadPool()
        self._settings = Settings()

    def run(self, seed: int, trace: Trace | None = None) -> Report:
        """Run the schedule of a seed. Raises ScheduleFailed."""
        simulation = Simulation(seed, self._database, self._pool, trace)
        with logs_in_trace(simulation):
            try:
                _Schedule(simulation, self._settings).run()
            except Exception as broken:
                raise ScheduleFailed(seed, broken) from broken
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
        """Release the threads and the database."""
        self._pool.close()
        self._database.close()


class _Schedule:
    def __init__(self, simulation: Simulation, settings: Settings) -> None:
        self._simulation = simulation
        self._chance = simulation.chance
        self._broker = SimulatedBroker(simulation)
        self._worker_pool = WorkerPool(simulation, self._broker)
        self._api = Api(simulation, self._broker, settings)
        self._clients = [
            Client(simulation, self._api, number) for number in range(1, self._chance.choice([1, 1, 1, 1, 2, 3]) + 1)
        ]

    def run(self) -> None:
        """Run clients and faults, then wait for the end and check it."""
        self._client_threads = [
            self._simulation.spawn(client.act, f"client {number}") for number, client in enumerate(self._clients, 1)
        ]
        self._inject_faults(self._chance.seconds(10.0, 100.0))
        if not self._is_over():
            self._simulation.log("no more faults from here on")
        self._chance.stop_faults()
        self._simulation.away_until = self._simulation.full_until = self._broker.away_until = 0.0
        calm_since = self._simulation.scheduler.now
        while not self._is_over():
            if self._simulation.scheduler.now - calm_since > _ENDS_WITHIN_S:
                self._simulation.invariants.check_end()
                raise InvariantViolated(f"not over after {_ENDS_WITHIN_S:g} s without faults")
            self._simulation.scheduler.wait(5.0)
        self._check_end()

    def _inject_faults(self, within_s: float) -> None:
        """Make machines, database and broker fail at random, until `within_s` or the end."""
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
            if self._worker_pool.workers and chance.strikes(Fault.JOIN):
                self._worker_pool.start_worker(chance.choice(self._worker_pool.workers).queues)
            if self._worker_pool.workers and chance.strikes(Fault.DRAIN):
                chance.choice(self._worker_pool.workers).drain()

    def _freeze(self, machine: Machine) -> None:
        machine.thread_group.frozen_until = self._simulation.scheduler.now + self._chance.seconds(5.0, 100.0)
        self._simulation.log(f"{machine.name} stands still until {machine.thread_group.frozen_until:.3f}")

    def _machines(self) -> list[Machine]:
        return [self._api.machine, *(worker.machine for worker in self._worker_pool.workers)]

    def _is_over(self) -> bool:
        invariants = self._simulation.invariants
        are_clients_active = any(not task.ended.is_set() for task in self._client_threads)
        return (
            not are_clients_active
            and invariants.is_quiet()
            and not (self._worker_pool.tracks and invariants.snapshot.outbox)
        )

    def _check_end(self) -> None:
        invariants, mlflow = self._simulation.invariants, self._simulation.mlflow
        invariants.check_end()
        requested = sum(client.runs_requested for client in self._clients)
        if len(invariants.snapshot.runs) != requested:
            raise InvariantViolated(f"{requested} runs were requested and there are {len(invariants.snapshot.runs)}")
        if self._worker_pool.tracks:
            for run_id, run in invariants.snapshot.runs.items():
                _check_mlflow(run_id, run, mlflow.page_states.get(run_id, PageState()))


def _check_mlflow(run_id: str, run: RunRow, state: PageState) -> None:
    """Check that MLflow shows the end of a run, unless it never heard of it or a worker without a lease wrote to it."""
    if state.is_doubtful or (not state.is_started and run.state == "cancelled"):
        return
    if (state.is_started, state.state) != (True, run.state):
        raise InvariantViolated(f"MLflow shows {state.state} of a run that is {run.state}: {run_id}")
    if run.state == "succeeded" and state.folds != set(range(run.folds)):
        raise InvariantViolated(f"MLflow shows folds {sorted(state.folds)} of {run.folds}: {run_id}")
