"""Runs one job: claims it, calls the handler for its kind under a lease, and writes how the job ended.

A Celery task (`worker.tasks`) calls `JobRunner.run` with a job id. The database decides whether that job may run now.
This module does not depend on what kinds of jobs there are: `worker.handlers` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import structlog
from sqlalchemy.orm import Session

from clock import Clock
from errors import DiskFull, EspalierError, OutOfMemory, Stalled, Unavailable
from models import job as jobs
from models.job import Job, JobKind, JobState, Lease, LeaseLost, Queue
from models.session import Database
from worker.lease import DATABASE_PAUSE_S, Complete, Handler, LeaseHolder, Reason, Stopped, Timings, WarmChild, Work

log = structlog.get_logger()

# Seconds after which a parked job is tried again.
_PARKED_S = 60.0


class Outcome(StrEnum):
    """How an attempt at a job ended. A Celery task returns it, or raises `JobFailed` if the job failed."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    GIVEN_BACK = "given back"
    """This worker is shutting down and put the job back into its queue. Another worker continues it."""
    WILL_BE_RETRIED = "will be retried"
    """The attempt failed with a transient error, or must wait for disk space or for the store."""
    LEASE_LOST = "lease lost"
    """Another worker took over the job, or will do so because the result could not be written."""
    NOT_CLAIMED = "not claimed"
    """The job was already finished, claimed or cancelled, or is not due yet."""


class JobFailed(Exception):
    """The job failed and will not be retried. The message has the title and the detail of the error."""


