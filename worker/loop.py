"""Claims jobs of one queue and sees each through to its end. Knows no kind of job by name: handlers do.

One thread per queue, one job at a time. A bell wakes it; without one it looks every few seconds, so that a broker that
is away costs seconds and never a job. While a job runs, a second thread renews the lease and watches for a reason to
stop; a third one, the sweeper, takes over the jobs of holders that stand still.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import structlog
from sqlalchemy.orm import Session

from errors import EspalierError, Stalled, Unavailable
from models import job as jobs
from models.job import Job, JobKind, JobState, Lease, LeaseLost, Queue, Sighting
from models.session import Database

T = TypeVar("T")

log = structlog.get_logger()

Complete = Callable[[Session], None]

_DATABASE_PAUSE_S = 1.0


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


class Handler(Protocol):
    """One kind of job. Every method but `run` changes the job's subject inside the transaction that changes the job."""

    def run(self, work: Work) -> Complete:
        """Do the work; return what to write in the transaction that closes the job. Raises EspalierError or Stopped."""
        ...

    def requeued(self, session: Session, subject_id: str) -> None: ...

    def failed(self, session: Session, subject_id: str, error: dict[str, Any]) -> None: ...

    def cancelled(self, session: Session, subject_id: str) -> None: ...


class Work:
    """A claimed job as its handler sees it."""

    def __init__(self, database: Database, job: Job, holder: Holder) -> None:
        self.database = database
        self.lease = Lease(job.id, job.lease_epoch)
        self.subject_id = job.subject_id
        self.project_id = job.project_id
        self.attempt = job.attempt
        self.queue = job.queue
        self._holder = holder
        self._afterwards: list[Callable[[], None]] = []

    def moved(self) -> None:
        """Say that the work made progress; a job that does not move for long counts as hung."""
        self._holder.moved()

    def check(self) -> None:
        """Raise Stopped if the work must end."""
        self._holder.check()

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change` in one transaction, fenced by the lease; waits out a database that is away.

        A connection that is lost in the middle of a commit leaves open whether it was written: `change` runs again
        then, and must bear that it was. Raises Stopped once the lease is lost.
        """
        while True:
            self.check()
            try:
                with self.database.writing() as session:
                    jobs.hold(session, self.lease)
                    result = change(session)
                self.moved()
                return result
            except Unavailable:
                log.warning("database away", job=self.lease.job_id)
                time.sleep(_DATABASE_PAUSE_S)
            except LeaseLost as error:
                raise Stopped(Reason.LOST) from error

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


class Holder:
    """Renews a lease while the work moves, and finds the reasons to stop."""

    def __init__(self, database: Database, lease: Lease, timings: Timings, draining: threading.Event) -> None:
        self._database = database
        self._lease = lease
        self._timings = timings
        self._draining = draining
        self._moved_at = self._renewed_at = time.monotonic()
        self._reason: Reason | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"lease-{lease.job_id}", daemon=True)

    def __enter__(self) -> Holder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def moved(self) -> None:
        """Note progress."""
        self._moved_at = time.monotonic()

    def check(self) -> None:
        """Raise Stopped if there is a reason."""
        if self._reason is None and self._draining.is_set():
            self._reason = Reason.DRAINING
        # Looked at here too: a renewal that hangs in a dead connection never comes back to `_watch`.
        if self._reason is None and time.monotonic() - self._renewed_at > self._timings.let_go_s:
            self._reason = Reason.LOST
        if self._reason is not None:
            raise Stopped(self._reason)

    def _watch(self) -> None:
        while not self._over.wait(min(self._timings.cancel_every_s, self._timings.renew_every_s)):
            now = time.monotonic()
            if now - self._moved_at > self._timings.stall_s:
                self._reason = self._reason or Reason.STALLED
                return
            try:
                if self._is_cancelled(now):
                    self._reason = self._reason or Reason.CANCELLED
            except LeaseLost:
                self._reason = Reason.LOST
                return
            except Unavailable:
                if now - self._renewed_at > self._timings.let_go_s:
                    self._reason = Reason.LOST
                    return

    def _is_cancelled(self, now: float) -> bool:
        if now - self._renewed_at < self._timings.renew_every_s:
            with self._database.reading() as session:
                return jobs.is_cancel_requested(session, self._lease.job_id)
        with self._database.writing() as session:
            is_cancelled = jobs.renew(session, self._lease)
        self._renewed_at = now
        return is_cancelled


class Loop:
    """Works off one queue, one job at a time."""

    def __init__(
        self,
        database: Database,
        queue: Queue,
        handlers: Mapping[JobKind, Handler],
        worker: str,
        timings: Timings,
    ) -> None:
        self._database = database
        self._queue = queue
        self._handlers = handlers
        self._worker = worker
        self._timings = timings
        self._bell = threading.Event()
        self._draining = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"queue-{queue.value}", daemon=True)

    def start(self) -> None:
        """Begin to look for work."""
        self._thread.start()

    def ring(self) -> None:
        """Wake the loop."""
        self._bell.set()

    def drain(self) -> None:
        """Stop the present job, give it back and look for no other."""
        self._draining.set()
        self._bell.set()

    def join(self, timeout_s: float) -> None:
        """Wait until a drained loop is done."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._draining.is_set():
            try:
                if self.work():
                    continue
            except Unavailable:
                log.warning("database away", queue=self._queue.value)
            except Exception:
                log.exception("look failed", queue=self._queue.value)
            self._bell.wait(self._timings.look_every_s)
            self._bell.clear()

    def work(self) -> bool:
        """Claim one job and see it through; return whether there was one."""
        with self._database.writing() as session:
            if self._queue is Queue.TRACKING:
                jobs.add_publish_jobs(session)
            job = jobs.claim(session, [self._queue], self._worker)
        if job is None:
            return False
        with structlog.contextvars.bound_contextvars(job=job.id, kind=job.kind.value, subject=job.subject_id):
            self._see_through(job)
        return True

    def _see_through(self, job: Job) -> None:
        lease = Lease(job.id, job.lease_epoch)
        handler = self._handlers[job.kind]
        log.info("job started", attempt=job.attempt)
        with Holder(self._database, lease, self._timings, self._draining) as holder:
            try:
                work = Work(self._database, job, holder)
                complete = handler.run(work)
                if self._close(lease, JobState.SUCCEEDED, complete):
                    work.tidy()
            except Stopped as stopped:
                self._stop(job, lease, handler, stopped.reason)
            except LeaseLost:
                log.warning("lease lost")
            except EspalierError as error:
                self._fail(job, lease, handler, error)
            except Exception as error:
                log.exception("job broke")
                self._fail(job, lease, handler, EspalierError(f"{type(error).__name__}: {error}. This is a bug."))

    def _stop(self, job: Job, lease: Lease, handler: Handler, reason: Reason) -> None:
        log.info("job stopped", reason=reason.value)
        match reason:
            case Reason.CANCELLED:
                self._close(lease, JobState.CANCELLED, lambda session: handler.cancelled(session, job.subject_id))
            case Reason.DRAINING:
                self._give_back(job, lease, handler, delay_s=0.0, counts=False)
            case Reason.STALLED:
                error = Stalled(f"Nothing moved for {self._timings.stall_s:g} s, so the work was stopped.")
                self._fail(job, lease, handler, error)
            case Reason.LOST:
                pass  # another holder has the job; nothing may be written

    def _fail(self, job: Job, lease: Lease, handler: Handler, error: EspalierError) -> None:
        record = error.record()
        if jobs.is_retried(job, error):
            log.warning("job failed, will be tried again", error=record)
            self._give_back(job, lease, handler, delay_s=jobs.back_off_s(job.attempt), counts=True)
        else:
            log.error("job failed", error=record)
            self._close(
                lease, JobState.FAILED, lambda session: handler.failed(session, job.subject_id, record), error=record
            )

    def _close(self, lease: Lease, state: JobState, complete: Complete, error: dict[str, Any] | None = None) -> bool:
        """Write a job's end; return whether this holder wrote it."""

        def change(session: Session) -> None:
            jobs.hold(session, lease)
            complete(session)
            jobs.finish(session, lease, state, error)

        is_written = self._persist(change)
        if is_written:
            log.info("job finished", state=state.value)
        return is_written

    def _give_back(self, job: Job, lease: Lease, handler: Handler, *, delay_s: float, counts: bool) -> None:
        def change(session: Session) -> None:
            state = jobs.give_back(session, lease, delay_s=delay_s, counts=counts)
            if state is JobState.CANCELLED:  # asked for while the attempt was ending
                handler.cancelled(session, job.subject_id)
            else:
                handler.requeued(session, job.subject_id)

        self._persist(change)

    def _persist(self, change: Callable[[Session], None]) -> bool:
        """Write what becomes of a job; a database that is away is waited for as long as the lease can last.

        Return False if the lease was lost, or if an earlier try was written after all.
        """
        until = time.monotonic() + self._timings.let_go_s
        while True:
            try:
                with self._database.writing() as session:
                    change(session)
                return True
            except LeaseLost:
                log.warning("lease lost")
                return False
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(_DATABASE_PAUSE_S)


class Sweeper:
    """Takes over the jobs of holders that stand still, and notes that this worker is alive.

    A lease ends by observation: the same (epoch, renewals) for `lease_s` of this process' own monotonic clock.
    """

    def __init__(
        self,
        database: Database,
        queues: Sequence[Queue],
        handlers: Mapping[JobKind, Handler],
        worker: str,
        timings: Timings,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._queues = queues
        self._handlers = handlers
        self._worker = worker
        self._timings = timings
        self._now = now
        self._first_seen: dict[Sighting, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.sweep()
            except Unavailable:
                log.warning("database away", thread="sweeper")
            except Exception:
                log.exception("sweep failed")
            self._over.wait(self._timings.look_every_s)

    def sweep(self) -> int:
        """Look once at every running job; return how many were taken over."""
        with self._database.writing() as session:
            jobs.see_worker(session, self._worker, self._queues)
            if Queue.CPU in self._queues:
                jobs.hand_over_unserved(session)
            seen = jobs.sightings(session, list(Queue))
        now = self._now()
        self._first_seen = {sighting: self._first_seen.get(sighting, now) for sighting in seen}
        expired = [sighting for sighting, first in self._first_seen.items() if now - first >= self._timings.lease_s]
        return sum(self._take_over(sighting) for sighting in expired)

    def _take_over(self, sighting: Sighting) -> bool:
        try:
            return self._end_lease(sighting)
        except Unavailable:
            raise
        except Exception:  # one job that cannot be taken over must not keep the others waiting
            log.exception("take-over failed", job=sighting.job_id)
            return False

    def _end_lease(self, sighting: Sighting) -> bool:
        with self._database.writing() as session:
            job = jobs.take_over(session, sighting)
            if job is None:
                return False
            handler = self._handlers[job.kind]
            match job.state:
                case JobState.QUEUED:
                    handler.requeued(session, job.subject_id)
                case JobState.CANCELLED:
                    handler.cancelled(session, job.subject_id)
                case _:
                    job.error = Stalled("Its worker was lost at every attempt.").record()
                    handler.failed(session, job.subject_id, job.error)
        log.warning("lease taken over", job=sighting.job_id, state=job.state.value)
        return True
