"""The life of a run: a state machine applies every possible operation to runs and their jobs, in any order.

It keeps a simple model of the expected rows and compares it with the database after each step. It also checks the
invariants of the simulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import records
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulator.databases import EngineDatabase, InMemoryDatabase
from simulator.invariants import Invariants, Writer
from simulator.stand_ins import MemoryStore
from sqlalchemy import delete, select
from working import SLOW_SWEEPS, training_settings

from artifacts.store import Digest
from clock import Clock
from errors import DiskFull, EspalierError, NotReady, OutOfMemory, TrainingDiverged, Unavailable
from models import job as jobs
from models import run as runs
from models import run_jobs
from models.base import Base, wall_clock
from models.job import MAX_ATTEMPTS, Job, JobKind, JobState, Lease, Queue
from models.run import RunState
from models.session import Database
from recipes.recipe import Folds, Mode, Recipe, Task
from training.progress import FoldResult
from worker.handlers.train import PartEnd, Train
from worker.job_runner import JobFailed
from worker.lease import Complete, LeaseHolder, Reason, Stopped, WarmChild, Work
from worker.local_worker import LocalWorker
from worker.messages import FoldEnded, Prepared, RunOutcome
from worker.sweeper import Sweeper

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
STAY = ("project", "registry_revision")
PARKED_S = 60.0


@dataclass
class Part:
    """An unfinished job of a run, as the state machine expects it. It is running if it has a `job`."""

    kind: JobKind
    number: int
    place: int
    attempt: int = 0
    is_asked: bool = False
    due_at: float = 0.0
    job: Job | None = None


@dataclass
class Life:
    """A run, as the state machine expects it."""

    run_id: str
    k: int
    is_fanned_out: bool
    state: RunState = RunState.QUEUED
    is_halved: bool = False
    folds: set[int] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)


class Told(Train):
    """A handler that trains nothing. The test determines how a job ends."""

    end: PartEnd | EspalierError | Reason = Reason.LOST

    def run(self, work: Work) -> Complete:
        match self.end:
            case EspalierError() as error:
                raise error
            case Reason() as reason:
                raise Stopped(reason)
            case message:
                return partial(self._complete, job=work.job, end=message)


class Lives(RuleBasedStateMachine):
    """A state machine with several runs, from their request to their end."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.now_s = 0.0
        self.wall = wall_clock.set(lambda: BEGINNING + timedelta(seconds=self.now_s))
        with database.writing() as session:
            for table in reversed(Base.metadata.sorted_tables):
                if table.name not in STAY:
                    session.execute(delete(table))
            self.version_id = records.ready_version(session).id
        self.store = MemoryStore()
        self.told = Told(self.store, training_settings(self.store.root))
        self.handlers = dict.fromkeys(JobKind, self.told)
        self.clock = Clock(now=lambda: self.now_s)
        self.loop = LocalWorker(database, Queue.CPU, self.handlers, "here", SLOW_SWEEPS, self.clock)
        self.checks = Invariants(self.query, lambda digest: self.store.has(Digest(digest)))
        self.places = itertools.count()
        self.lives: list[Life] = []
        self.late: list[Job] = []

    def teardown(self) -> None:
        wall_clock.reset(self.wall)

    def query(self, statement: str) -> Iterable[Sequence[Any]]:
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(statement)]

    # --- what people do ---------------------------------------------------------------------------------------------

    @initialize(k=st.integers(2, 3), is_fanned_out=st.booleans())
    def order_the_first(self, k: int, is_fanned_out: bool) -> None:
        self.order(k, is_fanned_out)

    @precondition(lambda self: len(self.lives) < 3)
    @rule(k=st.integers(2, 3), is_fanned_out=st.booleans())
    def order(self, k: int, is_fanned_out: bool) -> None:
        mode = Mode.FINE_TUNING if is_fanned_out else Mode.FEATURE_EXTRACTION
        recipe = Recipe(task=Task.BINARY, mode=mode, folds=Folds(k=k))
        with self.database.writing() as session:
            run = runs.create_run(session, records.PRINCIPAL, self.version_id, "flowers", recipe)
            run_jobs.queue_training(session, run)
        self.checks.check(Writer("order"))
        self.lives.append(Life(run.id, k, is_fanned_out))
        self._owe(self.lives[-1], JobKind.TRAIN)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(self.lives))
        with self.database.writing() as session:
            is_ended = run_jobs.request_cancel(session, life.run_id)
        self.checks.check(Writer("cancel", cancels=life.run_id))
        is_open = not life.state.is_final
        life.parts = [part for part in life.parts if part.job is not None]
        for part in life.parts:
            part.is_asked = True
        if is_open and not life.parts:
            life.state = RunState.CANCELLED
        assert is_ended == (is_open and not life.parts)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(self.lives))

        def retry() -> None:
            with self.database.writing() as session:
                run_jobs.retry(session, runs.get_run(session, records.PRINCIPAL, life.run_id))

        if life.state is not RunState.FAILED:
            with pytest.raises(NotReady):
                retry()
            return
        retry()
        self.checks.check(Writer("retry"))
        life.state = RunState.QUEUED
        self._owe(life, JobKind.TRAIN)

    # --- what workers do --------------------------------------------------------------------------------------------

    @rule(times=st.integers(1, 5))
    def work_off(self, times: int) -> None:
        """Let some jobs succeed, because otherwise almost every job would have a fault."""
        for _ in range(times):
            claimed = self.claim()
            if claimed is None:
                return
            life, part, job = claimed
            while self._measures(life, part):
                self._measure(life, job)
            self._succeed(life, part, job)

    @rule()
    def only_claim(self) -> None:
        self.claim()

    def claim(self) -> tuple[Life, Part, Job] | None:
        due = [
            (part.kind is JobKind.TRAIN, part.place, life, part)
            for life in self.lives
            for part in life.parts
            if part.job is None and part.due_at <= self.now_s
        ]
        with self.database.writing() as session:
            job = records.claim_next(session, [Queue.CPU], "here")
        self.checks.check(Writer("claim"))
        if job is None:
            assert not due
            return None
        _, _, life, part = min(due, key=lambda one: one[:2])
        assert (job.subject_id, job.kind, job.index) == (life.run_id, part.kind, part.number)
        part.job = job
        part.attempt += 1
        order = self._work(job).write(lambda session: self.told._make_order(session, job))
        self.checks.check(Writer("begin", Lease(job.id, job.lease_epoch)))
        assert order is not None and set(order.outcomes) == life.folds
        life.state = RunState.RUNNING
        return life, part, job

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        _, part, job = data.draw(st.sampled_from(self._held()))
        with self.database.writing() as session:
            assert jobs.renew(session, Lease(job.id, job.lease_epoch)) == part.is_asked

    @precondition(lambda self: any(self._measures(life, part) for life, part, _ in self._held()))
    @rule(data=st.data())
    def measure_a_fold_on_the_way(self, data: st.DataObject) -> None:
        quick = [(life, job) for life, part, job in self._held() if self._measures(life, part)]
        self._measure(*data.draw(st.sampled_from(quick)))

    def _measure(self, life: Life, job: Job) -> None:
        number = min(set(range(life.k)) - life.folds)
        fold = records.fold(life.run_id, number, outcome_sha256=self.store.write(f"{life.run_id} {number}"))
        self._work(job).write(lambda session: runs.add_fold(session, fold))
        self.checks.check(Writer("fold", Lease(job.id, job.lease_epoch)))
        life.folds.add(number)

    @precondition(lambda self: self._done())
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        self._succeed(*data.draw(st.sampled_from(self._done())))

    def _succeed(self, life: Life, part: Part, job: Job) -> None:
        is_open = not life.state.is_final
        self._end(life, part, job, self._message(life, part))
        if not is_open:
            return
        match part.kind:
            case JobKind.TRAIN if life.is_fanned_out:
                for number in sorted(set(range(life.k)) - life.folds):
                    self._owe(life, JobKind.FOLD, number)
                if len(life.folds) == life.k:
                    self._owe(life, JobKind.FINAL)
            case JobKind.FOLD:
                life.folds.add(part.number)
                if len(life.folds) == life.k:
                    self._owe(life, JobKind.FINAL)
            case _:
                life.state = RunState.SUCCEEDED
        if part.is_asked:
            self._cancel(life)

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def fail_for_good(self, data: st.DataObject) -> None:
        life, part, job = data.draw(st.sampled_from(self._held()))
        self._end(life, part, job, TrainingDiverged("no number"))
        self._fail(life)

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def fail_for_now(self, data: st.DataObject) -> None:
        life, part, job = data.draw(st.sampled_from(self._held()))
        self._end(life, part, job, Unavailable("away"))
        if part.attempt == MAX_ATTEMPTS:
            self._fail(life)
        else:
            self._wait_again(life, part, jobs.back_off_s(part.attempt))

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def run_out_of_memory(self, data: st.DataObject) -> None:
        life, part, job = data.draw(st.sampled_from(self._held()))
        self._end(life, part, job, OutOfMemory("too much"))
        if life.state.is_final or life.is_halved or part.is_asked:
            self._fail(life)
            return
        self._end_parts(life)
        life.is_halved, life.state = True, RunState.QUEUED
        life.folds.clear()
        self._owe(life, JobKind.TRAIN)

    @precondition(lambda self: self._held())
    @rule(data=st.data(), reason=st.sampled_from([Reason.DRAINING, DiskFull("no room")]))
    def give_back(self, data: st.DataObject, reason: Reason | DiskFull) -> None:
        life, part, job = data.draw(st.sampled_from(self._held()))
        self._end(life, part, job, reason)
        part.attempt -= 1
        self._wait_again(life, part, PARKED_S if isinstance(reason, DiskFull) else 0.0)

    @precondition(lambda self: any(part.is_asked for _, part, _ in self._held()))
    @rule(data=st.data())
    def stop_as_asked(self, data: st.DataObject) -> None:
        life, part, job = data.draw(st.sampled_from([one for one in self._held() if one[1].is_asked]))
        self._end(life, part, job, Reason.CANCELLED)
        self._cancel(life)

    @precondition(lambda self: self._held())
    @rule(data=st.data())
    def lose_the_worker(self, data: st.DataObject) -> None:
        life, part, job = data.draw(st.sampled_from(self._held()))
        sweeper = Sweeper(self.database, [Queue.CPU], self.handlers, "there", SLOW_SWEEPS, self.clock)
        assert sweeper.sweep() == 0
        for _, _, other in self._held():
            if other is not job:
                with self.database.writing() as session:
                    jobs.renew(session, Lease(other.id, other.lease_epoch))
                self.checks.check(Writer("renew", Lease(other.id, other.lease_epoch)))
        self.now_s += SLOW_SWEEPS.lease_s
        assert sweeper.sweep() == 1
        self.checks.check(Writer("sweeper"))
        self._leave(life, part, job)
        if part.attempt == MAX_ATTEMPTS and not part.is_asked:
            self._fail(life)
        else:
            self._wait_again(life, part, 0.0)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def wake_up_too_late(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.late))
        with pytest.raises(Stopped):
            self._work(job).write(lambda session: runs.set_progress(session, job.subject_id, runs.progress("late")))
        life = next(life for life in self.lives if life.run_id == job.subject_id)
        for end in (self._message(life, Part(job.kind, job.index, 0)), TrainingDiverged("late"), Reason.DRAINING):
            self.told.end = end
            self.loop.runner.run_claimed(self._work(job))
        assert self.checks.check(Writer("late", Lease(job.id, job.lease_epoch))) == []

    @rule()
    def wait(self) -> None:
        self.now_s += PARKED_S

    # --- what must be so --------------------------------------------------------------------------------------------

    @invariant()
    def the_rows_are_as_they_should_be(self) -> None:
        self.checks.check(Writer("nobody"))
        with self.database.reading() as session:
            for life in self.lives:
                run = runs.get_run(session, records.PRINCIPAL, life.run_id)
                unfinished = select(Job).where(
                    Job.subject_id == life.run_id,
                    Job.state.in_((JobState.QUEUED, JobState.RUNNING)),
                    Job.kind != JobKind.PUBLISH,
                )
                assert run.state is life.state
                assert {fold.number for fold in runs.get_folds(session, life.run_id)} == life.folds
                assert (run.batch_size is not None) == life.is_halved
                found = {
                    (job.kind, job.index): (job.state, job.attempt, job.cancel_requested_at is not None)
                    for job in session.scalars(unfinished)
                }
                assert found == {
                    (part.kind, part.number): (
                        JobState.QUEUED if part.job is None else JobState.RUNNING,
                        part.attempt,
                        part.is_asked,
                    )
                    for part in life.parts
                }

    # --- what follows -----------------------------------------------------------------------------------------------

    def _held(self) -> list[tuple[Life, Part, Job]]:
        return [(life, part, part.job) for life in self.lives for part in life.parts if part.job is not None]

    def _done(self) -> list[tuple[Life, Part, Job]]:
        """Return the jobs that may succeed. A job that trains all folds must have measured each fold."""
        return [(life, part, job) for life, part, job in self._held() if not self._measures(life, part)]

    def _measures(self, life: Life, part: Part) -> bool:
        """Return whether a job trains all folds itself and has not measured all of them."""
        is_quick = part.kind is JobKind.TRAIN and not life.is_fanned_out
        return is_quick and life.state is RunState.RUNNING and len(life.folds) < life.k

    def _work(self, job: Job) -> Work:
        lease = Lease(job.id, job.lease_epoch)
        return Work(
            self.database, job, LeaseHolder(self.database, lease, SLOW_SWEEPS, lambda: False, self.clock), WarmChild()
        )

    def _message(self, life: Life, part: Part) -> PartEnd:
        match part.kind:
            case JobKind.TRAIN if life.is_fanned_out:
                return Prepared()
            case JobKind.FOLD:
                outcome = self.store.write(f"{life.run_id} {part.number}")
                result = FoldResult(part.number, 1, 1, "", metrics={}, history=[], seconds=1.0)
                return FoldEnded(result=result, outcome=outcome)
            case _:
                bundle, backbone = self.store.write("bundle"), self.store.write("backbone")
                return RunOutcome(bundle=bundle, backbone=backbone, metrics={}, training_s=1.0, files=())

    def _end(self, life: Life, part: Part, job: Job, end: PartEnd | EspalierError | Reason) -> None:
        """Let the job runner do a job that ends in this way."""
        self.told.end = end
        with suppress(JobFailed):
            self.loop.runner.run_claimed(self._work(job))
        self.checks.check(Writer("end", Lease(job.id, job.lease_epoch)))
        self._leave(life, part, job)

    def _leave(self, life: Life, part: Part, job: Job) -> None:
        life.parts.remove(part)
        part.job = None
        self.late.append(job)

    def _owe(self, life: Life, kind: JobKind, number: int = 0) -> None:
        life.parts.append(Part(kind, number, next(self.places)))

    def _wait_again(self, life: Life, part: Part, delay_s: float) -> None:
        if part.is_asked:
            self._cancel(life)
            return
        part.due_at = self.now_s + delay_s
        if life.state is RunState.RUNNING and all(other.job is None for other in life.parts):
            life.state = RunState.QUEUED
        life.parts.append(part)

    def _fail(self, life: Life) -> None:
        self._end_parts(life)
        if not life.state.is_final:
            life.state = RunState.FAILED

    def _end_parts(self, life: Life) -> None:
        self.late += [part.job for part in life.parts if part.job is not None]
        life.parts.clear()

    def _cancel(self, life: Life) -> None:
        if life.state.is_final:
            return
        life.state = RunState.CANCELLED
        life.parts = [part for part in life.parts if part.job is not None]
        for part in life.parts:
            part.is_asked = True


def see(make: Callable[[], Lives], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            print_blob=True,
            suppress_health_check=[*HealthCheck],
        ),
    )


@pytest.mark.parametrize(("examples", "steps"), [(30, 30), pytest.param(60, 50, marks=pytest.mark.slow)])
def test_a_run_lives_as_it_should(examples: int, steps: int) -> None:
    database = InMemoryDatabase()
    see(lambda: Lives(EngineDatabase(database.engine)), examples, steps)
    database.close()


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_run_lives_as_it_should_on_postgresql(database: Database) -> None:
    see(lambda: Lives(database), 8, 30)
