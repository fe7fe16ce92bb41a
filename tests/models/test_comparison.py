from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from records import PRINCIPAL, digest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from errors import NotFound
from models import comparison as comparisons
from models import job as jobs
from models import outbox, run_jobs
from models import run as runs
from models.base import now
from models.comparison import Comparison, ComparisonState
from models.job import Job, JobKind, JobState, Queue
from models.project import Principal
from models.run import RunState
from models.session import Database
from recipes.recipe import Recipe

ENDS: dict[str, Callable[[Session, str], object]] = {
    "succeeded": lambda session, run_id: runs.succeed_run(session, run_id, {}, 1.0),
    "failed": lambda session, run_id: runs.fail_run(session, run_id, {"code": "crashed", "detail": "It died."}),
    "cancelled": runs.cancel_run,
}


def new_comparison(database: Database, recipes: int = 2) -> tuple[str, list[str]]:
    """Add a comparison; return its id and the ids of its runs."""
    with database.writing() as session:
        comparison = records.queued_comparison(session, records.ready_version(session), recipes)
        return comparison.id, [run.id for run in comparisons.get_runs(session, comparison.id)]


def end(database: Database, run_id: str, how: str) -> Job | None:
    """Start a run and end it; return the table job that this queues, or None."""
    with database.writing() as session:
        runs.start_run(session, run_id)
        comparisons.on_run_started(session, run_id)
    with database.writing() as session:
        ENDS[how](session, run_id)
        last = session.scalars(select(Job).where(Job.subject_id == run_id).order_by(Job.id)).all()[-1]
        last.state = JobState(how)
        return comparisons.on_run_ended(session, run_id)


def look(database: Database, comparison_id: str) -> Comparison:
    with database.reading() as session:
        return comparisons.get_comparison(session, PRINCIPAL, comparison_id)


def compare_jobs(database: Database) -> list[JobState]:
    with database.reading() as session:
        return list(session.scalars(select(Job.state).where(Job.kind == JobKind.COMPARE).order_by(Job.id)))


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)  # SQLite lets one write at a time
def test_a_cancelled_run_waits_for_a_table_that_is_written_and_the_table_not_for_it(database: Database) -> None:
    comparison_id, [run_id, *_] = new_comparison(database)
    is_held = threading.Event()

    def cancel() -> None:
        with database.writing() as session:
            runs.lock_run(session, run_id)
            is_held.set()
            comparisons.cancel_comparison(session, comparison_id)

    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        comparisons.on_run_started(session, run_id)  # holds the comparison
        cancelled = pool.submit(cancel)
        assert is_held.wait(60)
        session.execute(text("SET LOCAL lock_timeout = '20s'"))
        outbox.add_to_outbox(session, run_id, "compared", {})  # its row names the run that is held
        session.flush()
        session.commit()
        cancelled.result(60)
    assert look(database, comparison_id).state is ComparisonState.CANCELLED


def test_a_comparison_begins_with_a_queued_run_and_a_job_for_each_recipe(database: Database) -> None:
    with database.writing() as session:
        version = records.ready_version(session)
        recipes = [Recipe(epochs=epochs) for epochs in (3, 1, 2)]
        comparison, due = comparisons.create_comparison(session, PRINCIPAL, version.id, "flowers", recipes)
    with database.reading() as session:
        found = comparisons.get_comparison(session, PRINCIPAL, comparison.id)
        made = comparisons.get_runs(session, comparison.id)
        assert comparison.id.startswith("cmp_") and found.state is ComparisonState.QUEUED
        assert [(run.recipe["epochs"], run.name, run.state) for run in made] == [
            (epochs, "flowers", RunState.QUEUED) for epochs in (3, 1, 2)
        ]
        assert [(job.kind, job.subject_id) for job in due] == [(JobKind.TRAIN, run.id) for run in made]
        owner = comparisons.find_comparison(session, made[1].id)
        assert owner is not None and (owner[0].id, owner[1]) == (comparison.id, 1)
        assert comparisons.find_comparison(session, "run_none") is None


