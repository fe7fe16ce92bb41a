from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NoReturn

import pytest
import records
from database_marks import ON_SQLITE
from idle_worker import has_ended, running_idle_worker
from manual_clock import ManualClock
from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs
from waiting import until
from working import (
    NO_RENEWALS,
    QUICK,
    FullDiskDatabase,
    FunctionHandler,
    Outage,
    StartLoop,
    add_job,
    leave_mark,
    look,
    make_due,
    marks,
    reason_to_stop,
    request_cancel,
    settled,
    sweep_twice,
    work_on,
)

from clock import Clock
from errors import DatasetRefused, DiskFull, EspalierError, NotFound, StoreRefused, StoreUnavailable, Unavailable
from models import outbox
from models.base import now
from models.job import MAX_ATTEMPTS, Job, JobKind, JobState, Lease, Queue
from models.session import Database
from worker.job_runner import JobFailed, JobRunner, Outcome
from worker.lease import DATABASE_PAUSE_S, Complete, Reason, Stopped, Timings, Work
from worker.local_worker import LocalWorker

LongBackOff = Callable[[int], float]

# --- from claim to close -------------------------------------------------------------------------------------------


def test_a_job_is_seen_through_and_closed(database: Database, start_loop: StartLoop) -> None:
    seen: list[Work] = []
    hands = FunctionHandler(seen.append)
    job_id = add_job(database, "run_1")
    start_loop(database, hands)
    job = settled(database, job_id, JobState.SUCCEEDED)
    (work,) = seen
    assert (work.subject_id, work.job.project_id, work.job.attempt) == ("run_1", records.PRINCIPAL.project_id, 1)
    assert work.lease == Lease(job_id, 1)
    assert (marks(database), hands.calls) == (1, [])
    assert job.finished_at is not None and job.lease_owner is None and job.error is None


def test_a_job_and_what_it_made_are_written_together_or_not_at_all(database: Database, start_loop: StartLoop) -> None:
    def make(work: Work) -> Complete:
        def complete(session: Session) -> None:
            leave_mark(session)
            raise ZeroDivisionError("in the middle")

        return complete

    hands = FunctionHandler(make)
    job_id = add_job(database)
    start_loop(database, hands)
    job = settled(database, job_id, JobState.FAILED)
    assert job.error is not None and "in the middle" in job.error["detail"]
    assert marks(database) == 0


def test_jobs_of_one_queue_are_done_one_at_a_time_and_in_their_order(database: Database, start_loop: StartLoop) -> None:
    done: list[str] = []
    ids = [add_job(database, f"run_{number}") for number in range(5)]
    start_loop(database, FunctionHandler(lambda work: done.append(work.subject_id)))
    for job_id in ids:
        settled(database, job_id, JobState.SUCCEEDED)
    assert done == [f"run_{number}" for number in range(5)]


def test_a_loop_leaves_other_queues_alone(database: Database, start_loop: StartLoop) -> None:
    other = add_job(database, "run_1", queue=Queue.GPU)
    mine = add_job(database, "run_2")
    start_loop(database, FunctionHandler(lambda work: None))
    settled(database, mine, JobState.SUCCEEDED)
    assert look(database, other).state is JobState.QUEUED


def test_two_loops_do_every_job_once(database: Database, start_loop: StartLoop) -> None:
    done: list[str] = []
    ids = [add_job(database, f"run_{number}") for number in range(12)]
    for worker in ("here", "there"):
        start_loop(database, FunctionHandler(lambda work: done.append(work.subject_id)), worker=worker)
    for job_id in ids:
        settled(database, job_id, JobState.SUCCEEDED)
    assert sorted(done) == sorted(f"run_{number}" for number in range(12))
    assert marks(database) == 12


def test_what_mlflow_is_owed_becomes_work(database: Database, start_loop: StartLoop) -> None:
    with database.writing() as session:
        run_id = records.queued_run(session, records.ready_version(session)).id
        outbox.add_to_outbox(session, run_id, "started", {})
    published: list[str] = []

    def publish(work: Work) -> Complete:
        published.append(work.subject_id)

        def complete(session: Session) -> None:
            for row in outbox.get_unsent_rows(session, work.subject_id):
                session.delete(row)

        return complete

    start_loop(database, FunctionHandler(publish), kind=JobKind.PUBLISH, queue=Queue.TRACKING)
    until(lambda: published)
    with database.reading() as session:
        job = session.scalars(select(Job)).one()
    settled(database, job.id, JobState.SUCCEEDED)
    assert published == [run_id]


