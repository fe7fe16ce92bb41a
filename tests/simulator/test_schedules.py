"""Hundreds of schedules in which no invariant may be violated, and broken cores that the same schedules must find."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

import models.worker
from api.idempotency import IdempotentRequest
from models import comparison as comparisons
from models import job as jobs
from models import run as runs
from models import run_jobs
from models.file_references import try_delete_unreferenced
from models.job import Job, JobKind, JobState, Lease, LeaseObservation, Queue
from models.outbox import add_to_outbox
from models.run import Fold, Run
from models.session import Database
from simulator import workers
from simulator.faults import Fault
from simulator.postgresql import PostgresqlDatabase
from simulator.schedule import ScheduleFailed, Simulator
from worker.handlers import train
from worker.handlers.train import PartEnd, ProgressWriter, Train
from worker.messages import FoldEnded, Prepared, RunOutcome
from worker.sweeper import Sweeper

QUICK, ALL, TOGETHER = 20, 300, 20
# Enough to find each broken core below, even if a change of the simulator changes the schedules of the seeds.
MANY = 400

FIRSTS = [
    *range(0, QUICK, TOGETHER),
    *(pytest.param(first, marks=pytest.mark.slow) for first in range(QUICK, ALL, TOGETHER)),
]


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    simulator = Simulator()
    yield simulator
    simulator.close()


@pytest.mark.parametrize("first", FIRSTS)
def test_many_schedules_keep_every_promise(simulator: Simulator, first: int) -> None:
    for seed in range(first, first + TOGETHER):
        assert simulator.run(seed).runs, seed


@pytest.mark.slow
@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_nothing_is_lost_where_transactions_overlap(empty_database: Database) -> None:
    simulator = Simulator(PostgresqlDatabase(empty_database.engine.url))
    waits = sum(simulator.run(seed).waits for seed in range(20))
    simulator.close()
    assert waits > 0


@pytest.mark.slow
def test_everything_that_may_go_wrong_does(simulator: Simulator) -> None:
    happened: Counter[Fault] = Counter()
    ended: Counter[str] = Counter()
    for seed in range(10_000, 10_000 + MANY):
        report = simulator.run(seed)
        happened += report.happened
        ended += report.runs
        if happened.keys() == {*Fault} and ended.keys() == {"succeeded", "failed", "cancelled"}:
            return
    raise AssertionError(f"never happened: {sorted({*Fault} - happened.keys())}; ended: {ended}")


def test_a_seed_says_all_that_happens(simulator: Simulator) -> None:
    def trace_of(seed: int) -> list[str]:
        lines: list[str] = []
        simulator.run(seed, lines.append)
        names: dict[str, str] = {}
        ids = re.compile(r"(?<=of |un |on )[0-9a-f]{6}\b|(job|run|cmp)_[0-9a-f]{32}")
        return [ids.sub(lambda found: names.setdefault(found[0], str(len(names))), line) for line in lines]

    first, again, other = trace_of(7), trace_of(7), trace_of(8)
    assert first == again and first != other
    assert any("queued → running" in line for line in first)


# --- broken cores ----------------------------------------------------------------------------------------------------
# Only these tests replace our own code: they check that the simulator finds faults in it.

CLAIM, TAKE_OVER, WRITE_ROWS = jobs.claim, jobs.take_over, ProgressWriter._write_rows


def hold_without_a_fence(session: Session, lease: Lease) -> Job:
    return session.get_one(Job, lease.job_id, populate_existing=True)


def renew_without_a_fence(session: Session, lease: Lease) -> bool:
    session.execute(update(Job).where(Job.id == lease.job_id).values(renewals=Job.renewals + 1))
    return False


def _epoch_less_one(session: Session, job: Job | None) -> Job | None:
    if job is not None:
        job.lease_epoch -= 1
        session.flush()
    return job


def take_over_in_the_same_epoch(session: Session, observation: LeaseObservation) -> Job | None:
    return _epoch_less_one(session, TAKE_OVER(session, observation))


def claim_in_the_same_epoch(session: Session, job_id: str, queues: list[Queue], owner: str) -> Job | None:
    return _epoch_less_one(session, CLAIM(session, job_id, queues, owner))


def claim_whatever_its_state(session: Session, job_id: str, queues: list[Queue], owner: str) -> Job | None:
    session.execute(update(Job).where(Job.id == job_id).values(state=JobState.QUEUED))
    return CLAIM(session, job_id, queues, owner)


def run_of_whatever_became_of_it(session: Session, job: Job) -> Run | None:
    return runs.lock_run(session, job.subject_id)


def end_fold_and_forget_the_last(session: Session, job: Job, fold: Fold) -> Job | None:
    if run_jobs.lock_active_run(session, job) is not None:
        runs.add_fold(session, fold)
    return None


def end_fold_one_too_early(session: Session, job: Job, fold: Fold) -> Job | None:
    run = run_jobs.lock_active_run(session, job)
    if run is None:
        return None
    runs.add_fold(session, fold)
    is_last = len(runs.get_folds(session, run.id)) == run_jobs.count_folds(run) - 1
    return run_jobs._queue(session, job, JobKind.FINAL) if is_last else None


def end_others_by_asking_them(session: Session, job: Job) -> int:
    return jobs.request_cancel(session, job.subject_id, *run_jobs.TRAINING)


def give_back_all_the_same(session: Session, lease: Lease, *, delay_s: float = 0.0, counts: bool = True) -> JobState:
    job = jobs.hold(session, lease)
    job.state, job.lease_owner, job.attempt = JobState.QUEUED, None, job.attempt if counts else job.attempt - 1
    session.flush()
    return JobState.QUEUED


def owe_no_end(session: Session, run_id: str, kind: str, payload: dict[str, object]) -> None:
    if kind != "finished":
        add_to_outbox(session, run_id, kind, payload)


def owe_no_fold(session: Session, run_id: str, kind: str, payload: dict[str, object]) -> None:
    if kind != "fold":
        add_to_outbox(session, run_id, kind, payload)


def complete_all_the_same(self: Train, session: Session, job: Job, end: PartEnd) -> None:
    match end:
        case Prepared():
            run_jobs.queue_folds(session, job)
        case FoldEnded():
            self._end_fold(session, job, end)
        case RunOutcome():
            self._end_run(session, job, end)


def write_rows_once_more(self: ProgressWriter, session: Session) -> None:
    session.get_one(Job, self._work.lease.job_id).progress = None
    WRITE_ROWS(self, session)


@dataclass(frozen=True)
class BrokenCore:
    """A broken replacement for a part of the core.

    `invariant` is a pattern for the failure that it must cause, under one of the seeds soon after `first`.
    """

    owner: object
    name: str
    replacement: object
    invariant: str
    first: int = 0


BROKEN_CORES = {
    "hold does not fence": BrokenCore(
        jobs, "hold", hold_without_a_fence, "under a lease that was over|UNIQUE constraint"
    ),
    "renew does not fence": BrokenCore(jobs, "renew", renew_without_a_fence, "under a lease that was over", 60),
    "a take-over keeps the epoch": BrokenCore(jobs, "take_over", take_over_in_the_same_epoch, "was not counted up"),
    "a claim keeps the epoch": BrokenCore(jobs, "claim", claim_in_the_same_epoch, "a lease is given out twice"),
    "completed unseen": BrokenCore(
        run_jobs, "lock_active_run", run_of_whatever_became_of_it, "This is a bug|nobody needs it", 20
    ),
    "no fold is the last": BrokenCore(run_jobs, "finish_fold", end_fold_and_forget_the_last, "a run is lost"),
    "the last fold but one": BrokenCore(
        run_jobs, "finish_fold", end_fold_one_too_early, "not given its folds|two final jobs"
    ),
    "parts linger": BrokenCore(
        jobs, "end_others", end_others_by_asking_them, "UNIQUE constraint failed: job.kind", 6440
    ),
    "given back though cancelled": BrokenCore(
        jobs, "give_back", give_back_all_the_same, "its run was asked to end", 20
    ),
    "completed though cancelled": BrokenCore(
        Train, "_complete", complete_all_the_same, "asked to end|a run is lost", 20
    ),
    "endless attempts": BrokenCore(jobs, "attempts_are_used_up", lambda job: False, "more than 3 attempts", 140),
    "files go at once": BrokenCore(
        train, "delete_unreferenced_after_commit", try_delete_unreferenced, "a row names a file that is gone", 130
    ),
    "no end for MLflow": BrokenCore(run_jobs, "add_to_outbox", owe_no_end, "MLflow is not owed the end"),
    "no folds for MLflow": BrokenCore(train, "add_to_outbox", owe_no_fold, r"MLflow shows folds \[\] of"),
    "told twice": BrokenCore(
        ProgressWriter, "_write_rows", write_rows_once_more, "UNIQUE constraint failed: fold", 400
    ),
    "nobody sweeps": BrokenCore(Sweeper, "_take_over", lambda self, observation: False, "for ever|not over"),
    "nobody makes up for lost messages": BrokenCore(
        workers, "TIMINGS", replace(workers.TIMINGS, look_every_s=1e6), "for ever|not over"
    ),
    "a message is an order": BrokenCore(
        jobs, "claim", claim_whatever_its_state, "running → |succeeded → |cancelled → "
    ),
    "jobs are sent to nobody": BrokenCore(models.worker, "count_free", lambda session, live_s: {}, "for ever|not over"),
    "a comparison stays closed": BrokenCore(
        comparisons, "on_run_retried", lambda *asked: None, "is not in its table|before its runs were over", 160
    ),
    "a request is done twice": BrokenCore(
        IdempotentRequest, "find_answer", lambda self, *asked: None, "UNIQUE constraint failed: answer"
    ),
}


@pytest.mark.parametrize("broken", BROKEN_CORES.values(), ids=BROKEN_CORES)
def test_a_broken_core_is_found_and_the_seed_said(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, broken: BrokenCore
) -> None:
    monkeypatch.setattr(broken.owner, broken.name, broken.replacement)
    seed, found = first_failure(simulator, broken.first)
    assert re.search(broken.invariant, found), found
    assert found.startswith(f"seed {seed}: ") and f"--seed {seed} --trace" in found
    with pytest.raises(ScheduleFailed, match=f"seed {seed}: "):
        simulator.run(seed)
    monkeypatch.undo()
    simulator.run(seed)


def first_failure(simulator: Simulator, first: int) -> tuple[int, str]:
    for seed in range(first, first + MANY):
        try:
            simulator.run(seed)
        except ScheduleFailed as failure:
            return seed, str(failure)
    raise AssertionError(f"{MANY} schedules did not find it")
