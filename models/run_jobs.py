"""The jobs of a run, and how the end of each job changes the run.

    train   prepares weights and features; if the run trains only heads, also trains all folds and makes the model
    fold    trains one fold of a run that trains layers; any free worker can do it
    final   evaluates the run over all folds and makes the model

When the last fold ends, the same transaction queues the final job. To avoid deadlocks, every transaction locks rows in
the order job, run, comparison.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from artifacts.store import Digest
from errors import NotReady
from models import job as jobs
from models import run as runs
from models import worker as workers
from models.dataset import Dataset, DatasetVersion
from models.job import Job, JobKind
from models.outbox import add_end_to_outbox, add_to_outbox
from models.run import Fold, Run, RunState
from recipes.layers import NetworkKind
from recipes.recipe import Mode

TRAINING = (JobKind.TRAIN, JobKind.FOLD, JobKind.FINAL)


def queue_training(session: Session, run: Run) -> Job:
    """Queue the train job of a run. Jobs of earlier attempts at the run can no longer change it."""
    queue = workers.training_queue(session, _learns_layers(run))
    job = jobs.add_job(session, run.project_id, JobKind.TRAIN, queue, run.id)
    run.job_id = job.id
    return job


def has_fold_jobs(run: Run) -> bool:
    """Return whether each fold of a run is trained by a job of its own.

    If the run trains only heads or a perceptron, one job trains all folds, because training such a fold takes less time
    than starting another process.
    """
    return _learns_layers(run)


def _learns_layers(run: Run) -> bool:
    """Return whether a run trains more than heads or a single layer."""
    network = run.recipe.get("network")
    if network is not None and network["kind"] == NetworkKind.PERCEPTRON:
        return False
    return Mode(run.recipe["mode"]) is not Mode.FEATURE_EXTRACTION


def count_folds(run: Run) -> int:
    """Return the number of folds of a run: folds per repeat times repeats."""
    return int(run.recipe["folds"]["k"]) * int(run.recipe["folds"]["repeats"])


def lock_active_run(session: Session, job: Job) -> Run | None:
    """Lock and return the run of a job; return None if the run has ended or the job belongs to an earlier attempt."""
    run = runs.lock_run(session, job.subject_id)
    return None if run.state.is_final or run.job_id not in (job.id, job.parent_id) else run


def get_progress(session: Session, run: Run) -> list[dict[str, Any]]:
    """Return the progress records that the running jobs of a run have saved."""
    assert run.job_id is not None
    return [job.progress for job in jobs.running_jobs(session, run.job_id) if job.progress is not None]


def mark_started(session: Session, job: Job) -> Run | None:
    """Mark the run of a job as running and return it; return None if `lock_active_run` does."""
    run = lock_active_run(session, job)
    if run is None or run.state is RunState.RUNNING:
        return run
    add_to_outbox(session, run.id, "started", {})
    return runs.start_run(session, run.id)


def queue_folds(session: Session, job: Job) -> list[Job]:
    """Queue a job for each unfinished fold of a run, or the final job if all folds are finished; return the new jobs.

    `job` is the train job, which has prepared the run.
    """
    run = lock_active_run(session, job)
    if run is None:
        return []
    done = {fold.number for fold in runs.get_folds(session, run.id)}
    left = [number for number in range(count_folds(run)) if number not in done]
    return [_queue(session, job, JobKind.FOLD, number) for number in left] or [_queue(session, job, JobKind.FINAL)]


def finish_fold(session: Session, job: Job, fold: Fold) -> Job | None:
    """Save the result of a fold job. If it is the last fold of the run, queue and return the final job; else None.

    Nothing is saved if the run has ended or the job belongs to an earlier attempt.
    """
    run = lock_active_run(session, job)
    if run is None:
        return None
    runs.add_fold(session, fold)
    if len(runs.get_folds(session, run.id)) < count_folds(run):
        return None
    return _queue(session, job, JobKind.FINAL)


def mark_succeeded(session: Session, job: Job, metrics: dict[str, Any], training_s: float) -> Run | None:
    """Mark the run of a job as succeeded, save its metrics, and return it; return None if `lock_active_run` does."""
    run = lock_active_run(session, job)
    if run is None:
        return None
    add_to_outbox(session, run.id, "finished", {})
    return runs.succeed_run(session, run.id, metrics, training_s)


def mark_interrupted(session: Session, job: Job, stage: str = "queued") -> None:
    """Mark the run of a job that was queued again as queued too, unless another job of the run is running."""
    run = lock_active_run(session, job)
    if run is not None and run.state is RunState.RUNNING and not _is_worked_on(session, run):
        runs.requeue_run(session, run.id, stage)


def mark_failed(session: Session, job: Job, error: dict[str, Any]) -> bool:
    """Mark the run of a failed job as failed, and cancel the run's other jobs.

    Returns False if the run has already ended or the job belongs to an earlier attempt.
    """
    jobs.end_others(session, job)
    run = lock_active_run(session, job)
    if run is None:
        return False
    if run.started_at is None:  # the worker was lost before it marked the run as started, so MLflow has no such run
        add_to_outbox(session, run.id, "started", {})
    runs.fail_run(session, run.id, error)
    add_to_outbox(session, run.id, "finished", {})
    return True


def mark_cancelled(session: Session, job: Job) -> bool:
    """Mark the run of a cancelled job as cancelled.

    Returns False if the run has already ended or the job belongs to an earlier attempt.
    """
    run = lock_active_run(session, job)
    if run is None:
        return False
    jobs.request_cancel(session, run.id, *TRAINING)  # this job may have queued further jobs just now
    runs.cancel_run(session, run.id)
    add_to_outbox(session, run.id, "finished", {})
    return True


def request_cancel(session: Session, run_id: str) -> bool:
    """Request the end of a run; return whether it was cancelled at once, because none of its jobs was running."""
    jobs.request_cancel(session, run_id, *TRAINING)
    run = runs.lock_run(session, run_id)
    if run.state.is_final or _is_worked_on(session, run):
        return False
    runs.cancel_run(session, run_id)
    add_end_to_outbox(session, run_id)
    drop_leftovers(session, run_id)  # garbage collection removes the files
    return True


def drop_leftovers(session: Session, run_id: str) -> list[Digest]:
    """Remove an ended run's references to checkpoints, fold outcomes, weights and int8 network; return the files."""
    return (
        runs.drop_outcomes(session, run_id)
        + runs.drop_checkpoints(session, run_id)
        + runs.drop_networks(session, run_id)
    )


