"""Checks all running jobs every few seconds, and takes over those whose worker is gone.

It also records that this worker is alive, queues publications, and asks the dispatcher to send due jobs. It runs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import structlog

from clock import Clock
from errors import DiskFull, Stalled, Unavailable
from models import job as jobs
from models import outbox
from models import worker as workers
from models.job import JobKind, JobState, LeaseObservation, Queue
from models.session import Database
from models.worker import GPU_GRACE_S
from worker.lease import Handler, Timings

log = structlog.get_logger()

# After a late sweep, at most this many intervals count as observed.
_ATTENTIVE = 2.0


class Sweeper:
    """Checks every running job every few seconds.

    A lease expires when the sweeper observes the same (epoch, renewals) for `lease_s` on its own monotonic clock. Time
    in which it did not sweep, since the machine or this process stood still, does not count.
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
        """Prepare a sweeper; it calls `after` at the end of each sweep, even if the database did not answer."""
        self._after = after
        self._database = database
        self._queues = queues
        self._handlers = handlers
        self._worker = worker
        self._timings = timings
        self._clock = clock
        self._looked_at = self._gpu_seen_at = clock.now()
        self._unmoved_s: dict[LeaseObservation, float] = {}
        self._over = clock.flag()
        self._thread = clock.thread(self._run, "sweeper")

    def start(self) -> None:
        """Start the thread, which sweeps at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sweeping, and remove the row of this worker, which accepts no more jobs."""
        self._over.set()
        self._thread.join()
        try:
            with self._database.writing() as session:
                workers.remove_worker(session, self._worker)
        except (Unavailable, DiskFull) as error:
            log.warning("worker not removed", worker=self._worker, error=error.detail)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.sweep()
            except (Unavailable, DiskFull) as error:
                log.warning("database away", thread="sweeper", error=error.detail)
            except Exception:
                log.exception("sweep failed")
            self._after()
            self._over.wait(self._timings.look_every_s)

    def sweep(self) -> int:
        """Check every running job once; return how many were taken over."""
        now = self._clock.now()
        with self._database.writing() as session:
            workers.see_worker(session, self._worker, self._queues)
            outbox.add_publish_jobs(session)
            if workers.count_live(session, Queue.GPU, GPU_GRACE_S):
                self._gpu_seen_at = now
            elif now - self._gpu_seen_at >= GPU_GRACE_S:
                workers.move_to_cpu(session)
            seen = jobs.observe_leases(session)
        now = self._clock.now()
        watched_s = min(now - self._looked_at, _ATTENTIVE * self._timings.look_every_s)
        self._looked_at = now
        before = self._unmoved_s
        self._unmoved_s = {
            observation: before[observation] + watched_s if observation in before else 0.0 for observation in seen
        }
        expired = [
            observation for observation, unmoved_s in self._unmoved_s.items() if unmoved_s >= self._timings.lease_s
        ]
        return sum(self._take_over(observation) for observation in expired)

    def _take_over(self, observation: LeaseObservation) -> bool:
        try:
            return self._end_lease(observation)
        except (Unavailable, DiskFull):
            raise
        except Exception:  # one job that cannot be taken over must not block the others
            log.exception("take-over failed", job=observation.job_id)
            return False

    def _end_lease(self, observation: LeaseObservation) -> bool:
        with self._database.writing() as session:
            job = jobs.take_over(session, observation)
            if job is None:
                return False
            handler = self._handlers[job.kind]
            match job.state:
                case JobState.QUEUED:
                    handler.requeued(session, job, None)
                case JobState.CANCELLED:
                    handler.cancelled(session, job)
                case _:
                    error = Stalled("Its worker was lost at every attempt.")
                    job.error = error.record()
                    handler.failed(session, job, error)
        log.warning("lease taken over", job=observation.job_id, state=job.state.value)
        return True