def test_nobody_finds_a_comparison_of_another_project(database: Database) -> None:
    comparison_id, _ = new_comparison(database)
    with database.reading() as session:
        for principal, wanted in ((Principal("prj_other"), comparison_id), (PRINCIPAL, "cmp_none")):
            with pytest.raises(NotFound, match=wanted):
                comparisons.get_comparison(session, principal, wanted)


@pytest.mark.parametrize("last", [*ENDS])
def test_the_run_that_ends_last_makes_the_table_due(database: Database, last: str) -> None:
    comparison_id, (first, second, third) = new_comparison(database, 3)
    assert end(database, third, "succeeded") is None
    assert look(database, comparison_id).state is ComparisonState.RUNNING
    assert end(database, first, "failed") is None
    job = end(database, second, last)
    assert job is not None and (job.kind, job.subject_id) == (JobKind.COMPARE, comparison_id)
    assert compare_jobs(database) == [JobState.QUEUED]
    assert look(database, comparison_id).state is ComparisonState.RUNNING


def test_the_table_is_made_before_a_run_that_waited_longer(database: Database) -> None:
    other_id, _ = new_comparison_of_its_own(database)
    comparison_id, made = new_comparison_of_its_own(database)
    for run_id in made:
        end(database, run_id, "succeeded")
    with database.writing() as session:
        job = records.claim_next(session, [Queue.CPU], "here")
        assert job is not None and (job.kind, job.subject_id) == (JobKind.COMPARE, comparison_id)
        following = records.claim_next(session, [Queue.CPU], "here")
        assert following is not None and following.kind is JobKind.TRAIN
    assert look(database, other_id).state is ComparisonState.QUEUED


@pytest.mark.parametrize("how", [*ENDS])
def test_a_run_that_is_tried_again_while_the_table_is_made_owes_no_second_one(database: Database, how: str) -> None:
    comparison_id, (first, second) = new_comparison(database)
    end(database, first, "succeeded")
    assert end(database, second, "failed") is not None
    with database.writing() as session:
        runs.reopen_run(session, second)
        runs.start_run(session, second)
        ENDS[how](session, second)
        assert comparisons.on_run_ended(session, second) is None
    assert compare_jobs(database) == [JobState.QUEUED]
    assert look(database, comparison_id).state is ComparisonState.RUNNING


def test_a_run_of_no_comparison_owes_no_table(database: Database) -> None:
    with database.writing() as session:
        run = records.queued_run(session, records.ready_version(session))
        run_id = jobs.add_job(session, run.project_id, JobKind.TRAIN, Queue.CPU, run.id).subject_id
    assert end(database, run_id, "succeeded") is None
    assert compare_jobs(database) == []


@pytest.mark.parametrize(
    ("ends", "state", "code"),
    [
        (("failed", "failed"), "failed", "nothing-to-compare"),
        (("cancelled", "failed"), "failed", "nothing-to-compare"),
        (("cancelled", "cancelled"), "cancelled", None),
    ],
)
def test_where_no_run_succeeded_there_is_nothing_to_compare(
    database: Database, ends: tuple[str, str], state: str, code: str | None
) -> None:
    comparison_id, made = new_comparison(database)
    for run_id, how in zip(made, ends, strict=True):
        assert end(database, run_id, how) is None
    found = look(database, comparison_id)
    assert (found.state, (found.error or {}).get("code")) == (state, code)
    assert found.finished_at is not None and compare_jobs(database) == []


