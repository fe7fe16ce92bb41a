"""Stand-ins for what surrounds the workers: a store, MLflow, and children that train nothing.

Each has the interface of the real thing, so that the real code of the workers runs against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

from artifacts.run_files import RunFile
from artifacts.store import Digest, Store, digest_of
from errors import DiskFull, StoreUnavailable, TrainingDiverged, Unavailable
from recipes.catalogue import BackboneName
from simulator.faults import Fault
from simulator.invariants import InvariantViolated
from simulator.machine import Machine
from training.progress import Extraction, FoldResult
from worker.child_process import ChildDied, ChildEnded
from worker.handlers.tracking import Facts, OpenPages, TrackingSettings
from worker.lease import Work
from worker.messages import (
    AddBackbone,
    Alive,
    Answer,
    CheckpointWritten,
    ChildMessage,
    ChoiceAnswer,
    CompareOrder,
    ComparisonOutcome,
    DigestAnswer,
    Drain,
    EpochEnded,
    Extracted,
    Failed,
    FileWritten,
    FindBackbone,
    FoldEnded,
    JobProgress,
    Order,
    Prepared,
    Progress,
    RunOutcome,
    Stored,
    StoredFile,
    TrainOrder,
    TrainPart,
    WorkerMessage,
)

# How often a handler that waits for a child looks for reasons to stop.
_POLL_S = 1.0
_FOR_EVER_S = 1e9
_KILLED = -9
_SEGMENTATION_FAULT = -11


# A child waits for an answer after these messages.
_QUESTIONS = (FindBackbone, AddBackbone)


class MemoryStore(Store):
    """Files by digest, in memory."""

    def __init__(self) -> None:
        self.root = Path("nowhere")
        self._files: dict[Digest, bytes] = {}

    def write(self, text: str) -> Digest:
        """Store a text and return its digest."""
        digest = digest_of(text.encode())
        self._files[digest] = text.encode()
        return digest

    def has(self, digest: Digest) -> bool:
        return digest in self._files

    def read(self, digest: Digest) -> bytes:
        return self._files[digest]

    def delete(self, *digests: Digest) -> None:
        for digest in digests:
            self._files.pop(digest, None)

    def digests(self) -> Iterator[Digest]:
        return iter(sorted(self._files))


# --- children ------------------------------------------------------------------------------------------------------

Script = Iterator[tuple[float, ChildMessage | Exception]]
"""The messages of a child, each with its delay in seconds; an exception ends the child."""


class TrainingChild:
    """Sends the messages and stores the files of a child that trains a run. Runs on its worker's machine."""

    def __init__(self, machine: Machine, store: MemoryStore) -> None:
        self._machine = machine
        self._chance = machine.simulation.chance
        self._store = store
        self._script: Script = iter(())
        self._next: tuple[float, ChildMessage | Exception] | None = None
        self._answer: Answer | None = None
        self._subject_id = ""
        self._part: int | None = None
        self._is_hung = False
        self._is_waiting = False

    def __enter__(self) -> TrainingChild:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        return True

    def send(self, message: WorkerMessage) -> None:
        match message:
            case DigestAnswer() | ChoiceAnswer() | Stored():
                self._answer, self._is_waiting = message, False
            case Drain():
                raise AssertionError("Expected a handler to call `drain`. Received a message Drain.")
            case order:
                self._script, self._next, self._is_waiting = self._carry_out(order), None, False

    def receive(self, work: Work) -> ChildMessage | None:
        self._subject_id = work.subject_id
        work.check()
        if not self._has_sent(_POLL_S):
            return None
        work.report_progress()
        sent = self._take()
        if isinstance(sent, Exception):
            raise sent
        if isinstance(sent, Failed):
            raise sent.as_error()
        return sent

    def drain(self, within_s: float) -> list[ChildMessage]:
        if self._is_hung:
            self._machine.sleep(within_s)
            return []
        self._machine.sleep(self._chance.seconds(0.0, within_s))
        kept: list[ChildMessage] = [self._checkpoint(self._part, 1)] if self._chance.happens(0.5) else []
        if self._chance.happens(0.2):  # it was almost done
            kept += self._rest()
        return kept

    def _rest(self) -> list[ChildMessage]:
        """Return all remaining messages; none if the child would ask, hang or die before its end."""
        rest: list[ChildMessage] = []
        if self._is_waiting:
            return rest
        for message in itertools.chain([self._next[1]] if self._next else [], (sent for _, sent in self._script)):
            if self._is_hung or isinstance(message, (Exception, Failed, *_QUESTIONS)):
                return []
            rest.append(message)
        return rest

    def stop(self) -> object:
        self._script, self._next = iter(()), None
        return None

    def _has_sent(self, within_s: float) -> bool:
        """Wait at most `within_s` seconds; return whether there is a message."""
        now = self._machine.simulation.scheduler.now
        if self._next is None:
            after_s, message = next(self._script)
            self._next = now + after_s, message
        self._machine.sleep(min(within_s, max(0.0, self._next[0] - now)))
        return self._machine.simulation.scheduler.now >= self._next[0]

    def _take(self) -> ChildMessage | Exception:
        assert self._next is not None
        sent, self._next = self._next[1], None
        self._is_waiting = isinstance(sent, _QUESTIONS)
        return sent

    # --- what it sends -----------------------------------------------------------------------------------------------

    def _carry_out(self, order: Order) -> Script:
        assert isinstance(order, TrainOrder)
        recipe = order.spec.recipe
        folds = range(recipe["folds"]["k"] * recipe["folds"]["repeats"])
        self._part = order.fold
        match order.part:
            case TrainPart.PREPARE:
                yield from self._prepare()
                yield self._soon(Prepared())
            case TrainPart.FOLD:
                yield from self._learn(order.fold)
                yield self._soon(self._fold(order, order.fold))
            case TrainPart.FINAL:
                self._check_outcomes(order, folds)
                yield from self._finish()
            case TrainPart.ALL:
                yield from self._prepare()
                for number in folds:
                    if number not in order.outcomes:
                        yield from self._learn(number)
                        yield self._soon(self._fold(order, number))
                yield from self._finish()

    def _prepare(self) -> Script:
        yield from self._work("features")
        if self._chance.happens(0.3):
            weights = Digest("0" * 64)
            yield self._soon(
                FindBackbone(network=BackboneName.VGG16, weights=weights, cut="block5", size=224, export_version=1)
            )
            assert isinstance(self._answer, DigestAnswer)
            if self._answer.digest is None:
                export = self._store.write(f"export {self._chance.integer(0, 10**9)}")
                yield self._soon(
                    AddBackbone(
                        network=BackboneName.VGG16,
                        weights=weights,
                        cut="block5",
                        size=224,
                        export_version=1,
                        digest=export,
                        facts={},
                    )
                )
        yield self._soon(Extracted(extraction=Extraction(images=20, computed=20, cached=0, seconds=1.0)))

    def _learn(self, number: int | None) -> Script:
        """Train one part for some epochs."""
        for epoch in range(1, self._chance.choice([1, 1, 1, 2, 3]) + 1):
            yield from self._work("final" if number is None else "folds", number)
            yield self._at_once(EpochEnded(fold=number, epoch=epoch, metrics={"loss": 1.0}))
            if self._chance.happens(0.4):
                yield self._soon(self._checkpoint(number, epoch))

    def _finish(self) -> Script:
        yield from self._learn(None)
        table = StoredFile(name=RunFile.OUT_OF_FOLD, sha256=self._file("out of fold"), size_bytes=9, media_type="a/b")
        if self._chance.happens(0.3):
            yield self._soon(FileWritten(file=table))
        yield self._soon(
            RunOutcome(
                bundle=self._file("bundle"),
                backbone=self._file("backbone"),
                metrics={"accuracy": 0.5},
                training_s=1.0,
                files=(table,),
            )
        )

    def _work(self, stage: str, number: int | None = None) -> Script:
        """Work for some time, and maybe fail."""
        state = JobProgress(stage=stage, share=0.5, fold=number, epoch=1, epochs=3, spent_s=1.0, eta_s=1.0)
        message: ChildMessage = Progress(state=state) if self._chance.happens(0.5) else Alive(step_s=0.1)
        yield self._chance.seconds(0.1, 6.0), message
        chance = self._chance
        if chance.strikes(Fault.HANG):
            self._is_hung = True
            yield _FOR_EVER_S, Alive()
        if chance.strikes(Fault.BROKEN):
            yield self._soon(Failed.by(TrainingDiverged("The loss is no number.")))
        if chance.strikes(Fault.MEMORY):
            yield 0.1, ChildDied(_KILLED, for_memory=True)
        if chance.strikes(Fault.DISK_FULL):
            yield self._soon(Failed.by(DiskFull("No room.")))
        if chance.strikes(Fault.STORE_AWAY):
            yield self._soon(Failed.by(StoreUnavailable("The bucket is away.")))
        if chance.strikes(Fault.PASSING):
            yield 0.1, ChildDied(_SEGMENTATION_FAULT) if chance.happens(0.5) else Unavailable("The weights are away.")

    def _fold(self, order: TrainOrder, number: int) -> FoldEnded:
        batch = order.spec.recipe["batch_size"]
        outcome = self._store.write(f"{self._subject_id} fold {number} batch {batch}")
        result = FoldResult(number, epochs=3, best_epoch=2, stopped="", metrics={}, history=[], seconds=1.0)
        return FoldEnded(result=result, outcome=outcome)

    def _check_outcomes(self, order: TrainOrder, folds: Sequence[int]) -> None:
        """Check that the final fit gets the outcomes of all folds, and that all used the same batch size."""
        batch = order.spec.recipe["batch_size"]
        given = {number: self._store.read(digest).decode() for number, digest in order.outcomes.items()}
        expected = {number: f"{self._subject_id} fold {number} batch {batch}" for number in folds}
        if given != expected:
            raise InvariantViolated(f"the end of a run is not given its folds: {given}")

    def _checkpoint(self, number: int | None, epochs: int) -> CheckpointWritten:
        digest = self._file(f"checkpoint of part {number} at epoch {epochs}")
        return CheckpointWritten(fold=number, epochs=epochs, sha256=digest, size_bytes=9)

    def _file(self, name: str) -> Digest:
        """Store a file that differs from those of other attempts."""
        return self._store.write(f"{name} of {self._subject_id}, {self._chance.integer(0, 10**12)}")

    def _at_once(self, message: ChildMessage) -> tuple[float, ChildMessage]:
        return 0.0, message

    def _soon(self, message: ChildMessage | Exception) -> tuple[float, ChildMessage | Exception]:
        return self._chance.seconds(0.0, 0.5), message


