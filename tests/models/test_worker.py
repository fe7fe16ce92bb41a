from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import records
from sqlalchemy import update

from models import job as jobs
from models import run_jobs
from models import worker as workers
from models.base import now
from models.job import Job, JobKind, JobState, Queue
from models.run import Run
from models.session import Database
from models.worker import GPU_GRACE_S, Worker


def test_a_worker_is_seen_each_time_it_looks(database: Database) -> None:
    with database.writing() as session:
        workers.see_worker(session, "here-1", [Queue.CPU, Queue.INGEST])
    with database.reading() as session:
        first = session.get_one(Worker, "here-1")
        assert first.queues == ["cpu", "ingest"]
    with database.writing() as session:
        workers.see_worker(session, "here-1", [Queue.CPU, Queue.INGEST])
    with database.reading() as session:
        again = session.get_one(Worker, "here-1")
        assert again.looked_at > first.looked_at and again.started_at == first.started_at


def see(database: Database, *queues: Queue, ago_s: float = 0.0) -> None:
    with database.writing() as session:
        workers.see_worker(session, "there", queues)
        session.execute(update(Worker).values(looked_at=now() - timedelta(seconds=ago_s)))


def wanted_queue(database: Database, *, learns_layers: bool) -> Queue:
    with database.reading() as session:
        return workers.training_queue(session, learns_layers)


def test_a_network_that_learns_goes_to_a_gpu_where_one_is_served(database: Database) -> None:
    assert wanted_queue(database, learns_layers=True) is Queue.CPU
    see(database, Queue.GPU)
    assert wanted_queue(database, learns_layers=True) is Queue.GPU
    assert wanted_queue(database, learns_layers=False) is Queue.CPU
    see(database, Queue.GPU, ago_s=GPU_GRACE_S + 1)
    assert wanted_queue(database, learns_layers=True) is Queue.CPU


@pytest.mark.parametrize(
    ("recipe", "is_fanned_out"),
    [
        ({"mode": "feature-extraction", "network": None}, False),
        ({"mode": "feature-extraction"}, False),  # as versions wrote it that knew no networks from scratch
        ({"mode": "fine-tuning"}, True),
        ({"mode": "from-scratch", "network": {"kind": "cnn"}}, True),
        ({"mode": "from-scratch", "network": {"kind": "perceptron"}}, False),
    ],
)
def test_folds_are_jobs_of_their_own_where_layers_learn(recipe: dict[str, Any], is_fanned_out: bool) -> None:
    assert run_jobs.has_fold_jobs(Run(recipe=recipe)) is is_fanned_out


def test_a_worker_serves_what_it_said_last_and_one_whose_clock_is_ahead_is_not_waited_for(database: Database) -> None:
    see(database, Queue.GPU, ago_s=-6 * 3600)
    assert wanted_queue(database, learns_layers=True) is Queue.CPU
    see(database, Queue.GPU)
    see(database, Queue.CPU, Queue.INGEST)
    assert wanted_queue(database, learns_layers=True) is Queue.CPU


def test_what_waits_for_a_gpu_can_be_moved_to_the_processors(database: Database) -> None:
    with database.writing() as session:
        project = records.PRINCIPAL.project_id
        waiting, running = (
            jobs.add_job(session, project, JobKind.TRAIN, Queue.GPU, subject).id for subject in ("run_1", "run_2")
        )
        session.execute(update(Job).where(Job.id == running).values(state=JobState.RUNNING))
    with database.writing() as session:
        assert workers.move_to_cpu(session) == 1
    with database.reading() as session:
        assert [session.get_one(Job, job_id).queue for job_id in (waiting, running)] == [Queue.CPU, Queue.GPU]


LIVE_S = 15.0


def free(database: Database) -> dict[str, int]:
    with database.reading() as session:
        return {queue.value: count for queue, count in workers.count_free(session, LIVE_S).items() if count}


def test_slots_are_free_on_live_workers_that_have_no_job(database: Database) -> None:
    assert free(database) == {}
    with database.writing() as session:
        workers.see_worker(session, "one", [Queue.CPU])
        workers.see_worker(session, "two", [Queue.CPU])
        workers.see_worker(session, "three", [Queue.INGEST, Queue.TRACKING])
    assert free(database) == {"cpu": 2, "ingest": 1, "tracking": 1}
    with database.writing() as session:
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.TRAIN, Queue.CPU, "run_1")
        assert records.claim_next(session, [Queue.CPU], "two") is not None
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.INGEST, Queue.INGEST, "dsv_1")
        assert records.claim_next(session, [Queue.INGEST], "three") is not None
    assert free(database) == {"cpu": 1}, "a worker has one slot, whatever it serves"


@pytest.mark.parametrize("ago_s", [LIVE_S + 1, -LIVE_S - 1])
def test_a_worker_that_was_not_seen_lately_has_no_free_slot(database: Database, ago_s: float) -> None:
    see(database, Queue.CPU, ago_s=ago_s)
    assert free(database) == {}


def test_a_worker_that_has_ended_is_forgotten(database: Database) -> None:
    see(database, Queue.CPU)
    with database.writing() as session:
        workers.remove_worker(session, "there")
    assert free(database) == {}
    with database.reading() as session:
        assert session.get(Worker, "there") is None