@pytest.mark.parametrize("error", [NotFound("No stored file has the digest."), KeyError("per_class")])
def test_what_mlflow_cannot_be_told_is_tried_again_by_the_same_job(
    database: Database, start_loop: StartLoop, long_back_off: LongBackOff, error: Exception
) -> None:
    with database.writing() as session:
        run_id = records.queued_run(session, records.ready_version(session)).id
        outbox.add_to_outbox(session, run_id, "finished", {})
    attempts: list[int] = []

    def publish(work: Work) -> NoReturn:
        attempts.append(work.job.attempt)
        raise error

    hands = FunctionHandler(publish)
    start_loop(database, hands, kind=JobKind.PUBLISH, queue=Queue.TRACKING)
    until(lambda: hands.calls)
    time.sleep(20 * QUICK.look_every_s)
    with database.reading() as session:
        job_id = session.scalars(select(Job.id)).one()
    assert settled(database, job_id, JobState.QUEUED).next_attempt_at is not None and attempts == [1]
    make_due(database, job_id)
    until(lambda: attempts == [1, 2])
    with database.reading() as session:
        assert records.count(session, Job) == 1


# --- messages ------------------------------------------------------------------------------------------------------


def test_a_thousand_stale_messages_do_nothing(sqlite: Database) -> None:
    done: list[str] = []
    first, second = add_job(sqlite, "run_1"), add_job(sqlite, "run_2")
    handler = FunctionHandler(lambda work: done.append(work.subject_id))
    runner = JobRunner(sqlite, [Queue.CPU], {JobKind.TRAIN: handler}, "here", QUICK)
    assert runner.run(first) is Outcome.SUCCEEDED
    for _ in range(1000):
        assert runner.run(first) is Outcome.NOT_CLAIMED
    assert runner.run(second) is Outcome.SUCCEEDED
    assert done == ["run_1", "run_2"] and marks(sqlite) == 2


def test_a_job_of_another_queue_is_not_claimed(sqlite: Database) -> None:
    job_id = add_job(sqlite, "run_1", queue=Queue.CPU)
    runner = JobRunner(sqlite, [Queue.GPU], {JobKind.TRAIN: FunctionHandler(lambda work: None)}, "here", QUICK)
    assert runner.run(job_id) is Outcome.NOT_CLAIMED
    assert look(sqlite, job_id).state is JobState.QUEUED


def test_an_attempt_says_how_it_ended_and_asks_for_a_dispatch_at_its_begin_and_end(sqlite: Database) -> None:
    def end(work: Work) -> None:
        match work.subject_id:
            case "cancelled":
                raise Stopped(Reason.CANCELLED)
            case "away":
                raise Unavailable("The store is away.")
            case "refused":
                raise DatasetRefused("Received 1 class.")

    requests: list[str] = []
    handlers = {JobKind.TRAIN: FunctionHandler(end)}
    runner = JobRunner(sqlite, [Queue.CPU], handlers, "here", QUICK, after=lambda: requests.append("request"))
    assert runner.run(add_job(sqlite, "well")) is Outcome.SUCCEEDED
    assert len(requests) == 2
    assert runner.run(add_job(sqlite, "cancelled")) is Outcome.CANCELLED
    assert runner.run(add_job(sqlite, "away")) is Outcome.WILL_BE_RETRIED
    with pytest.raises(JobFailed, match=r"^Data set refused: Received 1 class\.$"):
        runner.run(add_job(sqlite, "refused"))
    runner.drain()
    waiting = add_job(sqlite, "late")
    assert runner.run(waiting) is Outcome.NOT_CLAIMED
    assert look(sqlite, waiting).state is JobState.QUEUED