class ComparingChild(TrainingChild):
    """Sends the messages of a child that compares runs."""

    def __init__(
        self, machine: Machine, store: MemoryStore, order: CompareOrder, environment: Mapping[str, str]
    ) -> None:
        super().__init__(machine, store)
        self.send(order)

    def _carry_out(self, order: Order) -> Script:
        assert isinstance(order, CompareOrder)
        for run in order.runs:
            for file in (run.bundle, run.backbone, run.out_of_fold):
                if not self._store.has(file):
                    raise InvariantViolated(f"a comparison is given a file that is gone: {file}")
        for _ in range(self._chance.integer(1, 6)):
            yield from self._work("comparing")
        rows = [{"position": run.position, "difference": None} for run in order.runs]
        yield self._soon(
            ComparisonOutcome(
                table={"rows": rows, "verdict": "equal"},
                picture=self._file("picture"),
                report=self._file("report"),
            )
        )
        yield self._soon(ChildEnded())


# --- MLflow --------------------------------------------------------------------------------------------------------


@dataclass
class PageState:
    """What MLflow shows of a run.

    MLflow has no fencing, so `is_doubtful` is set when a worker that had lost its lease wrote to it.
    """

    is_started: bool = False
    folds: set[int] = field(default_factory=set)
    state: str | None = None
    is_compared: bool = False
    is_doubtful: bool = False


