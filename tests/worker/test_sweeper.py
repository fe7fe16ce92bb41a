from __future__ import annotations

import time
from dataclasses import replace

import records
from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs
from waiting import until
from working import (
    QUICK,
    SLOW_SWEEPS,
    FunctionHandler,
    Outage,
    StartLoop,
    add_job,
    look,
    request_cancel,
    settled,
    sweep_twice,
    work_on,
)

from clock import Clock
from errors import EspalierError
from models import job as jobs
from models.job import Job, JobKind, JobState, Queue
from models.session import Database
from models.worker import Worker
from worker.sweeper import Sweeper


def test_a_job_whose_renewals_move_is_not_taken_over(database: Database, start_loop: StartLoop) -> None:
    clock = [0.0]
    job_id = add_job(database)
    start_loop(database, FunctionHandler(work_on))
    sweeper = Sweeper(database, [Queue.CPU], {}, "there", SLOW_SWEEPS, Clock(lambda: clock[0]))
    for _ in range(3):
        settled(database, job_id, JobState.RUNNING)
        assert sweeper.sweep() == 0
        before = look(database, job_id).renewals
        until(lambda before=before: look(database, job_id).renewals > before)  # type: ignore[misc]
        clock[0] += SLOW_SWEEPS.lease_s
        assert sweeper.sweep() == 0
    assert look(database, job_id).attempt == 1


def test_a_lease_ends_by_the_sweepers_own_clock(database: Database) -> None:
    clock = [5.0]
    hands = FunctionHandler(work_on)
    job_id = add_job(database)
    with database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "gone") is not None
    sweeper = Sweeper(database, [Queue.CPU], {JobKind.TRAIN: hands}, "there", SLOW_SWEEPS, Clock(lambda: clock[0]))
    assert sweeper.sweep() == 0
    clock[0] += QUICK.lease_s - 0.1
    assert sweeper.sweep() == 0
    assert look(database, job_id).state is JobState.RUNNING
    clock[0] += 0.1
    assert sweeper.sweep() == 1
    job = look(database, job_id)
    assert (job.state, job.lease_epoch, hands.calls) == (JobState.QUEUED, 2, [("requeued", "run_1")])
    assert sweeper.sweep() == 0
    with database.reading() as session:
        assert session.get_one(Worker, "there").queues == ["cpu"]


def test_time_in_which_the_sweeper_stood_still_itself_does_not_count(database: Database) -> None:
    clock = [5.0]
    job_id = add_job(database)
    with database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "paused with the machine") is not None
    timings = replace(SLOW_SWEEPS, look_every_s=0.25)
    hands = FunctionHandler(work_on)
    sweeper = Sweeper(database, [Queue.CPU], {JobKind.TRAIN: hands}, "there", timings, Clock(lambda: clock[0]))
    looks = 0
    while look(database, job_id).state is JobState.RUNNING:
        sweeper.sweep()
        clock[0] += 3600.0
        looks += 1
    assert looks == 1 + timings.lease_s / (2 * timings.look_every_s)


def test_a_cancelled_job_without_a_holder_is_closed_as_cancelled(database: Database) -> None:
    job_id = add_job(database)
    with database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "gone") is not None
    request_cancel(database)
    hands = FunctionHandler(work_on)
    assert sweep_twice(database, hands) == 1
    assert look(database, job_id).state is JobState.CANCELLED
    assert hands.calls == [("cancelled", "run_1")]


def test_a_job_that_loses_every_worker_is_failed_as_stalled(database: Database) -> None:
    job_id = add_job(database)
    hands = FunctionHandler(work_on)
    for _ in range(jobs.MAX_ATTEMPTS):
        with database.writing() as session:
            assert records.claim_next(session, [Queue.CPU], "gone") is not None
        assert sweep_twice(database, hands) == 1
    job = look(database, job_id)
    assert job.state is JobState.FAILED and job.error is not None
    assert (job.error["code"], job.error["detail"]) == ("stalled", "The worker of this job was lost at every attempt.")
    assert hands.calls == [("requeued", "run_1"), ("requeued", "run_1"), ("failed", "run_1", "stalled")]


def test_a_job_that_cannot_be_taken_over_is_in_no_others_way(database: Database) -> None:
    class FailingHandler(FunctionHandler):
        def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
            if job.subject_id == "run_1":
                raise RuntimeError("no such run")
            super().requeued(session, job, error)

    first, second = add_job(database, "run_1"), add_job(database, "run_2")
    with database.writing() as session:
        for _ in (first, second):
            assert records.claim_next(session, [Queue.CPU], "gone") is not None
    hands = FailingHandler(work_on)
    with capture_logs() as logs:
        assert sweep_twice(database, hands) == 1
    assert look(database, first).state is JobState.RUNNING  # all or nothing
    assert look(database, second).state is JobState.QUEUED and hands.calls == [("requeued", "run_2")]
    assert [entry["job"] for entry in logs if entry["event"] == "take-over failed"] == [first]


def test_a_running_sweeper_takes_over_by_itself_and_stops(database: Database, start_loop: StartLoop) -> None:
    job_id = add_job(database)
    with database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "gone") is not None
    hands = FunctionHandler(lambda work: None)
    sweeper = Sweeper(database, [Queue.CPU], {JobKind.TRAIN: hands}, "there", replace(QUICK, lease_s=0.3))
    sweeper.start()
    settled(database, job_id, JobState.QUEUED)
    sweeper.stop()
    time.sleep(3 * QUICK.look_every_s)
    with database.reading() as session:
        assert session.scalars(select(Worker)).all() == [], "it has forgotten the worker and looks no more"
    start_loop(database, hands)  # whose own lease no sweeper watches any more
    assert settled(database, job_id, JobState.SUCCEEDED).attempt == 2


def test_a_sweeper_survives_an_outage(database: Database, impatient: Database, outage: Outage) -> None:
    job_id = add_job(database)
    with database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "gone") is not None
    hands = FunctionHandler(lambda work: None)
    timings = replace(QUICK, lease_s=0.5)
    sweeper = Sweeper(impatient, [Queue.CPU], {JobKind.TRAIN: hands}, "there", timings)
    with capture_logs() as logs:
        outage.begin()
        sweeper.start()
        until(lambda: [entry for entry in logs if entry["event"] == "database unavailable"])
        outage.end()
        settled(database, job_id, JobState.QUEUED)
    sweeper.stop()
