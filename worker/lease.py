"""A claimed job: what its handler may do with it, and the lease that is kept for it meanwhile.

A second thread renews the lease while the work moves, and finds the reasons to stop: somebody cancelled, another
worker took over, nothing moved, this worker is to end.
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
# A stall is this many times what a step usually takes, if that is longer than the limit.
_STALLED_STEPS = 10


@dataclass(frozen=True)
class Timings:
    """The lengths of `settings`, in seconds."""

    look_every_s: float = 5.0
    renew_every_s: float = 10.0
    lease_s: float = 60.0
    let_go_s: float = 45.0
    cancel_every_s: float = 2.0
    stall_s: float = 300.0


class Reason(StrEnum):
    """Why a job must stop before its end."""

    CANCELLED = "cancelled"
    LOST = "lost"
    STALLED = "stalled"
    DRAINING = "draining"


class Stopped(Exception):
    """The job must end now; nothing went wrong in it."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Handler:
    """One kind of job. Every method but `run` changes the job's subject inside the transaction that changes the job."""

    def run(self, work: Work) -> Complete:
        """Do the work; return what to write in the transaction that closes the job. Raises EspalierError or Stopped."""
        raise NotImplementedError

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        """Note that the job waits again, because of an error that may pass or because its worker was lost."""

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        """Note that the job is given up."""

    def ease(self, session: Session, job: Job) -> bool:
        """Owe the work anew with less of what memory ran out for; return False if there is nothing to take less of."""
        return False

    def cancelled(self, session: Session, job: Job) -> None:
        """Note that the job has ended because somebody asked for it."""


class Bench:
    """The child process that a worker keeps from one job to the next, for as long as they are about one subject."""

    def __init__(self, clock: Clock = Clock()) -> None:  # noqa: B008 - frozen
        self._clock = clock
        self._lock = threading.Lock()
        self._subject_id: str | None = None
        self._child: ChildConnection | None = None
        self._kept_at = clock.now()

    def keep(self, subject_id: str, child: ChildConnection) -> None:
        """Keep a child until a job about another subject comes, or none for some time."""
        self.clear()
        with self._lock:
            self._subject_id, self._child, self._kept_at = subject_id, child, self._clock.now()

    def take(self, subject_id: str) -> ChildConnection | None:
        """Hand over the child that is kept for a subject, if it lives; the caller has to stop it from now on."""
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
        """What the job is about."""
        return self.job.subject_id

    @property
    def clock(self) -> Clock:
        """The time that this worker sees."""
        return self._holder.clock

    def moved(self, step_s: float = 0.0) -> None:
        """Say that the work made progress; a job that does not move for long counts as hung.

        `step_s` is what it usually takes to the next time.
        """
        self._holder.moved(step_s)

    def check(self) -> None:
        """Raise Stopped if the work must end."""
        self._holder.check()

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change` in one transaction, fenced by the lease; waits out a database that is away or has no room.

        A connection that is lost in the middle of a commit leaves open whether it was written: `change` runs again
        then, and must bear that it was. Raises Stopped once the lease is lost.
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
                self.moved()  # a job that waits for room does not hang
                self.clock.sleep(DATABASE_PAUSE_S)
            except LeaseLost as error:
                raise Stopped(Reason.LOST) from error

    def write_on_leaving(self, change: Callable[[Session], None]) -> None:
        """Write what may be of use to whoever does the job next; tried once, and only if the lease still holds."""
        try:
            self._write(change)
        except (Unavailable, DiskFull, LeaseLost) as error:
            log.warning("not written on leaving", job=self.lease.job_id, error=str(error))

    def afterwards(self, tidy: Callable[[], None]) -> None:
        """Have `tidy` called once the job has succeeded: for what cannot be rolled back, such as removing a file.

        A process that ends in between never calls it, so nothing may depend on it.
        """
        self._afterwards.append(tidy)

    def tidy(self) -> None:
        """Do what was left for afterwards; the job is closed, so nothing that goes wrong here changes it."""
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
    """Renews a lease while the work moves, and finds the reasons to stop. `look` is called by a thread of its own."""

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
        """Note progress, and what it usually takes to the next."""
        self._moved_at = self.clock.now()
        if step_s:
            self._stall_s = max(self._timings.stall_s, _STALLED_STEPS * step_s)

    def check(self) -> None:
        """Raise Stopped if there is a reason."""
        if self._reason is None and self._is_draining():
            self._reason = Reason.DRAINING
        # Looked at here too: a renewal that hangs in a dead connection never comes back to `look`.
        if self._reason is None and self._is_overdue():
            self._reason = Reason.LOST
        if self._reason is not None:
            raise Stopped(self._reason)

    def look(self) -> bool:
        """Renew if it is time and the work moves, and look for reasons to stop; return whether to look again."""
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
            self._renewed_at = now  # whoever would take the lease over cannot write either
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