# --- stopping ------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_ends_without_a_renewal_that_says_so(database: Database, start_loop: StartLoop) -> None:
    hands = FunctionHandler(work_on)
    job_id = add_job(database)
    start_loop(database, hands, timings=replace(QUICK, renew_every_s=600.0, let_go_s=600.0))
    settled(database, job_id, JobState.RUNNING)
    request_cancel(database)
    job = settled(database, job_id, JobState.CANCELLED)
    assert job.renewals == 0
    assert hands.calls == [("cancelled", "run_1")] and marks(database) == 0
    assert job.finished_at is not None and job.error is None


def test_a_job_that_fails_for_now_just_when_it_is_cancelled_is_not_tried_again(
    database: Database, start_loop: StartLoop
) -> None:
    def fail(work: Work) -> NoReturn:
        request_cancel(database)
        raise Unavailable("away")

    hands = FunctionHandler(fail)
    job_id = add_job(database)
    start_loop(database, hands, timings=NO_RENEWALS)  # too slow to notice the request by itself
    settled(database, job_id, JobState.CANCELLED)
    assert hands.calls == [("cancelled", "run_1")]


def test_a_drained_loop_gives_its_job_back_and_ends(database: Database, start_loop: StartLoop) -> None:
    hands = FunctionHandler(work_on)
    job_id = add_job(database)
    loop = start_loop(database, hands)
    settled(database, job_id, JobState.RUNNING)
    later = add_job(database, "run_2")
    loop.drain()
    loop.join(60)
    job = look(database, job_id)
    assert (job.state, job.attempt, job.lease_owner, job.next_attempt_at) == (JobState.QUEUED, 0, None, None)
    assert hands.calls == [("requeued", "run_1")]
    assert look(database, later).attempt == 0  # it looked for no other

    start_loop(database, FunctionHandler(lambda work: None), worker="there")
    assert settled(database, job_id, JobState.SUCCEEDED).attempt == 1


def test_a_loop_that_is_drained_while_it_waits_ends_at_once(sqlite: Database) -> None:
    with running_idle_worker(sqlite, FunctionHandler(lambda work: None)) as loop:
        loop.drain()
        loop.join(60)
        assert has_ended(loop)
    assert look(sqlite, add_job(sqlite, "run_2")).state is JobState.QUEUED


