"""Claims jobs of one queue and sees each through to its end. Knows no kind of job by name: handlers do.

One thread per queue, one job at a time. A bell wakes it; without one it looks every few seconds, so that a broker that
is away costs seconds and never a job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog
from sqlalchemy.orm import Session

from errors import DiskFull, EspalierError, OutOfMemory, Stalled, Unavailable
from models import job as jobs
from models import outbox
from models.job import Job, JobKind, JobState, Lease, LeaseLost, Queue
from models.session import Database
from worker.lease import DATABASE_PAUSE_S, Bench, Clock, Complete, Handler, Holder, Reason, Stopped, Timings, Work

log = structlog.get_logger()

# What waits for somebody to make room is looked at this often.
_PARKED_S = 60.0


class Loop:
    """Works off one queue, one job at a time."""

    def __init__(
        self,
        database: Database,
        queue: Queue,
        handlers: Mapping[JobKind, Handler],
        worker: str,
        timings: Timings,
        clock: Clock = Clock(),  # noqa: B008 - frozen
    ) -> None:
        self._database = database
        self._queue = queue
        self._handlers = handlers
        self._worker = worker
        self._timings = timings
        self._clock = clock
        self._bench = Bench()
        self._bell = clock.flag()
        self._draining = clock.flag()
        self._thread = clock.thread(self._run, f"queue-{queue.value}")

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
        try:
            while not self._draining.is_set():
                try:
                    if self.work():
                        continue
                    self._bench.clear()
                except (Unavailable, DiskFull) as error:
                    log.warning("database away", queue=self._queue.value, error=error.detail)
                except Exception:
                    log.exception("look failed", queue=self._queue.value)
                self._bell.wait(self._timings.look_every_s)
                self._bell.clear()
        finally:
            self._bench.clear()

    def work(self) -> bool:
        """Claim one job and see it through; return whether there was one."""
        with self._database.writing() as session:
            if self._queue is Queue.TRACKING:
                outbox.add_publish_jobs(session)
            job = jobs.claim(session, [self._queue], self._worker)
        if job is None:
            return False
        self._bench.clear(but=job.subject_id)
        with structlog.contextvars.bound_contextvars(job=job.id, kind=job.kind.value, subject=job.subject_id):
            log.info("job started", attempt=job.attempt)
            lease = Lease(job.id, job.lease_epoch)
            with Holder(self._database, lease, self._timings, self._draining.is_set, self._clock) as holder:
                self.see_through(Work(self._database, job, holder, self._bench))
        return True

    def see_through(self, work: Work) -> None:
        """Do a job and write what becomes of it."""
        job, handler = work.job, self._handlers[work.job.kind]
        try:
            complete = handler.run(work)
            if self._close(work.lease, JobState.SUCCEEDED, complete):
                work.tidy()
        except Stopped as stopped:
            self._stop(job, work.lease, handler, stopped.reason)
        except LeaseLost:
            log.warning("lease lost")
        except EspalierError as error:
            self._fail(job, work.lease, handler, error)
        except Exception as error:
            log.exception("job broke")
            bug = EspalierError(f"{type(error).__name__}: {error}. This is a bug.")
            self._fail(job, work.lease, handler, bug)

    def _stop(self, job: Job, lease: Lease, handler: Handler, reason: Reason) -> None:
        log.info("job stopped", reason=reason.value)
        match reason:
            case Reason.CANCELLED:
                self._close(lease, JobState.CANCELLED, lambda session: handler.cancelled(session, job))
            case Reason.DRAINING:
                self._give_back(job, lease, handler)
            case Reason.STALLED:
                limit = f"{self._timings.stall_s:g} s or more"
                self._fail(job, lease, handler, Stalled(f"Nothing moved for {limit}, so the work was stopped."))
            case Reason.LOST:
                pass  # another holder has the job; nothing may be written

    def _fail(self, job: Job, lease: Lease, handler: Handler, error: EspalierError) -> None:
        record = error.record()
        if error.is_parked:
            log.warning("job parked", error=record)
            self._give_back(job, lease, handler, error, delay_s=_PARKED_S)
        elif jobs.is_retried(job, error):
            log.warning("job failed, will be tried again", error=record)
            self._give_back(job, lease, handler, error, delay_s=jobs.back_off_s(job.attempt), counts=True)
        else:
            log.error("job failed", error=record)

            def give_up(session: Session) -> None:
                jobs.hold(session, lease)
                jobs.finish(session, lease, JobState.FAILED, record)
                if not (isinstance(error, OutOfMemory) and handler.ease(session, job)):
                    handler.failed(session, job, error)

            self._persist(give_up)

    def _close(self, lease: Lease, state: JobState, complete: Complete) -> bool:
        """Write a job's end; return whether this holder wrote it."""

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
        error: EspalierError | None = None,
        *,
        delay_s: float = 0.0,
        counts: bool = False,
    ) -> None:
        def change(session: Session) -> None:
            state = jobs.give_back(session, lease, delay_s=delay_s, counts=counts)
            if state is JobState.CANCELLED:  # asked for while the attempt was ending
                handler.cancelled(session, job)
            else:
                handler.requeued(session, job, error)

        self._persist(change)

    def _persist(self, change: Callable[[Session], None]) -> bool:
        """Write what becomes of a job; a database that is away is waited for as long as the lease can last.

        One that has no room is waited for as long as this worker lasts, since nobody can take the lease over meanwhile.

        Return False if the lease was lost, or if an earlier try was written after all.
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
