"""The jobs of a run, and how the end of each job changes the run.

    train   prepares weights and features; if only heads learn, it also trains all folds and makes the model
    fold    trains one fold of a run whose network learns; any free worker may take it
    final   evaluates over all folds and makes the model

The fold that ends last queues the final job, in the transaction that ends the fold. Rows are locked in the order job,
run, comparison.
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
    """Add the train job of a queued run and make it the job that counts for the run."""
    queue = workers.training_queue(session, _learns_layers(run))
    job = jobs.add_job(session, run.project_id, JobKind.TRAIN, queue, run.id)
    run.job_id = job.id
    return job


def has_fold_jobs(run: Run) -> bool:
    """Return whether each fold of a run is a separate job.

    It is not if only heads or a perceptron learn: such a fold takes less time than starting another process.
    """
    return _learns_layers(run)


def _learns_layers(run: Run) -> bool:
    """Return whether more than one layer learns."""
    network = run.recipe.get("network")
    if network is not None and network["kind"] == NetworkKind.PERCEPTRON:
        return False
    return Mode(run.recipe["mode"]) is not Mode.FEATURE_EXTRACTION


def count_folds(run: Run) -> int:
    """Return the number of folds of a run over all repeats."""
    return int(run.recipe["folds"]["k"]) * int(run.recipe["folds"]["repeats"])


def lock_active_run(session: Session, job: Job) -> Run | None:
    """Lock and return the run of a job; None if the run has ended or another attempt has replaced the job's."""
    run = runs.lock_run(session, job.subject_id)
    return None if run.state.is_final or run.job_id not in (job.id, job.parent_id) else run


def get_progress(session: Session, run: Run) -> list[dict[str, Any]]:
    """Return the progress that each running job of a run has saved."""
    assert run.job_id is not None
    return [job.progress for job in jobs.running_jobs(session, run.job_id) if job.progress is not None]


def mark_started(session: Session, job: Job) -> Run | None:
    """Mark the run of a job as running; return the run, or None if the job no longer belongs to it."""
    run = lock_active_run(session, job)
    if run is None or run.state is RunState.RUNNING:
        return run
    add_to_outbox(session, run.id, "started", {})
    return runs.start_run(session, run.id)


def queue_folds(session: Session, job: Job) -> list[Job]:
    """Queue the missing folds of a prepared run, or its final job if no fold is missing; return the new jobs."""
    run = lock_active_run(session, job)
    if run is None:
        return []
    done = {fold.number for fold in runs.get_folds(session, run.id)}
    left = [number for number in range(count_folds(run)) if number not in done]
    return [_queue(session, job, JobKind.FOLD, number) for number in left] or [_queue(session, job, JobKind.FINAL)]


def finish_fold(session: Session, job: Job, fold: Fold) -> Job | None:
    """Save the result of a fold job, if it still belongs to its run; the last fold queues and returns the final job."""
    run = lock_active_run(session, job)
    if run is None:
        return None
    runs.add_fold(session, fold)
    if len(runs.get_folds(session, run.id)) < count_folds(run):
        return None
    return _queue(session, job, JobKind.FINAL)


def mark_succeeded(session: Session, job: Job, metrics: dict[str, Any], training_s: float) -> Run | None:
    """Mark the run of a job as succeeded, with its metrics; return None if the job no longer belongs to it."""
    run = lock_active_run(session, job)
    if run is None:
        return None
    add_to_outbox(session, run.id, "finished", {})
    return runs.succeed_run(session, run.id, metrics, training_s)


def mark_interrupted(session: Session, job: Job, stage: str = "queued") -> None:
    """Queue the run of a job that was queued again, unless another job of the run is running."""
    run = lock_active_run(session, job)
    if run is not None and run.state is RunState.RUNNING and not _is_worked_on(session, run):
        runs.requeue_run(session, run.id, stage)


def mark_failed(session: Session, job: Job, error: dict[str, Any]) -> bool:
    """Mark the run of a failed job as failed, and cancel its other jobs; return False if the job is outdated."""
    jobs.end_others(session, job)
    run = lock_active_run(session, job)
    if run is None:
        return False
    if run.started_at is None:  # its worker was lost, or hung, before it began: MLflow knows nothing of it yet
        add_to_outbox(session, run.id, "started", {})
    runs.fail_run(session, run.id, error)
    add_to_outbox(session, run.id, "finished", {})
    return True


def mark_cancelled(session: Session, job: Job) -> bool:
    """Mark the run of a cancelled job as cancelled; return False if the job no longer belongs to it."""
    run = lock_active_run(session, job)
    if run is None:
        return False
    jobs.request_cancel(session, run.id, *TRAINING)  # jobs that this job has just queued
    runs.cancel_run(session, run.id)
    add_to_outbox(session, run.id, "finished", {})
    return True


def request_cancel(session: Session, run_id: str) -> bool:
    """Request the end of a run; return whether it was cancelled at once because none of its jobs is running."""
    jobs.request_cancel(session, run_id, *TRAINING)
    run = runs.lock_run(session, run_id)
    if run.state.is_final or _is_worked_on(session, run):
        return False
    runs.cancel_run(session, run_id)
    add_end_to_outbox(session, run_id)
    drop_leftovers(session, run_id)  # garbage collection removes the files
    return True


def drop_leftovers(session: Session, run_id: str) -> list[Digest]:
    """Drop the checkpoints, fold outcomes and networks that an ended run no longer needs; return their files."""
    return (
        runs.drop_outcomes(session, run_id)
        + runs.drop_checkpoints(session, run_id)
        + runs.drop_networks(session, run_id)
    )


def restart_with_half_batch(session: Session, job: Job) -> list[Digest] | None:
    """Restart a run whose job ran out of memory with half the batch size; return the files that it no longer needs.

    All folds must be trained alike, so finished folds are trained again. Returns None if the batch was halved before,
    if the run is being cancelled, or if the job no longer belongs to the run.
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
    """Queue a failed run again; it continues from its folds and checkpoints. Raises NotReady.

    These are dropped a week after the failure; the run then starts from the beginning.
    """
    run = runs.lock_run(session, run.id)
    if run.state is not RunState.FAILED:
        raise NotReady(f"Only a failed run can be retried. This one is {run.state.value}.")
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
