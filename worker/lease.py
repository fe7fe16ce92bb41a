"""`Work`, the claimed job that a handler receives, and `LeaseHolder`, the thread that renews the lease of a job.

The thread renews the lease while the job makes progress. It also notices when the job must stop: because a client has
cancelled it, another worker took it over, it made no progress, or this worker shuts down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

import structlog
from sqlalchemy.orm import Session

from clock import Clock
from errors import DiskFull, EspalierError, Unavailable
from models import job as jobs
from models.job import Job, Lease, LeaseLost
from models.session import Database

if TYPE_CHECKING:
    from worker.child_process import ChildConnection

T = TypeVar("T")

log = structlog.get_logger()

Complete = Callable[[Session], None]

DATABASE_PAUSE_S = 1.0
# A job whose steps take long counts as stalled after this many times the usual duration of a step.
_STALLED_STEPS = 10


@dataclass(frozen=True)
class Timings:
    """Intervals and time limits for leases, in seconds. `Settings` describes each of them."""

    look_every_s: float = 5.0
    renew_every_s: float = 10.0
    lease_s: float = 60.0
    let_go_s: float = 45.0
    cancel_every_s: float = 2.0
    stall_s: float = 300.0


class Reason(StrEnum):
    """Why a job must stop before its work is done."""

    CANCELLED = "cancelled"
    LOST = "lost"
    STALLED = "stalled"
    DRAINING = "draining"


class Stopped(Exception):
    """Raised inside a handler when its job must stop now. Only the reason `STALLED` makes the job fail."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Handler:
    """Does the work of one kind of job, such as training or ingest.

    `run` does the work. Every other method is called in the transaction that changes the state of the job, and records
    the change on the subject of the job: its run, data set version, comparison or view.
    """

    def run(self, work: Work) -> Complete:
        """Do the work. Return a function that writes the results, in the transaction that closes the job.

        Raises:
            EspalierError: the work failed.
            Stopped: the job must stop before its work is done.
        """
        raise NotImplementedError

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        """Record that the job waits in its queue again, after a transient error or because its worker was lost."""

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        """Record that the job failed and will not be retried."""

    def retry_with_less_memory(self, session: Session, job: Job) -> bool:
        """Queue the work again with settings that need less memory; return False if there are none."""
        return False

    def cancelled(self, session: Session, job: Job) -> None:
        """Record that the job ended because a client cancelled it."""


class WarmChild:
    """Keeps a child process between two jobs about the same run, so that the second job need not start a new one."""

    def __init__(self, clock: Clock = Clock()) -> None:  # noqa: B008 - frozen
        self._clock = clock
        self._lock = threading.Lock()
        self._subject_id: str | None = None
        self._child: ChildConnection | None = None
        self._kept_at = clock.now()

    def keep(self, subject_id: str, child: ChildConnection) -> None:
        """Keep a running child for the next job about this subject. Stop the child that was kept before."""
        self.clear()
        with self._lock:
            self._subject_id, self._child, self._kept_at = subject_id, child, self._clock.now()

    def take(self, subject_id: str) -> ChildConnection | None:
        """Return the running child that is kept for this subject, or None. The caller must stop the child.

        A child that is kept for another subject is stopped.
        """
        self.clear(but=subject_id)
        child = self._remove(lambda: True)
        if child is not None and not child.is_alive:  # the child was killed while it was kept
            child.stop()
            return None
        return child

    def clear(self, but: str | None = None) -> None:
        """Stop the kept child, unless it is kept for the subject `but`."""
        child = self._remove(lambda: self._subject_id != but)
        if child is not None:
            child.stop()

    def stop_if_idle(self, idle_s: float) -> None:
        """Stop the kept child if no job has used it for `idle_s` seconds."""
        child = self._remove(lambda: self._clock.now() - self._kept_at >= idle_s)
        if child is not None:
            child.stop()

    def _remove(self, is_meant: Callable[[], bool]) -> ChildConnection | None:
        with self._lock:
            if self._child is None or not is_meant():
                return None
            child, self._child = self._child, None
            return child