class JobRunner:
    """Runs jobs for one worker, one at a time.

    It calls `after` whenever it has claimed a job and whenever it is free again.
    """

    def __init__(
        self,
        database: Database,
        queues: Sequence[Queue],
        handlers: Mapping[JobKind, Handler],
        worker: str,
        timings: Timings,
        clock: Clock = Clock(),  # noqa: B008 - frozen
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._queues = queues
        self._handlers = handlers
        self._worker = worker
        self._timings = timings
        self._clock = clock
        self._after = after
        self._warm_child = WarmChild(clock)
        self._draining = clock.flag()

    def run(self, job_id: str) -> Outcome:
        """Claim a job and run it.

        Raises:
            JobFailed: the job failed and will not be retried.
            Unavailable, DiskFull: the database cannot be used.
        """
        if self._draining.is_set():
            return Outcome.NOT_CLAIMED
        try:
            with self._database.writing() as session:
                job = jobs.claim(session, job_id, self._queues, self._worker)
            if job is None:
                log.info("job not claimed", job=job_id)
                return Outcome.NOT_CLAIMED
            self._after()
            return self._work(job)
        finally:
            if not self._draining.is_set():  # a draining worker must not count as free
                self._after()

    def drain(self) -> None:
        """Put the current job back into its queue and accept no more jobs."""
        self._draining.set()

    def stop_idle_child(self, idle_s: float) -> None:
        """Stop the child process that is kept for the next part of its run, if it has been idle for `idle_s`."""
        self._warm_child.stop_if_idle(idle_s)

    def close(self) -> None:
        """Stop the child process that is kept for the next part of its run."""
        self._warm_child.clear()

    def _work(self, job: Job) -> Outcome:
        self._warm_child.clear(but=job.subject_id)
        with structlog.contextvars.bound_contextvars(job=job.id, kind=job.kind.value, subject=job.subject_id):
            log.info("job started", attempt=job.attempt)
            lease = Lease(job.id, job.lease_epoch)
            with LeaseHolder(self._database, lease, self._timings, self._draining.is_set, self._clock) as holder:
                return self.run_claimed(Work(self._database, job, holder, self._warm_child))

    def run_claimed(self, work: Work) -> Outcome:
        """Run a job that is already claimed, and write how it ended. Raises JobFailed."""
        job, handler = work.job, self._handlers[work.job.kind]
        try:
            complete = handler.run(work)
            if not self._close(work.lease, JobState.SUCCEEDED, complete):
                return Outcome.LEASE_LOST
            work.tidy()
            return Outcome.SUCCEEDED
        except Stopped as stopped:
            return self._stop(job, work.lease, handler, stopped.reason)
        except LeaseLost:
            log.warning("lease lost")
            return Outcome.LEASE_LOST
        except EspalierError as error:
            return self._fail(job, work.lease, handler, error)
        except Exception as error:
            log.exception("job raised an unexpected error")
            bug = EspalierError(f"{type(error).__name__}: {error}. This is a bug.")
            return self._fail(job, work.lease, handler, bug)

    def _stop(self, job: Job, lease: Lease, handler: Handler, reason: Reason) -> Outcome:
        log.info("job stopped", reason=reason.value)
        match reason:
            case Reason.CANCELLED:
                is_written = self._close(lease, JobState.CANCELLED, lambda session: handler.cancelled(session, job))
                return Outcome.CANCELLED if is_written else Outcome.LEASE_LOST
            case Reason.DRAINING:
                return self._give_back(job, lease, handler, Outcome.GIVEN_BACK)
            case Reason.STALLED:
                limit = f"{self._timings.stall_s:g} s or more"
                return self._fail(
                    job, lease, handler, Stalled(f"The job made no progress for {limit}, so it was stopped.")
                )
            case Reason.LOST:
                return Outcome.LEASE_LOST  # another worker has the job, so this one may write nothing

    def _fail(self, job: Job, lease: Lease, handler: Handler, error: EspalierError) -> Outcome:
        record = error.record()
        if error.is_parked:
            log.warning("job parked", error=record)
            return self._give_back(job, lease, handler, Outcome.WILL_BE_RETRIED, error, delay_s=_PARKED_S)
        if jobs.is_retried(job, error):
            log.warning("job failed, will be tried again", error=record)
            delay_s = jobs.back_off_s(job.attempt)
            return self._give_back(job, lease, handler, Outcome.WILL_BE_RETRIED, error, delay_s=delay_s, counts=True)
        log.error("job failed", error=record)

        def give_up(session: Session) -> None:
            jobs.hold(session, lease)
            jobs.finish(session, lease, JobState.FAILED, record)
            if not (isinstance(error, OutOfMemory) and handler.retry_with_less_memory(session, job)):
                handler.failed(session, job, error)

        if not self._persist(give_up):
            return Outcome.LEASE_LOST
        raise JobFailed(f"{error.title}: {error.detail}") from error

    def _close(self, lease: Lease, state: JobState, complete: Complete) -> bool:
        """Write the end of a job in one transaction; return False if this worker has lost the lease."""

        def change(session: Session) -> None:
            jobs.hold(session, lease)
            complete(session)
            jobs.finish(session, lease, state)

        is_written = self._persist(change)
        if is_written:
            log.info("job finished", state=state.value)
        return is_written

    def _give_back(
        self,
        job: Job,
        lease: Lease,
        handler: Handler,
        outcome: Outcome,
        error: EspalierError | None = None,
        *,
        delay_s: float = 0.0,
        counts: bool = False,
    ) -> Outcome:
        """Put a job back into its queue and return `outcome`.

        Return CANCELLED if a client has cancelled the job meanwhile, and LEASE_LOST if this worker has lost the lease.
        """
        states: list[JobState] = []

        def change(session: Session) -> None:
            states[:] = [jobs.give_back(session, lease, delay_s=delay_s, counts=counts)]
            if states == [JobState.CANCELLED]:  # a client cancelled it while the attempt was ending
                handler.cancelled(session, job)
            else:
                handler.requeued(session, job, error)

        if not self._persist(change):
            return Outcome.LEASE_LOST
        return Outcome.CANCELLED if states == [JobState.CANCELLED] else outcome

    def _persist(self, change: Callable[[Session], None]) -> bool:
        """Write how a job ended. Return False if the lease was lost, or if an earlier try was committed after all.

        While the database is unavailable, retry for as long as the lease can last. While the disk of the database is
        full, retry until this worker shuts down, because no other worker can take over the lease meanwhile.
        """
        until = self._clock.now() + self._timings.let_go_s
        while True:
            try:
                with self._database.writing() as session:
                    change(session)
                return True
            except LeaseLost:
                log.warning("lease lost")
                return False
            except DiskFull as error:
                if self._draining.is_set():
                    raise
                log.warning("database disk full, waiting", error=error.detail)
            except Unavailable:
                if self._clock.now() > until:
                    raise
            self._clock.sleep(DATABASE_PAUSE_S)