def test_a_job_that_does_not_move_is_failed_as_stalled(database: Database, start_loop: StartLoop) -> None:
    def hang(work: Work) -> None:
        until(lambda: work.check())

    hands = FunctionHandler(hang)
    job_id = add_job(database)
    start_loop(database, hands, timings=replace(QUICK, stall_s=0.3))
    job = settled(database, job_id, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "stalled" and job.error["detail"].startswith("The job made no progress for 0.3 s")
    assert hands.calls == [("failed", "run_1", "stalled")]
    assert job.attempt == 1 and marks(database) == 0


def work_by_hand(database: Database, clock: Clock, run: Callable[[Work], None], timings: Timings) -> None:
    """Do the next job on this thread; the lease is looked after when `run` has its holder look."""
    loop = LocalWorker(database, Queue.CPU, {JobKind.TRAIN: FunctionHandler(run)}, "here", timings, clock)
    assert loop.work()


def test_a_slow_job_that_moves_is_not_stalled(sqlite: Database) -> None:
    clock = ManualClock()

    def work_slowly(work: Work) -> None:
        for _ in range(100):
            clock.sleep(0.4)
            assert work._holder.look()
            work.check()
            work.report_progress()
        clock.sleep(0.6)
        assert not work._holder.look()
        with pytest.raises(Stopped, match="stalled"):
            work.check()

    job_id = add_job(sqlite)
    work_by_hand(sqlite, clock.worker_clock(), work_slowly, replace(QUICK, stall_s=0.5))
    assert (look(sqlite, job_id).state, look(sqlite, job_id).renewals) == (JobState.SUCCEEDED, 100)


def test_a_lease_is_renewed_while_its_job_goes_on(sqlite: Database, start_loop: StartLoop) -> None:
    def work_slowly(work: Work) -> None:
        until(lambda: look(sqlite, work.job.id).renewals > 3)

    job_id = add_job(sqlite)
    start_loop(sqlite, FunctionHandler(work_slowly))
    settled(sqlite, job_id, JobState.SUCCEEDED)


def test_a_job_that_only_writes_is_not_stalled(sqlite: Database) -> None:
    clock = ManualClock()

    def write_slowly(work: Work) -> None:
        for _ in range(5):
            clock.sleep(2.9)
            assert work._holder.look()
            work.write(leave_mark)

    job_id = add_job(sqlite)
    work_by_hand(sqlite, clock.worker_clock(), write_slowly, replace(QUICK, stall_s=3.0))
    assert (look(sqlite, job_id).state, marks(sqlite)) == (JobState.SUCCEEDED, 6)


# --- failing -------------------------------------------------------------------------------------------------------


def test_a_transient_error_is_tried_again_later_and_then_failed(
    database: Database, start_loop: StartLoop, long_back_off: LongBackOff
) -> None:
    attempts: list[int] = []
    failed_at: list[datetime] = []

    def fail(work: Work) -> NoReturn:
        attempts.append(work.job.attempt)
        failed_at.append(now())
        raise Unavailable("The store is away.", part="store")

    hands = FunctionHandler(fail)
    job_id = add_job(database)
    start_loop(database, hands)
    for attempt in (1, 2):
        until(lambda attempt=attempt: len(attempts) == attempt)  # type: ignore[misc]
        job = settled(database, job_id, JobState.QUEUED)
        assert job.attempt == attempt and job.next_attempt_at is not None
        back_off = timedelta(seconds=long_back_off(attempt))
        assert failed_at[-1] + back_off <= job.next_attempt_at <= now() + back_off
        make_due(database, job_id)
    job = settled(database, job_id, JobState.FAILED)
    assert job.error == {"code": "unavailable", "detail": "The store is away.", "part": "store"}
    assert attempts == [1, 2, 3]
    assert hands.calls == [("requeued", "run_1"), ("requeued", "run_1"), ("failed", "run_1", "unavailable")]


def test_an_error_in_what_was_asked_is_final(database: Database, start_loop: StartLoop) -> None:
    def fail(work: Work) -> NoReturn:
        raise DatasetRefused("Received 1 class.")

    hands = FunctionHandler(fail)
    job_id = add_job(database)
    start_loop(database, hands)
    job = settled(database, job_id, JobState.FAILED)
    assert job.error == {"code": "dataset-refused", "detail": "Received 1 class."} and job.attempt == 1
    assert hands.calls == [("failed", "run_1", "dataset-refused")]


def test_an_unknown_exception_fails_the_job_as_a_bug_and_the_loop_lives_on(
    database: Database, start_loop: StartLoop
) -> None:
    def fail(work: Work) -> None:
        if work.subject_id == "run_1":
            raise ZeroDivisionError("division by zero")

    hands = FunctionHandler(fail)
    job_id = add_job(database, "run_1")
    with capture_logs() as logs:
        start_loop(database, hands)
        job = settled(database, job_id, JobState.FAILED)
        assert job.error == {"code": "internal", "detail": "ZeroDivisionError: division by zero. This is a bug."}
        settled(database, add_job(database, "run_2"), JobState.SUCCEEDED)
    assert hands.calls == [("failed", "run_1", "internal")]
    assert [entry["log_level"] for entry in logs if entry["event"] == "job raised an unexpected error"] == ["error"]


def test_a_loop_survives_a_job_whose_end_cannot_be_written(sqlite: Database, start_loop: StartLoop) -> None:
    class Broken(FunctionHandler):
        def failed(self, session: Session, subject_id: str, error: dict[str, object]) -> None:
            raise KeyError("nothing of that name")

    def fail(work: Work) -> None:
        if work.subject_id == "run_1":
            raise DatasetRefused("no")

    first, second = add_job(sqlite, "run_1"), add_job(sqlite, "run_2")
    with capture_logs() as logs:
        start_loop(sqlite, Broken(fail))
        settled(sqlite, second, JobState.SUCCEEDED)
    assert look(sqlite, first).state is JobState.RUNNING  # the sweeper will find it
    assert any(entry["event"] == "polling failed" for entry in logs)


# --- what waits for somebody to make room --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DiskFull("No room."), StoreUnavailable("Away."), StoreRefused("Wrong key.")])
def test_a_job_that_has_no_room_or_no_store_waits_and_its_attempt_does_not_count(
    database: Database, start_loop: StartLoop, error: EspalierError
) -> None:
    failures = [error] * (MAX_ATTEMPTS + 1)
    failed_at: list[datetime] = []

    def fail_for_long(work: Work) -> None:
        if failures:
            failed_at.append(now())
            raise failures.pop()

    hands = FunctionHandler(fail_for_long)
    job_id = add_job(database)
    start_loop(database, hands)
    for times in range(1, MAX_ATTEMPTS + 2):
        until(lambda times=times: len(hands.calls) == times)  # type: ignore[misc]
        job = settled(database, job_id, JobState.QUEUED)
        assert job.attempt == 0 and job.next_attempt_at is not None
        assert failed_at[-1] + timedelta(minutes=1) <= job.next_attempt_at <= now() + timedelta(minutes=1)
        make_due(database, job_id)
    job = settled(database, job_id, JobState.SUCCEEDED)
    assert (job.attempt, job.error, marks(database)) == (1, None, 1)
    assert set(hands.calls) == {("requeued", "run_1")}


@pytest.fixture
def roomless(database: Database) -> Iterator[FullDiskDatabase]:
    """The same database through one whose disk can be full."""
    roomless = FullDiskDatabase(database.engine.url)
    yield roomless
    roomless.close()


@pytest.mark.parametrize("end", [lambda work: None, lambda work: DiskFull("No room."), lambda work: NotFound("Gone.")])
@ON_SQLITE
def test_an_end_that_does_not_fit_is_written_when_there_is_room(
    database: Database, roomless: FullDiskDatabase, start_loop: StartLoop, end: Callable[[Work], EspalierError | None]
) -> None:
    """However long that takes: `let_go_s` is much shorter here."""
    is_full = threading.Event()

    def fill_up(work: Work) -> None:
        roomless.is_full = True
        is_full.set()
        if error := end(work):
            raise error

    job_id = add_job(database)
    with capture_logs() as logs:
        start_loop(roomless, FunctionHandler(fill_up), timings=replace(QUICK, let_go_s=0.3))
        assert is_full.wait(120)
        until(lambda: [entry for entry in logs if entry["event"] == "database disk full, waiting"])
        time.sleep(0.5)
        assert look(database, job_id).state is JobState.RUNNING
        roomless.is_full = False
        until(lambda: look(database, job_id).state is not JobState.RUNNING)
    assert look(database, job_id).lease_epoch == 1
    assert not [entry for entry in logs if entry["event"] in ("lease lost", "polling failed")]


def test_work_goes_on_while_the_database_has_no_room_and_what_it_writes_waits(
    database: Database, roomless: FullDiskDatabase
) -> None:
    """Neither a lease that cannot be renewed nor the standing still ends it, since nobody else could write either."""
    clock = ManualClock()
    working: list[Work] = []
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        clock.sleep(seconds)
        assert working[0]._holder.look()
        pauses.append(seconds)
        if len(pauses) == 30:
            assert (look(database, job_id).state, marks(database)) == (JobState.RUNNING, 0)
            roomless.is_full = False

    def make(work: Work) -> None:
        working.append(work)
        roomless.is_full = True
        work.write(leave_mark)

    job_id = add_job(database)
    timings = replace(QUICK, let_go_s=1.5 * DATABASE_PAUSE_S, stall_s=1.5 * DATABASE_PAUSE_S)
    work_by_hand(roomless, clock.worker_clock(pause), make, timings)
    job = look(database, job_id)
    assert (job.state, job.attempt, job.lease_epoch, marks(database)) == (JobState.SUCCEEDED, 1, 1, 2)
    assert pauses == [DATABASE_PAUSE_S] * 30


def test_a_worker_that_is_to_end_does_not_wait_for_room(
    database: Database, roomless: FullDiskDatabase, start_loop: StartLoop
) -> None:
    is_full = threading.Event()

    def fill_up(work: Work) -> None:
        roomless.is_full = True
        is_full.set()

    add_job(database)
    loop = start_loop(roomless, FunctionHandler(fill_up))
    assert is_full.wait(120)
    loop.drain()
    loop.join(60)
    assert has_ended(loop)


# --- tidying up ----------------------------------------------------------------------------------------------------


def test_what_is_left_for_afterwards_is_done_once_the_end_is_written(database: Database, start_loop: StartLoop) -> None:
    found: list[int] = []

    def make(work: Work) -> None:
        work.afterwards(lambda: found.append(marks(database)))
        assert found == []

    job_id = add_job(database)
    start_loop(database, FunctionHandler(make))
    until(lambda: found)
    assert found == [1] and look(database, job_id).state is JobState.SUCCEEDED


def test_a_failed_tidying_up_changes_no_outcome(sqlite: Database, start_loop: StartLoop) -> None:
    def make(work: Work) -> None:
        def tidy() -> None:
            raise OSError("the store is gone")

        work.afterwards(tidy)

    first = add_job(sqlite, "run_1")
    with capture_logs() as logs:
        start_loop(sqlite, FunctionHandler(make))
        settled(sqlite, first, JobState.SUCCEEDED)
        settled(sqlite, add_job(sqlite, "run_2"), JobState.SUCCEEDED)
        until(lambda: [entry for entry in logs if entry["event"] == "clean-up after the job failed"])


def test_a_job_without_an_end_leaves_nothing_for_afterwards(sqlite: Database, start_loop: StartLoop) -> None:
    tidied: list[str] = []

    def fail(work: Work) -> NoReturn:
        work.afterwards(lambda: tidied.append(work.subject_id))
        raise Unavailable("away")

    job_id = add_job(sqlite)
    loop = start_loop(sqlite, FunctionHandler(fail))
    until(lambda: look(sqlite, job_id).next_attempt_at)
    loop.drain()
    loop.join(60)
    assert tidied == []


# --- the database is away --------------------------------------------------------------------------------------------


def test_an_outage_at_the_end_of_a_job_does_not_lose_its_result(
    database: Database, impatient: Database, outage: Outage, start_loop: StartLoop
) -> None:
    away = threading.Event()

    def make(work: Work) -> None:
        outage.begin()
        away.set()

    job_id = add_job(database)
    with capture_logs() as logs:
        start_loop(impatient, FunctionHandler(make))
        assert away.wait(120)
        time.sleep(0.5)  # the first writes of the end meet the outage
        outage.end()
        job = settled(database, job_id, JobState.SUCCEEDED)
    assert (job.attempt, marks(database)) == (1, 1)
    assert not [entry for entry in logs if entry["log_level"] in ("error", "critical")]


def test_work_waits_for_a_database_that_is_away(
    database: Database, impatient: Database, outage: Outage, start_loop: StartLoop
) -> None:
    away = threading.Event()
    written: list[str] = []

    def make(work: Work) -> None:
        outage.begin()
        away.set()
        work.write(leave_mark)
        written.append(work.subject_id)

    job_id = add_job(database)
    start_loop(impatient, FunctionHandler(make))
    assert away.wait(120)
    time.sleep(0.5)
    assert written == []
    outage.end()
    settled(database, job_id, JobState.SUCCEEDED)
    assert written == ["run_1"] and marks(database) == 2


def test_a_loop_that_could_not_look_finds_the_job_later(
    database: Database, impatient: Database, outage: Outage, start_loop: StartLoop
) -> None:
    first = add_job(database, "run_1")
    with capture_logs() as logs:
        start_loop(impatient, FunctionHandler(lambda work: None))
        settled(database, first, JobState.SUCCEEDED)
        outage.begin()
        until(lambda: [entry for entry in logs if entry["event"] == "database unavailable"])
        outage.end()
        settled(database, add_job(database, "run_2"), JobState.SUCCEEDED)


def test_a_holder_that_cannot_renew_lets_go_and_another_takes_the_job(
    database: Database, impatient: Database, outage: Outage, start_loop: StartLoop
) -> None:
    reasons: list[Reason] = []

    def be_cut_off(work: Work) -> NoReturn:
        outage.begin()
        reasons.append(reason_to_stop(work))
        raise Stopped(reasons[0])

    hands = FunctionHandler(be_cut_off)
    job_id = add_job(database)
    loop = start_loop(impatient, hands, timings=replace(QUICK, let_go_s=0.5))
    until(lambda: reasons)
    loop.drain()
    outage.end()
    loop.join(60)
    assert reasons == [Reason.LOST] and hands.calls == []
    assert look(database, job_id).state is JobState.RUNNING
    other = FunctionHandler(lambda work: None)
    assert sweep_twice(database, other) == 1
    start_loop(database, other, worker="there")
    assert settled(database, job_id, JobState.SUCCEEDED).attempt == 2
    assert marks(database) == 1


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_holder_whose_renewal_hangs_lets_go(database: Database, start_loop: StartLoop) -> None:
    reasons: list[Reason] = []
    working = threading.Event()

    def work(work: Work) -> NoReturn:
        working.set()
        reasons.append(reason_to_stop(work))
        raise Stopped(reasons[0])

    job_id = add_job(database)
    start_loop(database, FunctionHandler(work), timings=replace(QUICK, let_go_s=0.5))
    assert working.wait(120)
    with database.writing() as session:
        session.get_one(Job, job_id, with_for_update=True)  # its row answers to nobody
        until(lambda: reasons)
    assert reasons == [Reason.LOST]


# --- holders that were taken over ------------------------------------------------------------------------------------


def test_a_frozen_holder_is_replaced_and_writes_nothing_when_it_wakes(
    database: Database, start_loop: StartLoop
) -> None:
    frozen, woken = threading.Event(), threading.Event()

    def freeze(work: Work) -> None:
        frozen.set()
        assert woken.wait(120)

    sleeper = FunctionHandler(freeze)
    job_id = add_job(database)
    with capture_logs() as logs:
        loop = start_loop(database, sleeper, timings=NO_RENEWALS)
        assert frozen.wait(120)
        other = FunctionHandler(lambda work: None)
        assert sweep_twice(database, other) == 1
        assert other.calls == [("requeued", "run_1")]
        start_loop(database, other, worker="there")
        done = settled(database, job_id, JobState.SUCCEEDED)
        woken.set()
        until(lambda: [entry for entry in logs if entry["event"] == "lease lost"])
    loop.drain()
    loop.join(60)
    assert marks(database) == 1 and sleeper.calls == []
    after = look(database, job_id)
    assert (after.state, after.attempt, after.finished_at) == (JobState.SUCCEEDED, 2, done.finished_at)


def test_a_frozen_holder_that_writes_on_its_way_is_stopped(database: Database, start_loop: StartLoop) -> None:
    frozen, woken = threading.Event(), threading.Event()
    reasons: list[Reason] = []

    def freeze(work: Work) -> None:
        frozen.set()
        assert woken.wait(120)
        try:
            work.write(leave_mark)
        except Stopped as stopped:
            reasons.append(stopped.reason)
            raise

    hands = FunctionHandler(freeze)
    job_id = add_job(database)
    loop = start_loop(database, hands, timings=NO_RENEWALS)
    assert frozen.wait(120)
    assert sweep_twice(database, FunctionHandler(lambda work: None)) == 1
    loop.drain()  # so that it does not claim the job again
    woken.set()
    loop.join(60)
    assert marks(database) == 0 and hands.calls == []
    assert look(database, job_id).state is JobState.QUEUED


def test_a_frozen_holder_that_failed_changes_nothing(database: Database, start_loop: StartLoop) -> None:
    frozen, woken = threading.Event(), threading.Event()

    def freeze(work: Work) -> NoReturn:
        frozen.set()
        assert woken.wait(120)
        raise DatasetRefused("no")

    hands = FunctionHandler(freeze)
    job_id = add_job(database)
    loop = start_loop(database, hands, timings=NO_RENEWALS)
    assert frozen.wait(120)
    assert sweep_twice(database, FunctionHandler(lambda work: None)) == 1
    loop.drain()
    woken.set()
    loop.join(60)
    job = look(database, job_id)
    assert (job.state, job.error, hands.calls) == (JobState.QUEUED, None, [])
