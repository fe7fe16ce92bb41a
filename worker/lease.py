"""A claimed job as its handler sees it, and the thread that renews its lease.

The thread renews the lease while the work makes progress, and looks for reasons to stop: the job was cancelled, another
worker took it over, it made no progress, or this worker shuts down.
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
# Work is stalled after this many usual durations of a step, if that is longer than the limit.
_STALLED_STEPS = 10


@dataclass(frozen=True)
class Timings:
    """The intervals and limits of `settings` about leases, in seconds."""

    look_every_s: float = 5.0
    renew_every_s: float = 10.0
    lease_s: float = 60.0
    let_go_s: float = 45.0
    cancel_every_s: float = 2.0
    stall_s: float = 300.0


class Reason(StrEnum):
    """Why a job must stop before it has finished."""

    CANCELLED = "cancelled"
    LOST = "lost"
    STALLED = "stalled"
    DRAINING = "draining"


class Stopped(Exception):
    """The work must stop now, although it did not fail."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Handler:
    """Handles one kind of job. All methods but `run` change its subject in the transaction that changes the job."""

    def run(self, work: Work) -> Complete:
        """Do the work; return a function for the transaction that closes the job. Raises EspalierError or Stopped."""
        raise NotImplementedError

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        """Record that the job is queued again, after a transient error or because its worker was lost."""

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        """Record that the job has failed for good."""

    def ease(self, session: Session, job: Job) -> bool:
        """Queue the work again with settings that need less memory; return False if nothing can be reduced."""
        return False

    def cancelled(self, session: Session, job: Job) -> None:
        """Record that the job ended because a client cancelled it."""


class Bench:
    """Holds the child process that a worker reuses for consecutive jobs about the same subject."""

    def __init__(self, clock: Clock = Clock()) -> None:  # noqa: B008 - frozen
        self._clock = clock
        self._lock = threading.Lock()
        self._subject_id: str | None = None
        self._child: ChildConnection | None = None
        self._kept_at = clock.now()

    def keep(self, subject_id: str, child: ChildConnection) -> None:
        """Keep a child for the next job about the subject, until a job about another one comes or it was idle."""
        self.clear()
        with self._lock:
            self._subject_id, self._child, self._kept_at = subject_id, child, self._clock.now()

    def take(self, subject_id: str) -> ChildConnection | None:
        """Return the child that is kept for a subject, if it is alive; from now on the caller must stop it."""
        self.clear(but=subject_id)
        child = self._remove(lambda: True)
        if child is not None and not child.is_alive:  # killed while it waited
            child.stop()
            return None
        return child

    def clear(self, but: str | None = None) -> None:
        """Stop the child that is kept, unless it is for the subject `but`."""
        child = self._remove(lambda: self._subject_id != but)
        if child is not None:
            child.stop()

    def stop_if_idle(self, idle_s: float) -> None:
        """Stop the child if it was kept for `idle_s` without a job for it."""
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
    """A claimed job as its handler sees it."""

    def __init__(self, database: Database, job: Job, holder: Holder, bench: Bench) -> None:
        self.database = database
        self.job = job
        self.lease = Lease(job.id, job.lease_epoch)
        self.bench = bench
        self._holder = holder
        self._afterwards: list[Callable[[], None]] = []

    @property
    def subject_id(self) -> str:
        """Id of the data set version, run, comparison or view that the job is about."""
        return self.job.subject_id

    @property
    def clock(self) -> Clock:
        """The clock of this worker."""
        return self._holder.clock

    def moved(self, step_s: float = 0.0) -> None:
        """Report progress; a job without progress for too long counts as stalled.

        `step_s` is the usual time until the next report.
        """
        self._holder.moved(step_s)

    def check(self) -> None:
        """Raise Stopped if the work must stop."""
        self._holder.check()

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change` in one transaction, fenced by the lease; retry while the database is down or its disk is full.

        If the connection is lost during a commit, nobody knows whether it was written. Then `change` runs again, so it
        must be safe to run twice. Raises Stopped once the lease is lost.
        """
        while True:
            self.check()
            try:
                result = self._write(change)
                self.moved()
                return result
            except Unavailable as error:
                log.warning("database away", job=self.lease.job_id, error=error.detail)
                self.clock.sleep(DATABASE_PAUSE_S)
            except DiskFull as error:
                log.warning("database full", job=self.lease.job_id, error=error.detail)
                self.moved()  # a job that waits for disk space is not stalled
                self.clock.sleep(DATABASE_PAUSE_S)
            except LeaseLost as error:
                raise Stopped(Reason.LOST) from error

    def write_on_leaving(self, change: Callable[[Session], None]) -> None:
        """Write something that may help the next attempt; try once, and only if the lease still holds."""
        try:
            self._write(change)
        except (Unavailable, DiskFull, LeaseLost) as error:
            log.warning("not written on leaving", job=self.lease.job_id, error=str(error))

    def afterwards(self, tidy: Callable[[], None]) -> None:
        """Call `tidy` after the job has succeeded: for actions that cannot be rolled back, such as removing a file.

        If the process ends before that, `tidy` is never called, so nothing may depend on it.
        """
        self._afterwards.append(tidy)

    def tidy(self) -> None:
        """Run the functions passed to `afterwards`. The job is closed, so their errors are only logged."""
        for tidy in self._afterwards:
            try:
                tidy()
            except Exception:
                log.exception("tidying up failed")

    def _write(self, change: Callable[[Session], T]) -> T:
        with self.database.writing() as session:
            jobs.hold(session, self.lease)
            return change(session)


class Holder:
    """Renews a lease while the work makes progress, and looks for reasons to stop. A separate thread calls `look`."""

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

    def __enter__(self) -> Holder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def moved(self, step_s: float = 0.0) -> None:
        """Record progress, and the usual time until the next."""
        self._moved_at = self.clock.now()
        if step_s:
            self._stall_s = max(self._timings.stall_s, _STALLED_STEPS * step_s)

    def check(self) -> None:
        """Raise Stopped if there is a reason to stop."""
        if self._reason is None and self._is_draining():
            self._reason = Reason.DRAINING
        # Checked here too: `look` may hang in a renewal on a dead connection.
        if self._reason is None and self._is_overdue():
            self._reason = Reason.LOST
        if self._reason is not None:
            raise Stopped(self._reason)

    def look(self) -> bool:
        """Renew the lease if it is due and the work makes progress, and look for reasons to stop.

        Return whether to look again.
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
            self._renewed_at = now  # no other worker can take the lease over: it could not write either
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
