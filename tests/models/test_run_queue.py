from __future__ import annotations

from datetime import timedelta

import pytest
import records
from records import PRINCIPAL, RECIPE
from sqlalchemy.orm import Session

from models import comparison as comparisons
from models import job as jobs
from models import run as runs
from models import run_jobs, run_queue
from models import worker as workers
from models.base import now
from models.dataset import DatasetVersion
from models.job import JobKind, JobState, Queue
from models.run import Run, RunState
from models.session import Database
from recipes.recipe import Recipe

OTHER = RECIPE.model_copy(update={"image_size": 64})
LIVE_S = 15.0


@pytest.fixture
def version_id(database: Database) -> str:
    """A data set version of 10 images that nobody has trained on."""
    return add_version(database, "new")


def add_version(database: Database, name: str, images: int = 10) -> str:
    with database.writing() as session:
        version = records.ready_version(session, name)
        version.images = images
        return version.id


def queue(session: Session, version_id: str, recipe: Recipe = RECIPE) -> Run:
    run = runs.create_run(session, PRINCIPAL, version_id, "m", recipe)
    run_jobs.queue_training(session, run)
    return run


def past(database: Database, version_id: str, seconds: float, recipe: Recipe = RECIPE) -> None:
    """Add a run that succeeded in so many seconds."""
    with database.writing() as session:
        run = queue(session, version_id, recipe)
        records.job_of(session, run.id).state = JobState.SUCCEEDED
        run.state, run.finished_at = RunState.SUCCEEDED, now()
        run.started_at = run.finished_at - timedelta(seconds=seconds)


def start(session: Session, run: Run, **progress: float | str) -> None:
    records.job_of(session, run.id).state = JobState.RUNNING
    runs.start_run(session, run.id).progress = runs.progress(**progress)


def places(session: Session, *found: Run) -> list[tuple[int, float | None]]:
    known = run_queue.find_places(session, found, LIVE_S)
    return [(known[run.id].position, known[run.id].eta_s) for run in found]


def test_a_queued_run_knows_its_position_and_without_past_runs_no_time(database: Database, version_id: str) -> None:
    with database.writing() as session:
        workers.see_worker(session, "here", [Queue.CPU])
        first, second, running = (queue(session, version_id) for _ in range(3))
        start(session, running, stage="folds", eta_s=5.0)
        jobs.add_job(session, first.project_id, JobKind.INGEST, Queue.INGEST, "elsewhere")
        assert places(session, first, second) == [(1, None), (2, None)]
        jobs.add_job(session, first.project_id, JobKind.VIEW, Queue.CPU, "urgent", priority=jobs.UNDER_WAY)
        assert places(session, second) == [(3, None)]
        assert run_queue.find_places(session, [running], LIVE_S) == {}


def test_the_wait_is_that_for_the_runs_before_and_then_for_similar_ones_of_the_past(
    database: Database, version_id: str
) -> None:
    past(database, add_version(database, "old", images=100), seconds=600)
    past(database, version_id, seconds=40, recipe=OTHER)
    past(database, version_id, seconds=50, recipe=OTHER)
    with database.writing() as session:
        workers.see_worker(session, "here", [Queue.CPU, Queue.INGEST])
        running, first, second = (queue(session, version_id) for _ in range(3))
        other = queue(session, version_id, OTHER)
        unknown = queue(session, version_id, RECIPE.model_copy(update={"image_size": 32}))
        last = queue(session, version_id)
        start(session, running, stage="folds", eta_s=5.0)
        expected = [(1, 65.0), (2, 125.0), (3, 170.0), (4, None), (5, None)]
        assert places(session, first, second, other, unknown, last) == expected
        start(session, first, stage="features", eta_s=1.0)
        first.started_at = now() - timedelta(seconds=1000)  # later than expected
        workers.see_worker(session, "too", [Queue.CPU])
        assert places(session, second, other) == [(1, 60.0), (2, 50.0)], "one waits 0 s, the other 5 s"


def test_without_a_worker_nobody_knows_when_a_run_begins(database: Database, version_id: str) -> None:
    past(database, version_id, seconds=60)
    with database.writing() as session:
        workers.see_worker(session, "busy with uploads", [Queue.INGEST])
        assert places(session, queue(session, version_id)) == [(1, None)]


def test_a_comparison_waits_for_its_last_run(database: Database, version_id: str) -> None:
    past(database, version_id, seconds=60)
    with database.writing() as session:
        workers.see_worker(session, "here", [Queue.CPU])
        queue(session, version_id)
        made = comparisons.get_runs(
            session, records.queued_comparison(session, session.get_one(DatasetVersion, version_id)).id
        )
        assert places(session, *made) == [(2, 120.0), (3, 180.0)]
