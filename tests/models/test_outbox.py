from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models import job as jobs
from models import outbox
from models.job import Job, JobKind, JobState, Lease, Queue
from models.outbox import Outbox
from models.session import Database


def owing_run(session: Session, name: str) -> str:
    run_id = records.queued_run(session, records.ready_version(session, name)).id
    outbox.add_to_outbox(session, run_id, "started", {})
    return run_id


def publish_jobs(database: Database) -> dict[str, int]:
    with database.reading() as session:
        counted = select(Job.subject_id, func.count()).where(Job.kind == JobKind.PUBLISH).group_by(Job.subject_id)
        return {row.subject_id: row[1] for row in session.execute(counted)}


def test_a_run_that_is_owed_something_gets_one_publish_job(database: Database) -> None:
    with database.writing() as session:
        first, second = owing_run(session, "first"), owing_run(session, "second")
        records.queued_run(session, records.ready_version(session, "third"))
        outbox.add_to_outbox(session, first, "fold", {"fold": 0})
    with database.writing() as session:
        assert outbox.add_publish_jobs(session) == 2
        assert outbox.add_publish_jobs(session) == 0
    assert publish_jobs(database) == {first: 1, second: 1}
    with database.writing() as session:
        job = records.claim_next(session, [Queue.TRACKING], "here")
    assert job is not None
    with database.writing() as session:
        assert outbox.add_publish_jobs(session) == 0  # running counts too
        jobs.finish(session, Lease(job.id, job.lease_epoch), JobState.SUCCEEDED)
        assert outbox.add_publish_jobs(session) == 1  # still owed, though nobody works on it
    assert publish_jobs(database) == {first: 2, second: 1}


def test_two_workers_that_look_at_once_make_one_publish_job(database: Database) -> None:
    with database.writing() as session:
        runs = [owing_run(session, f"set-{number}") for number in range(4)]
    together = threading.Barrier(4)

    def look_for_work(_: int) -> int:
        together.wait()
        with database.writing() as session:
            return outbox.add_publish_jobs(session)

    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(look_for_work, range(4)))
    assert publish_jobs(database) == dict.fromkeys(runs, 1)
    assert sum(added) == 4


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_publish_job_that_another_worker_is_just_adding_is_not_counted(database: Database) -> None:
    with database.writing() as session:
        owing_run(session, "flowers")
    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        assert outbox.add_publish_jobs(session) == 1  # not committed yet: the other one does not see it

        def look_for_work() -> int:
            with database.writing() as other:
                return outbox.add_publish_jobs(other)

        added = pool.submit(look_for_work)
        with pytest.raises(TimeoutError):
            added.result(timeout=0.3)
        session.commit()
        assert added.result(timeout=120) == 0


def test_what_mlflow_is_owed_stands_in_the_order_it_became_true(database: Database) -> None:
    kinds = ["started", "fold", "fold", "finished", "alias"]
    with database.writing() as session:
        run_id, other = owing_run(session, "mine"), owing_run(session, "other")
        for number, kind in enumerate(kinds[1:]):
            outbox.add_to_outbox(session, run_id, kind, {"number": number})
            outbox.add_to_outbox(session, other, "fold", {"number": number})
    with database.reading() as session:
        rows = outbox.get_unsent_rows(session, run_id)
        assert [row.kind for row in rows] == kinds
        assert [row.payload for row in rows] == [{}, *({"number": number} for number in range(4))]
        assert records.count(session, Outbox) == 10


def test_the_end_of_a_run_is_owed_if_its_start_was_or_mlflow_has_it(database: Database) -> None:
    with database.writing() as session:
        unknown, started, known = (
            records.queued_run(session, records.ready_version(session, name)) for name in ("a", "b", "c")
        )
        outbox.add_to_outbox(session, started.id, "started", {})
        known.mlflow_run_id = "1234"
        for run in (unknown, started, known):
            outbox.add_end_to_outbox(session, run.id)
        kinds = [[row.kind for row in outbox.get_unsent_rows(session, run.id)] for run in (unknown, started, known)]
    assert kinds == [[], ["started", "finished"], ["finished"]]