def restart_with_half_batch(session: Session, job: Job) -> list[Digest] | None:
    """Halve the batch size of a run whose job ran out of memory, and start the run again from the beginning.

    Finished folds are trained again, because all folds must use the same batch size. Returns the files that the run no
    longer needs. Returns None, and changes nothing about the run, if its batch size was halved before, if it is being
    cancelled, if it has ended, or if the job belongs to an earlier attempt.
    """
    jobs.end_others(session, job)
    run = lock_active_run(session, job)
    if run is None or run.batch_size is not None or jobs.is_cancel_requested(session, job.id):
        return None
    runs.halve_batch(session, run.id)
    runs.requeue_run(session, run.id)
    queue_training(session, run)
    return runs.drop_folds(session, run.id) + runs.drop_checkpoints(session, run.id)


def retry(session: Session, run: Run) -> Job:
    """Queue a failed run again, and return its new train job.

    The run resumes from its finished folds and its checkpoints. These are deleted a week after the failure; after that,
    the run starts from the beginning. Raises NotReady if the run has not failed or its data set was deleted.
    """
    run = runs.lock_run(session, run.id)
    if run.state is not RunState.FAILED:
        raise NotReady(f"Only a failed run can be retried. This run is {run.state.value}.")
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    if session.get_one(Dataset, version.dataset_id).deleted_at is not None:
        raise NotReady("The data set of this run was deleted. Upload the images again and start a new run.")
    runs.reopen_run(session, run.id)
    return queue_training(session, run)


def _is_worked_on(session: Session, run: Run) -> bool:
    return run.job_id is not None and bool(jobs.running_jobs(session, run.job_id))


def _queue(session: Session, job: Job, kind: JobKind, index: int = 0) -> Job:
    parent_id = job.parent_id or job.id
    return jobs.add_job(
        session,
        job.project_id,
        kind,
        job.queue,
        job.subject_id,
        index=index,
        parent_id=parent_id,
        priority=jobs.UNDER_WAY,
    )
