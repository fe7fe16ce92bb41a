from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import records
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from errors import DatasetRefused, Unavailable
from models import job as jobs
from models.base import now
from models.job import (
    MAX_ATTEMPTS,
    Job,
    JobKind,
    JobState,
    Lease,
    LeaseLost,
    LeaseObservation,
    Queue,
    attempts_are_used_up,
    back_off_s,
    is_retried,
)
from models.session import Database

PROJECT = records.PRINCIPAL.project_id


def add(database: Database, *subjects: str, kind: JobKind = JobKind.TRAIN, queue: Queue = Queue.CPU) -> list[str]:
    """Queue one job for each subject; return the ids of the jobs."""
    with database.writing() as session:
        return [jobs.add_job(session, PROJECT, kind, queue, subject).id for subject in subjects]


def claim(database: Database, queues: Sequence[Queue] = (Queue.CPU,), owner: str = "here") -> Job | None:
    with database.writing() as session:
        return records.claim_next(session, queues, owner)


def claimed(database: Database) -> tuple[Job, Lease]:
    """Claim the job that is due."""
    job = claim(database)
    assert job is not None
    return job, Lease(job.id, job.lease_epoch)


def look(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.get_one(Job, job_id)


def sight(database: Database) -> LeaseObservation:
    with database.reading() as session:
        (observation,) = jobs.observe_leases(session)
        return observation


def take_over(database: Database, observation: LeaseObservation) -> Job | None:
    with database.writing() as session:
        return jobs.take_over(session, observation)


def change(database: Database, job_id: str, **values: object) -> None:
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


# --- claim ---------------------------------------------------------------------------------------------------------


def test_one_job_has_one_winner_among_many_threads(database: Database) -> None:
    add(database, "run_1")
    together = threading.Barrier(8)

    def race(owner: str) -> Job | None:
        together.wait()
        return claim(database, owner=owner)

    with ThreadPoolExecutor(8) as pool:
        won = [job for job in pool.map(race, [f"worker-{number}" for number in range(8)]) if job is not None]
    assert len(won) == 1
    assert look(database, won[0].id).lease_owner == won[0].lease_owner
    assert (won[0].lease_epoch, won[0].attempt, won[0].state) == (1, 1, JobState.RUNNING)


def test_many_threads_claim_every_job_once(database: Database) -> None:
    ids = add(database, *[f"run_{number}" for number in range(24)])

    def work_off(owner: str) -> list[str]:
        found = []
        while (job := claim(database, owner=owner)) is not None:
            found.append(job.id)
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work_off, "abcd"))
    assert sorted(job_id for ids_of_one in found for job_id in ids_of_one) == sorted(ids)


def test_the_oldest_job_is_claimed_first(database: Database) -> None:
    ids = add(database, "run_1", "run_2", "run_3")
    assert [claimed(database)[0].id for _ in ids] == ids
    assert claim(database) is None


def test_a_higher_priority_goes_before_age(database: Database) -> None:
    first, second, third = add(database, "run_1", "run_2", "run_3")
    change(database, third, priority=5)
    change(database, second, priority=-1)
    assert [claimed(database)[0].id for _ in range(3)] == [third, first, second]


def test_a_job_is_not_claimed_before_its_time(database: Database) -> None:
    early, late = add(database, "run_1", "run_2")
    change(database, late, next_attempt_at=now() + timedelta(seconds=50))
    assert claimed(database)[0].id == early
    assert claim(database) is None
    change(database, late, next_attempt_at=now() - timedelta(seconds=1))
    job, _ = claimed(database)
    assert job.id == late and job.next_attempt_at is None


def test_a_job_does_not_wait_longer_because_the_clock_was_set_back(database: Database) -> None:
    (job_id,) = add(database, "run_1")
    change(database, job_id, next_attempt_at=now() + timedelta(hours=1))
    assert claimed(database)[0].id == job_id


def test_only_jobs_of_the_asked_queues_are_claimed(database: Database) -> None:
    (ingest,) = add(database, "dsv_1", kind=JobKind.INGEST, queue=Queue.INGEST)
    assert claim(database, (Queue.CPU, Queue.GPU)) is None
    job = claim(database, (Queue.CPU, Queue.INGEST))
    assert job is not None and job.id == ingest