def test_runs_that_end_at_the_same_moment_owe_one_table(database: Database) -> None:
    for _ in range(5):
        comparison_id, made = new_comparison_of_its_own(database)
        for run_id in made:
            with database.writing() as session:
                runs.start_run(session, run_id)
        together = threading.Barrier(len(made))

        def close(run_id: str, together: threading.Barrier = together) -> str | None:
            together.wait()
            with database.writing() as session:
                runs.succeed_run(session, run_id, {}, 1.0)
                job = comparisons.on_run_ended(session, run_id)
                return job.subject_id if job else None

        with ThreadPoolExecutor(len(made)) as pool:
            due = list(pool.map(close, made))
        assert sorted(due, key=str) == [None, None, None, comparison_id]
        with database.reading() as session:
            owed = session.scalars(select(Job.id).where(Job.subject_id == comparison_id)).all()
            assert len(owed) == 1


def new_comparison_of_its_own(database: Database) -> tuple[str, list[str]]:
    with database.writing() as session:
        version = records.ready_version(session, f"flowers {records.count(session, Comparison)}")
        comparison = records.queued_comparison(session, version, 4)
        return comparison.id, [run.id for run in comparisons.get_runs(session, comparison.id)]


def test_a_table_closes_a_comparison_once(database: Database) -> None:
    comparison_id, made = new_comparison(database)
    for run_id in made:
        end(database, run_id, "succeeded")
    with database.writing() as session:
        table = {"best": 1, "rows": rows(0, 1)}
        assert comparisons.succeed_comparison(session, comparison_id, table, digest("picture"), digest("report"))
    with database.writing() as session:
        assert not comparisons.succeed_comparison(session, comparison_id, {}, digest("other"), digest("other"))
        comparisons.fail_comparison(session, comparison_id, {}, since=now())
        comparisons.cancel_comparison(session, comparison_id)
        comparisons.request_cancel(session, comparison_id)
    found = look(database, comparison_id)
    assert (found.state, found.table, found.error) == (ComparisonState.SUCCEEDED, table, None)
    assert (found.picture_sha256, found.report_sha256) == (digest("picture"), digest("report"))


def rows(*positions: int) -> list[dict[str, int]]:
    """Return the rows of a table."""
    return [{"position": position} for position in positions]


def compared(database: Database, comparison_id: str, name: str, *positions: int) -> bool:
    """Save the table of a comparison, as the table job does."""
    with database.writing() as session:
        (job,) = session.scalars(select(Job).where(Job.kind == JobKind.COMPARE, Job.state == JobState.QUEUED))
        table = {"name": name, "rows": rows(*positions)}
        done = comparisons.succeed_comparison(session, comparison_id, table, digest(name), digest(name))
        job.state = JobState.SUCCEEDED
        return done


def try_again(database: Database, run_id: str) -> None:
    with database.writing() as session:
        run_jobs.retry(session, runs.get_run(session, PRINCIPAL, run_id))
        comparisons.on_run_retried(session, run_id)


def test_a_failed_run_that_is_tried_again_comes_into_the_table(database: Database) -> None:
    comparison_id, (first, second) = new_comparison(database)
    end(database, first, "succeeded")
    end(database, second, "failed")
    assert compared(database, comparison_id, "one", 0)
    try_again(database, second)
    found = look(database, comparison_id)
    assert (found.state, found.finished_at) == (ComparisonState.RUNNING, None)
    assert found.table is not None and found.table["name"] == "one", "it is shown until there is another"
    assert end(database, second, "succeeded") is not None
    assert compared(database, comparison_id, "both", 0, 1)
    found = look(database, comparison_id)
    assert found.state is ComparisonState.SUCCEEDED and found.table is not None and found.table["name"] == "both"
    assert found.report_sha256 == digest("both")


def test_a_run_that_is_tried_again_may_give_a_comparison_something_to_compare(database: Database) -> None:
    comparison_id, made = new_comparison(database)
    for run_id in made:
        end(database, run_id, "failed")
    try_again(database, made[1])
    found = look(database, comparison_id)
    assert (found.state, found.error) == (ComparisonState.RUNNING, None)
    assert end(database, made[1], "succeeded") is not None
    assert compared(database, comparison_id, "one", 1)


