"""One schedule from its seed to its end: first things go wrong, then nothing does any more.

Whatever is still owed then must get done, and in a time that follows from the lengths of leases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from settings import Settings
from simulator.broker import SimulatedBroker
from simulator.clients import Api, Person
from simulator.databases import Ground, Memory
from simulator.faults import Fault
from simulator.invariants import Broken, RunRow
from simulator.machine import Machine
from simulator.stand_ins import Shown
from simulator.virtual_threads import Hands
from simulator.workers import Crew
from simulator.world import Trace, World, listening

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
    return str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"


class Simulator:
    """Runs schedules one after the other, on the same threads and the same database."""

    def __init__(self, ground: Ground | None = None) -> None:
        self._ground = ground or Memory()
        self._hands = Hands()
        self._settings = Settings()

    def run(self, seed: int, trace: Trace | None = None) -> Report:
        """Run one schedule. Raises Failed."""
        world = World(seed, self._ground, self._hands, trace)
        with listening(world):
            try:
                _Schedule(world, self._settings).run()
            except Exception as broken:
                raise Failed(seed, broken) from broken
            finally:
                world.close()
        states = Counter(run.state for run in world.laws.seen.runs.values())
        return Report(world.luck.happened, world.baton.now, world.transactions, world.baton.waits, states)

    def close(self) -> None:
        """Let threads and database go."""
        self._hands.close()
        self._ground.close()


class _Schedule:
    def __init__(self, world: World, settings: Settings) -> None:
        self._world = world
        self._luck = world.luck
        self._broker = SimulatedBroker(world)
        self._crew = Crew(world, self._broker)
        self._api = Api(world, self._broker, settings)
        self._people = [
            Person(world, self._api, number) for number in range(1, self._luck.one_of([1, 1, 1, 1, 2, 3]) + 1)
        ]

    def run(self) -> None:
        """Let everything happen."""
        self._acting = [
            self._world.people(person.act, f"person {number}") for number, person in enumerate(self._people, 1)
        ]
        self._go_wrong(self._luck.seconds(10.0, 100.0))
        if not self._is_over():
            self._world.say("from here on nothing goes wrong")
        self._luck.end()
        self._world.away_until = self._world.full_until = self._broker.away_until = 0.0
        calm_since = self._world.baton.now
        while not self._is_over():
            if self._world.baton.now - calm_since > _PATIENCE_S:
                self._world.laws.judge_end()
                raise Broken(f"not over after {_PATIENCE_S:g} s in which nothing went wrong")
            self._world.baton.wait(5.0)
        self._judge_end()

    def _go_wrong(self, within_s: float) -> None:
        """Let things happen to machines for a while."""
        luck, world = self._luck, self._world
        while world.baton.now < within_s and not self._is_over():
            world.baton.wait(luck.seconds(1.0, 15.0))
            if luck.strikes(Fault.FREEZE):
                self._freeze(luck.one_of(self._machines()))
            if luck.strikes(Fault.OUTAGE):
                world.away_until = world.baton.now + luck.seconds(1.0, 60.0)
                world.say("the database is away")
            if luck.strikes(Fault.BROKER_AWAY):
                self._broker.away_until = world.baton.now + luck.seconds(1.0, 180.0)
                world.say("the broker is away")
            if luck.strikes(Fault.BROKER_EMPTIED):
                self._broker.lose_all()
                world.say("the broker lost its messages")
            if luck.strikes(Fault.DATABASE_FULL):
                world.full_until = world.baton.now + luck.seconds(1.0, 100.0)
                world.say("the database has no room")
            if luck.strikes(Fault.PARTITION):
                machine = luck.one_of(self._machines())
                machine.cut_off_until = world.baton.now + luck.seconds(5.0, 100.0)
                world.say(f"{machine.name} is cut off")
            if luck.strikes(Fault.CLOCK_JUMP):
                luck.one_of(self._machines()).ahead_s += 10.0 ** luck.seconds(0.0, 4.0)
            if luck.strikes(Fault.WALL_JUMP):
                luck.one_of(self._machines()).wall_off_s += luck.seconds(-7200.0, 7200.0)
            if self._crew.workers and luck.strikes(Fault.JOIN):
                self._crew.hire(luck.one_of(self._crew.workers).queues)
            if self._crew.workers and luck.strikes(Fault.DRAIN):
                luck.one_of(self._crew.workers).drain()

    def _freeze(self, machine: Machine) -> None:
        machine.power.frozen_until = self._world.baton.now + self._luck.seconds(5.0, 100.0)
        self._world.say(f"{machine.name} stands still until {machine.power.frozen_until:.3f}")

    def _machines(self) -> list[Machine]:
        return [self._api.machine, *(worker.machine for worker in self._crew.workers)]

    def _is_over(self) -> bool:
        laws = self._world.laws
        is_acting = any(not task.ended.is_set() for task in self._acting)
        return not is_acting and laws.is_quiet() and not (self._crew.tracks and laws.seen.owed)

    def _judge_end(self) -> None:
        laws, mlflow = self._world.laws, self._world.mlflow
        laws.judge_end()
        ordered = sum(person.orders for person in self._people)
        if len(laws.seen.runs) != ordered:
            raise Broken(f"{ordered} runs were ordered and there are {len(laws.seen.runs)}")
        if self._crew.tracks:
            for run_id, run in laws.seen.runs.items():
                _judge_shown(run_id, run, mlflow.shown.get(run_id, Shown()))


def _judge_shown(run_id: str, run: RunRow, shown: Shown) -> None:
    """See that MLflow shows what became of a run, if it was told of it and by nobody who had lost his lease."""
    if shown.is_doubtful or (not shown.is_started and run.state == "cancelled"):
        return
    if (shown.is_started, shown.state) != (True, run.state):
        raise Broken(f"MLflow shows {shown.state} of a run that is {run.state}: {run_id}")
    if run.state == "succeeded" and shown.folds != set(range(run.folds)):
        raise Broken(f"MLflow shows folds {sorted(shown.folds)} of {run.folds}: {run_id}")