# --- the holder ----------------------------------------------------------------------------------------------------


def test_a_holder_renews_and_finishes(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    with database.writing() as session:
        assert jobs.renew(session, lease) is False
        assert jobs.renew(session, lease) is False
    assert look(database, job.id).renewals == 2
    with database.writing() as session:
        assert jobs.hold(session, lease).id == job.id
        jobs.finish(session, lease, JobState.SUCCEEDED)
    done = look(database, job.id)
    assert (done.state, done.lease_owner, done.error) == (JobState.SUCCEEDED, None, None)
    assert done.finished_at is not None and done.renewals == 2


HOLDERS_WRITES: dict[str, Callable[[Session, Lease], object]] = {
    "hold": jobs.hold,
    "renew": jobs.renew,
    "finish": lambda session, lease: jobs.finish(session, lease, JobState.SUCCEEDED),
    "give back": jobs.give_back,
}


def assert_nothing_can_be_written(database: Database, lease: Lease) -> None:
    before = look(database, lease.job_id)
    for name, write in HOLDERS_WRITES.items():
        with pytest.raises(LeaseLost), database.writing() as session:
            write(session, lease)
        after = look(database, lease.job_id)
        assert (after.state, after.lease_epoch, after.renewals, after.attempt) == (
            before.state,
            before.lease_epoch,
            before.renewals,
            before.attempt,
        ), name


def test_a_holder_that_was_taken_over_writes_nothing(database: Database) -> None:
    add(database, "run_1")
    _, lease = claimed(database)
    assert take_over(database, sight(database)) is not None
    assert_nothing_can_be_written(database, lease)
    claimed(database)  # and neither while the next holder works
    assert_nothing_can_be_written(database, lease)


def test_a_finished_job_cannot_be_finished_again(database: Database) -> None:
    add(database, "run_1")
    _, lease = claimed(database)
    with database.writing() as session:
        jobs.finish(session, lease, JobState.FAILED, {"code": "crashed", "detail": "x"})
    assert_nothing_can_be_written(database, lease)
    assert look(database, lease.job_id).error == {"code": "crashed", "detail": "x"}


def test_a_job_that_is_given_back_can_be_claimed_at_once(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    with database.writing() as session:
        assert jobs.give_back(session, lease) is JobState.QUEUED
    waiting = look(database, job.id)
    assert (waiting.state, waiting.attempt, waiting.lease_owner) == (JobState.QUEUED, 1, None)
    again, _ = claimed(database)
    assert (again.id, again.attempt, again.lease_epoch, again.renewals) == (job.id, 2, 2, 0)


def test_a_job_that_is_given_back_for_later_waits(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    before = now()
    with database.writing() as session:
        jobs.give_back(session, lease, delay_s=30)
    after = now()
    assert claim(database) is None
    due = look(database, job.id).next_attempt_at
    assert due is not None and before <= due - timedelta(seconds=30) <= after


def test_a_job_that_should_be_cancelled_is_not_queued_again(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    with database.writing() as session:
        jobs.request_cancel(session, "run_1", JobKind.TRAIN)
        assert jobs.give_back(session, lease, delay_s=30) is JobState.CANCELLED
    ended = look(database, job.id)
    assert ended.state is JobState.CANCELLED and ended.finished_at is not None and ended.lease_owner is None
    assert_nothing_can_be_written(database, lease)


def test_an_attempt_that_does_not_count_is_given_back_uncounted(database: Database) -> None:
    (job_id,) = add(database, "run_1")
    for _ in range(MAX_ATTEMPTS + 2):
        job, lease = claimed(database)
        assert job.attempt == 1
        with database.writing() as session:
            jobs.give_back(session, lease, counts=False)
    assert look(database, job_id).attempt == 0


# --- taking over ---------------------------------------------------------------------------------------------------


def test_a_job_whose_holder_stood_still_is_queued_again(database: Database) -> None:
    add(database, "run_1")
    _, lease = claimed(database)
    job = take_over(database, sight(database))
    assert job is not None
    assert (job.state, job.lease_epoch, job.attempt, job.lease_owner) == (JobState.QUEUED, lease.epoch + 1, 1, None)
    again, newer = claimed(database)
    assert again.attempt == 2 and newer.epoch > lease.epoch + 1


def test_a_sighting_that_no_longer_stands_takes_nothing_over(database: Database) -> None:
    add(database, "run_1")
    _, lease = claimed(database)
    observation = sight(database)
    with database.writing() as session:
        jobs.renew(session, lease)
    assert take_over(database, observation) is None
    assert take_over(database, sight(database)) is not None  # the fresh one does
    assert take_over(database, observation) is None
    assert take_over(database, LeaseObservation(lease.job_id, lease.epoch + 1, 0)) is None  # queued: nobody holds it
    with database.writing() as session:
        claimed_again = records.claim_next(session, [Queue.CPU], "there")
        assert claimed_again is not None
        jobs.hold(session, Lease(claimed_again.id, claimed_again.lease_epoch))


def test_two_sweepers_take_a_job_over_once(database: Database) -> None:
    add(database, "run_1")
    claimed(database)
    observation = sight(database)
    together = threading.Barrier(4)

    def sweep(_: int) -> Job | None:
        together.wait()
        return take_over(database, observation)

    with ThreadPoolExecutor(4) as pool:
        assert sum(job is not None for job in pool.map(sweep, range(4))) == 1
    assert look(database, observation.job_id).lease_epoch == observation.epoch + 1


def test_a_job_that_should_be_cancelled_is_cancelled_at_its_take_over(database: Database) -> None:
    add(database, "run_1")
    claimed(database)
    with database.writing() as session:
        assert jobs.request_cancel(session, "run_1", JobKind.TRAIN) == 0
    job = take_over(database, sight(database))
    assert job is not None and job.state is JobState.CANCELLED and job.finished_at is not None
    assert claim(database) is None


def test_a_job_whose_attempts_are_used_up_is_failed_at_its_take_over(database: Database) -> None:
    add(database, "run_1")
    states = []
    for _ in range(MAX_ATTEMPTS):
        claimed(database)
        job = take_over(database, sight(database))
        assert job is not None
        states.append(job.state)
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]
    assert claim(database) is None


def test_only_running_jobs_are_sighted(database: Database) -> None:
    add(database, "run_1", "run_2")
    assert claim(database) is not None
    with database.reading() as session:
        assert len(jobs.observe_leases(session)) == 1


def test_only_transient_errors_with_attempts_left_are_retried() -> None:
    first = Job(kind=JobKind.INGEST, attempt=1)
    last = Job(kind=JobKind.INGEST, attempt=3)
    purge = Job(kind=JobKind.PURGE, attempt=500)
    away, bad = Unavailable("away"), DatasetRefused("bad")
    assert is_retried(first, away) and is_retried(purge, away)
    assert not is_retried(last, away) and not is_retried(first, bad)
    publication = Job(kind=JobKind.PUBLISH, attempt=500)
    assert is_retried(publication, away) and is_retried(publication, bad)  # or a new job would be made at once
    assert attempts_are_used_up(last) and not attempts_are_used_up(purge)
    assert [back_off_s(attempt) for attempt in (1, 2, 3, 6, 500)] == [2, 4, 8, 60, 60]


# --- cancelling ----------------------------------------------------------------------------------------------------


def request_cancel(database: Database, subject: str = "run_1") -> int:
    with database.writing() as session:
        return jobs.request_cancel(session, subject, JobKind.TRAIN)


def test_a_queued_job_is_cancelled_here_and_now(database: Database) -> None:
    job_id, other = add(database, "run_1", "run_2")
    assert request_cancel(database) == 1
    job = look(database, job_id)
    assert job.state is JobState.CANCELLED and job.finished_at is not None and job.cancel_requested_at is not None
    assert claimed(database)[0].id == other
    assert claim(database) is None


def test_a_running_job_is_told_to_end_at_its_next_renewal(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    assert request_cancel(database) == 0
    asked_at = look(database, job.id).cancel_requested_at
    assert look(database, job.id).state is JobState.RUNNING and asked_at is not None
    assert request_cancel(database) == 0  # asking twice changes nothing
    assert look(database, job.id).cancel_requested_at == asked_at
    with database.writing() as session:
        assert jobs.is_cancel_requested(session, job.id) is True
        assert jobs.renew(session, lease) is True


def test_a_finished_job_is_not_cancelled(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    with database.writing() as session:
        jobs.finish(session, lease, JobState.SUCCEEDED)
    assert request_cancel(database) == 0
    assert request_cancel(database, "run_unknown") == 0
    done = look(database, job.id)
    assert done.state is JobState.SUCCEEDED and done.cancel_requested_at is None


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_job_that_is_given_back_in_this_moment_is_cancelled_nevertheless(database: Database) -> None:
    add(database, "run_1")
    job, lease = claimed(database)
    asking = threading.Event()

    def ask() -> int:
        asking.set()
        return request_cancel(database)

    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        jobs.give_back(session, lease)  # not committed yet: others still see the job running
        ended = pool.submit(ask)
        asking.wait()
        with pytest.raises(TimeoutError):
            ended.result(timeout=0.3)
        session.commit()
        assert ended.result(timeout=120) == 1
    assert look(database, job.id).state is JobState.CANCELLED


def test_cancelling_touches_no_job_of_another_kind_or_subject(database: Database) -> None:
    publish, other = [
        *add(database, "run_1", kind=JobKind.PUBLISH, queue=Queue.TRACKING),
        *add(database, "run_2"),
    ]
    assert request_cancel(database, "run_1") == 0
    assert look(database, publish).state is look(database, other).state is JobState.QUEUED


def test_the_other_parts_of_what_failed_end_and_lose_their_leases(database: Database) -> None:
    with database.writing() as session:
        first = jobs.add_job(session, PROJECT, JobKind.TRAIN, Queue.CPU, "run_1")
        for index in range(3):
            jobs.add_job(session, PROJECT, JobKind.FOLD, Queue.CPU, "run_1", index=index, parent_id=first.id)
        jobs.add_job(session, PROJECT, JobKind.TRAIN, Queue.CPU, "run_2")
    _, done = claimed(database)
    with database.writing() as session:
        jobs.finish(session, done, JobState.SUCCEEDED)
    failed, mine = claimed(database)
    working, other = claimed(database)
    with database.writing() as session:
        assert jobs.end_others(session, jobs.hold(session, mine)) == 2
    assert_nothing_can_be_written(database, other)
    after = look(database, working.id)
    assert (after.state, after.lease_epoch, after.lease_owner) == (JobState.CANCELLED, other.epoch + 1, None)
    assert after.finished_at is not None and after.cancel_requested_at is not None
    assert look(database, failed.id).state is JobState.RUNNING
    assert look(database, done.job_id).state is JobState.SUCCEEDED
    again = claim(database)
    assert again is not None and again.subject_id == "run_2", "what was queued of the failed one is not begun"
    add(database, "run_1")  # and the same work can be owed anew


# --- one unfinished job per subject ----------------------------------------------------------------------------------


def test_a_subject_has_one_unfinished_job_of_a_kind(database: Database) -> None:
    add(database, "run_1")
    with pytest.raises(IntegrityError):
        add(database, "run_1")
    _, lease = claimed(database)
    with pytest.raises(IntegrityError):
        add(database, "run_1")
    add(database, "run_1", kind=JobKind.PUBLISH, queue=Queue.TRACKING)
    with database.writing() as session:
        jobs.finish(session, lease, JobState.SUCCEEDED)
    add(database, "run_1")  # a finished one is in nobody's way


# --- display -------------------------------------------------------------------------------------------------------


def test_unfinished_jobs_are_counted_by_queue_and_state(database: Database) -> None:
    add(database, "run_1", "run_2", "run_3")
    add(database, "dsv_1", kind=JobKind.INGEST, queue=Queue.INGEST)
    claimed(database)
    request_cancel(database, "run_3")
    with database.reading() as session:
        assert jobs.count_jobs(session) == {
            (Queue.CPU, JobState.QUEUED): 1,
            (Queue.CPU, JobState.RUNNING): 1,
            (Queue.INGEST, JobState.QUEUED): 1,
        }