def test_a_table_without_a_run_that_succeeded_meanwhile_is_made_anew(database: Database) -> None:
    comparison_id, (first, second) = new_comparison(database)
    end(database, first, "succeeded")
    end(database, second, "failed")
    try_again(database, second)  # while the table is made
    assert end(database, second, "succeeded") is None
    assert not compared(database, comparison_id, "one", 0)
    assert look(database, comparison_id).state is ComparisonState.RUNNING
    assert compare_jobs(database) == [JobState.SUCCEEDED, JobState.QUEUED]
    assert compared(database, comparison_id, "both", 0, 1)


def test_a_table_waits_for_a_run_that_is_tried_again_meanwhile(database: Database) -> None:
    comparison_id, (first, second) = new_comparison(database)
    end(database, first, "succeeded")
    end(database, second, "failed")
    try_again(database, second)
    assert not compared(database, comparison_id, "one", 0)
    assert look(database, comparison_id).state is ComparisonState.RUNNING
    assert end(database, second, "failed") is not None
    assert compared(database, comparison_id, "one", 0)


def test_cancelling_what_is_tried_again_leaves_what_has_been_compared(database: Database) -> None:
    comparison_id, (first, second, third) = new_comparison(database, 3)
    end(database, first, "succeeded")
    end(database, second, "failed")
    end(database, third, "failed")
    assert compared(database, comparison_id, "one", 0)
    try_again(database, second)
    try_again(database, third)
    assert end(database, third, "succeeded") is None
    with database.writing() as session:
        due = comparisons.request_cancel(session, comparison_id)
        assert due is not None and due.kind is JobKind.COMPARE
    assert look(database, comparison_id).state is ComparisonState.RUNNING
    assert compared(database, comparison_id, "two", 0, 2)
    with database.writing() as session:
        assert comparisons.request_cancel(session, comparison_id) is None, "it is over"
    found = look(database, comparison_id)
    assert found.state is ComparisonState.SUCCEEDED and found.table is not None and found.table["name"] == "two"


def test_a_cancelled_comparison_stays_so_whatever_is_tried_again(database: Database) -> None:
    comparison_id, (first, _) = new_comparison(database)
    end(database, first, "failed")
    with database.writing() as session:
        comparisons.request_cancel(session, comparison_id)
    try_again(database, first)
    assert look(database, comparison_id).state is ComparisonState.CANCELLED


def test_cancelling_ends_what_waits_and_asks_what_runs_to_end(database: Database) -> None:
    comparison_id, (done, running, _) = new_comparison(database, 3)
    end(database, done, "succeeded")
    with database.writing() as session:
        job = records.job_of(session, running)
        job.state = JobState.RUNNING
        runs.start_run(session, running)
    with database.writing() as session:
        comparisons.request_cancel(session, comparison_id)
    assert look(database, comparison_id).state is ComparisonState.CANCELLED
    with database.writing() as session:
        states = [run.state for run in comparisons.get_runs(session, comparison_id)]
        assert states == [RunState.SUCCEEDED, RunState.RUNNING, RunState.CANCELLED]
        assert jobs.is_cancel_requested(session, job.id)
        runs.cancel_run(session, running)
        assert comparisons.on_run_ended(session, running) is None, "a cancelled comparison needs no table"
    assert compare_jobs(database) == []


def test_a_comparison_is_active_until_it_has_its_table(database: Database) -> None:
    comparison_id, made = new_comparison(database)
    version = look(database, comparison_id).dataset_version_id
    for run_id in made:
        end(database, run_id, "succeeded")
    with database.writing() as session:
        assert not runs.is_any_active(session, [version]) and comparisons.is_any_active(session, [version])
        assert not comparisons.is_any_active(session, ["dsv_other"])
        table = {"rows": rows(0, 1)}
        comparisons.succeed_comparison(session, comparison_id, table, digest("picture"), digest("report"))
        assert not comparisons.is_any_active(session, [version])