class Mlflow:
    """The simulated MLflow server, with the state of each run's page."""

    def __init__(self) -> None:
        self.page_states: dict[str, PageState] = {}

    def pages(self, machine: Machine, is_held: Callable[[], bool]) -> OpenPages:
        """Return what opens pages from a machine; `is_held` returns whether the current thread holds its lease."""

        @contextmanager
        def reach(place: TrackingSettings) -> Iterator[Callable[[Facts], SimulatedPage]]:
            yield partial(SimulatedPage, self, machine, is_held)

        return reach


class SimulatedPage:
    """One run in the simulated MLflow."""

    def __init__(self, mlflow: Mlflow, machine: Machine, is_held: Callable[[], bool], facts: Facts) -> None:
        self.experiment_id = "1"
        self.run_id = f"page of {facts.run.id}"
        self.refusals: list[dict[str, str]] = []
        self._machine = machine
        self._is_held = is_held
        self._facts = facts
        self._state = mlflow.page_states.setdefault(facts.run.id, PageState())
        self._call(lambda: None)

    def start(self) -> None:
        self._call(lambda: setattr(self._state, "is_started", True))

    def add_fold(self, number: int) -> None:
        if any(fold.number == number for fold in self._facts.folds):
            self._call(lambda: self._state.folds.add(number))

    def finish(self, store: Store) -> None:
        state = self._facts.run.state
        if not state.is_final:
            raise InvariantViolated(f"MLflow is told the end of a run that is {state.value}: {self._facts.run.id}")
        self._call(lambda: setattr(self._state, "state", state.value))

    def compare(self, store: Store) -> None:
        assert self._facts.comparison is not None and self._facts.comparison.report_sha256 is not None
        store.read(Digest(self._facts.comparison.report_sha256))
        self._call(lambda: setattr(self._state, "is_compared", True))

    def add_file(self, store: Store, name: str) -> None:
        raise InvariantViolated(f"MLflow is told of a file that nobody asked for: {name}")

    def move_alias(self, alias: str) -> None:
        raise InvariantViolated(f"MLflow is told of an alias that nobody moved: {alias}")

    def _call(self, effect: Callable[[], None]) -> None:
        """Call MLflow, which may not respond, or whose answer may be lost."""
        self._machine.step()
        chance = self._machine.simulation.chance
        if chance.strikes(Fault.MLFLOW_AWAY):
            raise Unavailable("MLflow is away.")
        self._state.is_doubtful |= not self._is_held()
        effect()
        if chance.strikes(Fault.MLFLOW_DEAF):
            raise Unavailable("MLflow's answer was lost.")
