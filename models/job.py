"""Jobs and their leases. Only the worker that holds a job's lease may write the results of the job.

    queued → running → succeeded | failed | cancelled        running → queued when a lease is lost or given back

A lease is a pair (job, epoch). The worker that holds it increments `renewals` regularly. Other workers read that number
at intervals. If it stops changing, one of them takes over the job and increments the epoch. Every write of a worker
checks the epoch of its lease, so a worker that was only suspended can write nothing after a take-over. Clocks of
different machines are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CursorResult, ForeignKey, Index, String, func, or_, select, text, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from errors import EspalierError
from models.base import Base, new_id, now, text_enum
from models.project import owner


class JobKind(StrEnum):
    """What a job does. The job's Celery task is named after it, for example `espalier.train`."""

    INGEST = "ingest"
    TRAIN = "train"
    FOLD = "fold"
    FINAL = "final"
    PURGE = "purge"
    PUBLISH = "publish"
    COMPARE = "compare"
    VIEW = "view"


MAX_ATTEMPTS = 3
"""Maximum number of attempts at a job. When the last attempt ends without a result, the job has failed."""
KINDS_RETRIED_FOREVER = (JobKind.PURGE, JobKind.PUBLISH)
"""Kinds of jobs with unlimited attempts: MLflow must receive all outbox rows, and a purge can always continue."""
UNDER_WAY = 1
"""Priority of jobs that continue a started run, and of jobs that a client waits for. Other jobs have priority 0."""


