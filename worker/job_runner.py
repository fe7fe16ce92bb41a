"""Runs one job: claims it, calls its handler under a lease, and writes how it ended.

A Celery task (`worker.tasks`) calls it; the database decides whether there is anything to do. The handlers know the
kinds of jobs, this module does not.
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
from worker.lease import DATABASE_PAUSE_S, Complete, Handler, Holder, Reason, Stopped, Timings, WarmChild, Work

log = structlog.get_logger()

# A parked job is tried again after this time.
_PARKED_S = 60.0


class Outcome(StrEnum):
    """How an attempt at a job ended; a Celery task returns it. A job that failed raises `JobFailed` instead."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    GIVEN_BACK = "given back"
    """This worker is shutting down; another one continues the job."""
    WILL_BE_RETRIED = "will be retried"
    """It failed with a transient error, or waits for disk space or for the store."""
    LEASE_LOST = "lease lost"
    """Another worker took it over, or its end could not be written; then a sweeper takes it over."""
    NOT_CLAIMED = "not claimed"
    """It was already done, claimed or cancelled, or is not due yet."""


class JobFailed(Exception):
    """The job failed for good; the message is the title and the detail of its error."""


class JobRunner:
    """Runs jobs for one worker, which has one slot.

    It calls `after` whenever the slot was taken or became free.
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
        """Claim a job and run it. Raises JobFailed, and Unavailable or DiskFull if the database cannot be used."""
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
            if not self._draining.is_set():  # else this worker would count as free, and is not
                self._after()

    def drain(self) -> None:
        """Give the current job back and accept no more jobs."""
        self._draining.set()

    def stop_idle_child(self, idle_s: float) -> None:
        """Stop the child that was kept for the next job, if no job came within `idle_s`."""
        self._warm_child.stop_if_idle(idle_s)

    def close(self) -> None:
        """Stop the child that was kept for the next job."""
        self._warm_child.clear()

    def _work(self, job: Job) -> Outcome:
        self._warm_child.clear(but=job.subject_id)
        with structlog.contextvars.bound_contextvars(job=job.id, kind=job.kind.value, subject=job.subject_id):
            log.info("job started", attempt=job.attempt)
            lease = Lease(job.id, job.lease_epoch)
            with Holder(self._database, lease, self._timings, self._draining.is_set, self._clock) as holder:
                return self.run_claimed(Work(self._database, job, holder, self._warm_child))

    def run_claimed(self, work: Work) -> Outcome:
        """Run a claimed job and write how it ended. Raises JobFailed."""
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
            log.exception("job broke")
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
                return self._fail(job, lease, handler, Stalled(f"Nothing moved for {limit}, so the work was stopped."))
            case Reason.LOST:
                return Outcome.LEASE_LOST  # another holder has the job; nothing may be written

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
            if not (isinstance(error, OutOfMemory) and handler.ease(session, job)):
                handler.failed(session, job, error)

        if not self._persist(give_up):
            return Outcome.LEASE_LOST
        raise JobFailed(f"{error.title}: {error.detail}") from error

    def _close(self, lease: Lease, state: JobState, complete: Complete) -> bool:
        """Write the end of a job; return whether this holder wrote it."""

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
        """Queue a job again; return `outcome`, or CANCELLED or LEASE_LOST if that happened meanwhile."""
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

        While the database is down, retry for as long as the lease can last. While its disk is full, retry until this
        worker shuts down, since no other worker can take the lease over meanwhile.
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
                log.warning("waiting for room", error=error.detail)
            except Unavailable:
                if self._clock.now() > until:
                    raise
            self._clock.sleep(DATABASE_PAUSE_S)
