"""The parts of a run: which jobs they are, and what the end of each means for the run.

    train   makes everything ready; where folds are quick it goes on to the end
    fold    one fold, where the network learns as well: for whichever worker is free
    final   measures over all folds and makes the model

Whichever fold ends last owes the final job, in the transaction that ends it. Rows are locked in the order job, run,
comparison.
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
from models.outbox import owe, owe_end
from models.run import Fold, Run, RunState
from recipes.layers import NetworkKind
from recipes.recipe import Mode

TRAINING = (JobKind.TRAIN, JobKind.FOLD, JobKind.FINAL)


def queue_training(session: Session, run: Run) -> Job:
    """Owe the training of a queued run, anew or for the first time."""
    queue = workers.training_queue(session, _learns_layers(run))
    job = jobs.add_job(session, run.project_id, JobKind.TRAIN, queue, run.id)
    run.job_id = job.id
    return job


def has_fold_jobs(run: Run) -> bool:
    """Say whether the folds of a run are jobs of their own.

    Where only heads learn, or a perceptron, a fold takes less than another process needs to start.
    """
    return _learns_layers(run)


def _learns_layers(run: Run) -> bool:
    """Say whether more learns than one layer."""
    network = run.recipe.get("network")
    if network is not None and network["kind"] == NetworkKind.PERCEPTRON:
        return False
    return Mode(run.recipe["mode"]) is not Mode.FEATURE_EXTRACTION


def count_folds(run: Run) -> int:
    """Return how many folds a run has, through all repeats."""
    return int(run.recipe["folds"]["k"]) * int(run.recipe["folds"]["repeats"])


def lock_active_run(session: Session, job: Job) -> Run | None:
    """Return a job's run, held until the transaction ends; None if it is over or has given the job's attempt up."""
    run = runs.lock_run(session, job.subject_id)
    return None if run.state.is_final or run.job_id not in (job.id, job.parent_id) else run


def get_progress(session: Session, run: Run) -> list[dict[str, Any]]:
    """Return what each job of a run that is worked on has noted of its progress."""
    assert run.job_id is not None
    return [job.progress for job in jobs.worked_on(session, run.job_id) if job.progress is not None]


def mark_started(session: Session, job: Job) -> Run | None:
    """Note that one of a run's jobs is worked on; return the run, or None if the job has no part in it any more."""
    run = lock_active_run(session, job)
    if run is None or run.state is RunState.RUNNING:
        return run
    owe(session, run.id, "started", {})
    return runs.start_run(session, run.id)


def queue_folds(session: Session, job: Job) -> list[Job]:
    """Owe the folds of a run that its train job has made ready, or the final job if they are done; return the jobs."""
    run = lock_active_run(session, job)
    if run is None:
        return []
    done = {fold.number for fold in runs.get_folds(session, run.id)}
    left = [number for number in range(count_folds(run)) if number not in done]
    return [_queue(session, job, JobKind.FOLD, number) for number in left] or [_queue(session, job, JobKind.FINAL)]


def finish_fold(session: Session, job: Job, fold: Fold) -> Job | None:
    """Keep what a fold job measured, if it still has a part in its run; the last fold owes the final job."""
    run = lock_active_run(session, job)
    if run is None:
        return None
    runs.add_fold(session, fold)
    if len(runs.get_folds(session, run.id)) < count_folds(run):
        return None
    return _queue(session, job, JobKind.FINAL)


def mark_succeeded(session: Session, job: Job, metrics: dict[str, Any], training_s: float) -> Run | None:
    """Close a run with what it measured; return None if the job has no part in it any more."""
    run = lock_active_run(session, job)
    if run is None:
        return None
    owe(session, run.id, "finished", {})
    return runs.succeed_run(session, run.id, metrics, training_s)


def mark_interrupted(session: Session, job: Job, stage: str = "queued") -> None:
    """Note that one of a run's jobs is queued again; the run waits with it unless others are worked on."""
    run = lock_active_run(session, job)
    if run is not None and run.state is RunState.RUNNING and not _is_worked_on(session, run):
        runs.requeue_run(session, run.id, stage)


def mark_failed(session: Session, job: Job, error: dict[str, Any]) -> bool:
    """Close a run because one of its jobs failed, and end the others; return whether the job could do that."""
    jobs.end_others(session, job)
    run = lock_active_run(session, job)
    if run is None:
        return False
    if run.started_at is None:  # its worker was lost, or hung, before it began: MLflow knows nothing of it yet
        owe(session, run.id, "started", {})
    runs.fail_run(session, run.id, error)
    owe(session, run.id, "finished", {})
    return True


def mark_cancelled(session: Session, job: Job) -> bool:
    """Close a run whose job has ended because somebody asked for it; return whether the job could do that."""
    run = lock_active_run(session, job)
    if run is None:
        return False
    jobs.request_cancel(session, run.id, *TRAINING)  # what the job has just made due itself
    runs.cancel_run(session, run.id)
    owe(session, run.id, "finished", {})
    return True


def request_cancel(session: Session, run_id: str) -> bool:
    """Ask a run to end; return whether it ended here and now, since nobody works on it."""
    jobs.request_cancel(session, run_id, *TRAINING)
    run = runs.lock_run(session, run_id)
    if run.state.is_final or _is_worked_on(session, run):
        return False
    runs.cancel_run(session, run_id)
    owe_end(session, run_id)
    drop_leftovers(session, run_id)  # their files are collected later
    return True


def drop_leftovers(session: Session, run_id: str) -> list[Digest]:
    """Forget what a run needs no more once it is over; return the files."""
    return (
        runs.drop_outcomes(session, run_id)
        + runs.drop_checkpoints(session, run_id)
        + runs.drop_networks(session, run_id)
    )


def restart_with_half_batch(session: Session, job: Job) -> list[Digest] | None:
    """Have a run whose job ran out of memory begin anew at half the batch; return the files that this makes useless.

    All folds must be trained alike, so those that have ended are trained again. None if it was halved before, if it is
    to end, or if the job has no part in the run any more.
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
    """Owe a failed run once more; it goes on from the folds and checkpoints that it has. Raises NotReady.

    A week after it failed these are dropped, and it begins anew.
    """
    run = runs.lock_run(session, run.id)
    if run.state is not RunState.FAILED:
        raise NotReady(f"Expected a run that has failed. Received one that is {run.state.value}.")
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    if session.get_one(Dataset, version.dataset_id).deleted_at is not None:
        raise NotReady("The data set of this run was deleted, so that it cannot be trained again.")
    runs.reopen_run(session, run.id)
    return queue_training(session, run)


def _is_worked_on(session: Session, run: Run) -> bool:
    return run.job_id is not None and bool(jobs.worked_on(session, run.job_id))


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