class Work:
    """A claimed job with its lease: what a handler needs to do the job and to write its results."""

    def __init__(self, database: Database, job: Job, holder: LeaseHolder, warm_child: WarmChild) -> None:
        self.database = database
        self.job = job
        self.lease = Lease(job.id, job.lease_epoch)
        self.warm_child = warm_child
        self._holder = holder
        self._afterwards: list[Callable[[], None]] = []

    @property
    def subject_id(self) -> str:
        """The id of the data set version, run, comparison or view that this job is about."""
        return self.job.subject_id

    @property
    def clock(self) -> Clock:
        """The clock that this worker uses; tests replace it."""
        return self._holder.clock

    def report_progress(self, step_s: float = 0.0) -> None:
        """Report that the job makes progress. A job that reports none for too long counts as stalled.

        `step_s` is the usual number of seconds until the next report, 0 if unknown.
        """
        self._holder.report_progress(step_s)

    def check(self) -> None:
        """Raise Stopped if the job must stop: cancelled, taken over, stalled, or this worker shuts down."""
        self._holder.check()

    def write(self, change: Callable[[Session], T]) -> T:
        """Call `change` in one transaction that commits only if this worker still holds the lease; return its result.

        Retry while the database is unavailable or its disk is full. If the connection is lost during a commit, nobody
        knows whether the change was written. Then `change` runs again, so it must be safe to run twice.

        Raises Stopped if the job must stop, for example because the lease is lost.
        """
        while True:
            self.check()
            try:
                result = self._write(change)
                self.report_progress()
                return result
            except Unavailable as error:
                log.warning("database unavailable", job=self.lease.job_id, error=error.detail)
                self.clock.sleep(DATABASE_PAUSE_S)
            except DiskFull as error:
                log.warning("database disk full", job=self.lease.job_id, error=error.detail)
                self.report_progress()  # a job that waits for disk space is not stalled
                self.clock.sleep(DATABASE_PAUSE_S)
            except LeaseLost as error:
                raise Stopped(Reason.LOST) from error

    def write_on_leaving(self, change: Callable[[Session], None]) -> None:
        """Call `change` in one transaction before this attempt ends, to save work for the next attempt.

        Try only once. If the database is unavailable or the lease is lost, log a warning and write nothing.
        """
        try:
            self._write(change)
        except (Unavailable, DiskFull, LeaseLost) as error:
            log.warning("progress not written at the end of the attempt", job=self.lease.job_id, error=str(error))

    def afterwards(self, tidy: Callable[[], None]) -> None:
        """Call `tidy` after the end of the job is committed, if it succeeded.

        Use it for actions that cannot be rolled back, such as removing a file. If the process ends before the commit,
        `tidy` is never called, so nothing may depend on it.
        """
        self._afterwards.append(tidy)

    def tidy(self) -> None:
        """Call the functions passed to `afterwards`. Their errors are only logged: the job has already ended."""
        for tidy in self._afterwards:
            try:
                tidy()
            except Exception:
                log.exception("clean-up after the job failed")

    def _write(self, change: Callable[[Session], T]) -> T:
        with self.database.writing() as session:
            jobs.hold(session, self.lease)
            return change(session)


class LeaseHolder:
    """Renews the lease of one job in a thread, and notices when the job must stop.

    Use it in a `with` block: the thread starts at the beginning of the block and ends with it.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        timings: Timings,
        is_draining: Callable[[], bool],
        clock: Clock = Clock(),  # noqa: B008 - frozen
    ) -> None:
        self.clock = clock
        self._database = database
        self._lease = lease
        self._timings = timings
        self._is_draining = is_draining
        self._moved_at = self._renewed_at = clock.now()
        self._stall_s = timings.stall_s
        self._reason: Reason | None = None
        self._over = clock.flag()
        self._thread = clock.thread(self._watch, f"lease-{lease.job_id}")

    def __enter__(self) -> LeaseHolder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def report_progress(self, step_s: float = 0.0) -> None:
        """Record that the job makes progress; `step_s` is the usual time until the next report, 0 if unknown."""
        self._moved_at = self.clock.now()
        if step_s:
            self._stall_s = max(self._timings.stall_s, _STALLED_STEPS * step_s)

    def check(self) -> None:
        """Raise Stopped if the job must stop: cancelled, taken over, stalled, or this worker shuts down."""
        if self._reason is None and self._is_draining():
            self._reason = Reason.DRAINING
        # The thread may hang in a renewal on a dead connection, so this is checked here too.
        if self._reason is None and self._is_overdue():
            self._reason = Reason.LOST
        if self._reason is not None:
            raise Stopped(self._reason)

    def look(self) -> bool:
        """Renew the lease if a renewal is due and the job makes progress; note whether the job must stop.

        Return False once no further call is needed, because the job must stop. The thread calls this regularly.
        """
        now = self.clock.now()
        if now - self._moved_at > self._stall_s:
            self._reason = self._reason or Reason.STALLED
            return False
        try:
            if self._is_cancelled(now):
                self._reason = self._reason or Reason.CANCELLED
        except LeaseLost:
            self._reason = Reason.LOST
            return False
        except DiskFull:
            self._renewed_at = now  # no other worker can take over the lease, because none can write
        except Unavailable:
            if self._is_overdue():
                self._reason = Reason.LOST
                return False
        return True

    def _watch(self) -> None:
        while not self._over.wait(min(self._timings.cancel_every_s, self._timings.renew_every_s)):
            if not self.look():
                return

    def _is_overdue(self) -> bool:
        return self.clock.now() - self._renewed_at > self._timings.let_go_s

    def _is_cancelled(self, now: float) -> bool:
        if now - self._renewed_at < self._timings.renew_every_s:
            with self._database.reading() as session:
                return jobs.is_cancel_requested(session, self._lease.job_id)
        with self._database.writing() as session:
            is_cancelled = jobs.renew(session, self._lease)
        self._renewed_at = now
        return is_cancelled