class JobState(StrEnum):
    """The state of a job. Queued and running jobs are unfinished; the other states are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = (JobState.QUEUED, JobState.RUNNING)


class Queue(StrEnum):
    """The queue in which a job waits. Each queue is served by its own workers."""

    CPU = "cpu"
    GPU = "gpu"
    INGEST = "ingest"
    TRACKING = "tracking"


# Maximum seconds before the next attempt.
BACK_OFF_S = 60.0

_UNFINISHED = text("state IN ('queued', 'running')")


class Job(Base):
    """One piece of work on one subject, such as a data set version to ingest or a run to train.

    `subject_id` is the id of that data set, version, run, comparison or view. `index` distinguishes jobs of the same
    kind and subject, such as the folds of one run.
    """

    __tablename__ = "job"
    __table_args__ = (
        Index(None, "queue", "state", "priority", "id"),
        Index(
            "uq_job_unfinished",
            "kind",
            "subject_id",
            "index",
            unique=True,
            sqlite_where=_UNFINISHED,
            postgresql_where=_UNFINISHED,
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("job"))
    project_id: Mapped[str] = owner()
    kind: Mapped[JobKind] = mapped_column(text_enum(JobKind))
    queue: Mapped[Queue] = mapped_column(text_enum(Queue))
    subject_id: Mapped[str] = mapped_column(String(40))
    priority: Mapped[int] = mapped_column(default=0)
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"), index=True)
    index: Mapped[int] = mapped_column(default=0)
    state: Mapped[JobState] = mapped_column(text_enum(JobState), default=JobState.QUEUED)
    attempt: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(127))
    lease_epoch: Mapped[int] = mapped_column(default=0)
    renewals: Mapped[int] = mapped_column(BigInteger, default=0)
    next_attempt_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None]
    cancel_requested_at: Mapped[datetime | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class LeaseLost(Exception):
    """This worker's lease is no longer valid: another worker holds the job, or the job has ended.

    The worker must stop at once and write nothing.
    """


@dataclass(frozen=True)
class Lease:
    """The right of one worker to work on a job. It ends when another worker takes over and increments the epoch."""

    job_id: str
    epoch: int


@dataclass(frozen=True)
class LeaseObservation:
    """The epoch and the renewals of a running job's lease, as a sweeper has read them.

    If they do not change for too long, the worker that holds the lease is gone.
    """

    job_id: str
    epoch: int
    renewals: int


# --- queued --------------------------------------------------------------------------------------------------------


def add_job(
    session: Session,
    project_id: str,
    kind: JobKind,
    queue: Queue,
    subject_id: str,
    *,
    index: int = 0,
    parent_id: str | None = None,
    priority: int = 0,
) -> Job:
    """Add a queued job. Call it in the transaction that makes the work necessary."""
    job = Job(
        project_id=project_id,
        kind=kind,
        queue=queue,
        subject_id=subject_id,
        index=index,
        parent_id=parent_id,
        priority=priority,
    )
    session.add(job)
    session.flush()
    return job


def due_jobs(session: Session, queue: Queue, limit: int) -> list[tuple[str, JobKind]]:
    """Return the ids and kinds of at most `limit` due jobs of a queue: highest priority first, then the oldest."""
    query = select(Job.id, Job.kind).where(*_is_due(), Job.queue == queue)
    return [
        (job_id, kind) for job_id, kind in session.execute(query.order_by(Job.priority.desc(), Job.id).limit(limit))
    ]


def claim(session: Session, job_id: str, queues: Sequence[Queue], owner: str) -> Job | None:
    """Start an attempt at a job under a new lease, and return the job.

    Returns None if the job is not due, for example because another worker has claimed it, or is in none of the queues.
    """
    taken = _execute(
        session,
        update(Job)
        .where(Job.id == job_id, Job.queue.in_(queues), *_is_due())
        .values(
            state=JobState.RUNNING,
            lease_owner=owner,
            lease_epoch=Job.lease_epoch + 1,
            renewals=0,
            attempt=Job.attempt + 1,
            next_attempt_at=None,
            progress=None,
            started_at=now(),
        ),
    )
    return session.get_one(Job, job_id, populate_existing=True) if taken else None


def _is_due() -> tuple[Any, ...]:
    # A `next_attempt_at` further ahead than the maximum delay means that the clock was set back meanwhile.
    longest = now() + timedelta(seconds=BACK_OFF_S)
    is_due = or_(Job.next_attempt_at.is_(None), Job.next_attempt_at <= now(), Job.next_attempt_at > longest)
    return (Job.state == JobState.QUEUED, is_due)


# --- running, by the holder of the lease -----------------------------------------------------------------------------


def hold(session: Session, lease: Lease) -> Job:
    """Check that a lease is valid and lock its job until the transaction ends; return the job. Raises LeaseLost.

    Because of the lock, all writes of this transaction happen under the lease.
    """
    kept = _execute(session, _held(lease).values(renewals=Job.renewals))
    if not kept:
        raise LeaseLost(lease.job_id)
    return session.get_one(Job, lease.job_id, populate_existing=True)


def renew(session: Session, lease: Lease) -> bool:
    """Renew a lease, and return whether a client asked to cancel the job. Raises LeaseLost."""
    kept = _execute(session, _held(lease).values(renewals=Job.renewals + 1))
    if not kept:
        raise LeaseLost(lease.job_id)
    return is_cancel_requested(session, lease.job_id)


def finish(session: Session, lease: Lease, state: JobState, error: dict[str, Any] | None = None) -> None:
    """End a job in the final `state` and end its lease. Raises LeaseLost."""
    values = {"state": state, "error": error, "finished_at": now(), "lease_owner": None}
    if not _execute(session, _held(lease).values(**values)):
        raise LeaseLost(lease.job_id)


def give_back(session: Session, lease: Lease, *, delay_s: float = 0.0, counts: bool = True) -> JobState:
    """End a lease and queue its job again, due after `delay_s` seconds. Raises LeaseLost.

    If a client asked to cancel the job, it is cancelled instead. Returns the job's new state. Pass `counts=False` if
    the attempt ended for a reason outside the job, such as a worker that shuts down: then it does not count.
    """
    job = hold(session, lease)
    if job.cancel_requested_at is not None:
        finish(session, lease, JobState.CANCELLED)
        return JobState.CANCELLED
    values = {
        "state": JobState.QUEUED,
        "lease_owner": None,
        "attempt": Job.attempt if counts else Job.attempt - 1,
        "next_attempt_at": now() + timedelta(seconds=delay_s) if delay_s else None,
    }
    _execute(session, _held(lease).values(**values))
    return JobState.QUEUED


def _held(lease: Lease) -> Any:
    return update(Job).where(Job.id == lease.job_id, Job.lease_epoch == lease.epoch, Job.state == JobState.RUNNING)


# --- by any process --------------------------------------------------------------------------------------------------


def has_unfinished(session: Session, kind: JobKind, subject_id: str) -> bool:
    """Return whether a subject has a queued or running job of this kind."""
    query = select(Job.id).where(Job.kind == kind, Job.subject_id == subject_id, Job.state.in_(UNFINISHED))
    return session.scalar(query.limit(1)) is not None


def is_cancel_requested(session: Session, job_id: str) -> bool:
    """Return whether a client asked to cancel the job."""
    return session.scalar(select(Job.cancel_requested_at).where(Job.id == job_id)) is not None


def request_cancel(session: Session, subject_id: str, *kinds: JobKind) -> int:
    """Request the end of a subject's unfinished jobs of these kinds.

    Queued jobs are cancelled at once; running jobs end when their workers see the request. Returns the number of jobs
    that were cancelled at once.
    """
    mine = (Job.kind.in_(kinds), Job.subject_id == subject_id)
    # The first UPDATE matches both states. It locks the rows, after waiting for a worker that is giving a job back.
    _execute(
        session,
        update(Job)
        .where(*mine, Job.state.in_(UNFINISHED), Job.cancel_requested_at.is_(None))
        .values(cancel_requested_at=now()),
    )
    return _execute(
        session,
        update(Job).where(*mine, Job.state == JobState.QUEUED).values(state=JobState.CANCELLED, finished_at=now()),
    )


def end_others(session: Session, job: Job) -> int:
    """Cancel all other unfinished jobs of the same run; return how many were cancelled.

    Workers that hold these jobs lose their leases, so the same work can be queued again at once.
    """
    first = job.parent_id or job.id
    others = (or_(Job.id == first, Job.parent_id == first), Job.id != job.id)
    return _execute(
        session,
        update(Job)
        .where(*others, Job.state.in_(UNFINISHED))
        .values(
            state=JobState.CANCELLED,
            lease_epoch=Job.lease_epoch + 1,
            lease_owner=None,
            cancel_requested_at=func.coalesce(Job.cancel_requested_at, now()),
            finished_at=now(),
        ),
    )


def running_jobs(session: Session, job_id: str) -> Sequence[Job]:
    """Return the running jobs among this job and the jobs that were queued by it."""
    query = select(Job).where(or_(Job.id == job_id, Job.parent_id == job_id), Job.state == JobState.RUNNING)
    return session.scalars(query, execution_options={"populate_existing": True}).all()


def observe_leases(session: Session) -> list[LeaseObservation]:
    """Return the lease epoch and the renewals of every running job, for a sweeper to compare with its next reading."""
    query = select(Job.id, Job.lease_epoch, Job.renewals).where(Job.state == JobState.RUNNING)
    return [LeaseObservation(*row) for row in session.execute(query)]


def take_over(session: Session, observation: LeaseObservation) -> Job | None:
    """End a lease that was not renewed since it was observed; return the job with its new state.

    The new state is cancelled if a client asked for that, failed if no attempts are left, and queued otherwise. Returns
    None if the lease was renewed or has ended since the observation.
    """
    still = (
        Job.id == observation.job_id,
        Job.lease_epoch == observation.epoch,
        Job.renewals == observation.renewals,
        Job.state == JobState.RUNNING,
    )
    taken = _execute(
        session, update(Job).where(*still).values(lease_epoch=Job.lease_epoch + 1, lease_owner=None, renewals=0)
    )
    if not taken:
        return None
    job = session.get_one(Job, observation.job_id, populate_existing=True)
    if job.cancel_requested_at is not None:
        job.state, job.finished_at = JobState.CANCELLED, now()
    elif attempts_are_used_up(job):
        job.state, job.finished_at = JobState.FAILED, now()
    else:
        job.state = JobState.QUEUED
    session.flush()
    return job


def attempts_are_used_up(job: Job) -> bool:
    """Return whether a job has no attempts left, so that a failure of its current attempt is final."""
    return job.attempt >= MAX_ATTEMPTS and job.kind not in KINDS_RETRIED_FOREVER


def back_off_s(attempt: int) -> float:
    """Return the seconds to wait after attempt number `attempt`: 2, 4, 8 and so on, at most BACK_OFF_S."""
    return min(BACK_OFF_S, 2.0 ** min(attempt, 6))


def is_retried(job: Job, error: EspalierError) -> bool:
    """Return whether a job is tried again after an attempt that failed with this error.

    Publish jobs are always tried again, after a delay. If one failed for good, a sweeper would queue a new publish job
    at once, without a delay.
    """
    return (error.is_transient or job.kind is JobKind.PUBLISH) and not attempts_are_used_up(job)


# --- display ---------------------------------------------------------------------------------------------------------


def count_jobs(session: Session) -> dict[tuple[Queue, JobState], int]:
    """Return the number of unfinished jobs by queue and state."""
    query = select(Job.queue, Job.state, func.count()).where(Job.state.in_(UNFINISHED)).group_by(Job.queue, Job.state)
    return {(queue, state): count for queue, state, count in session.execute(query)}


def _execute(session: Session, statement: Any) -> int:
    """Execute an UPDATE statement and return how many rows it changed."""
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount
