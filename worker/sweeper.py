"""Checks all running jobs every few seconds, and puts a job whose worker is gone back into its queue.

The sweeper also records that this worker is alive, queues the jobs that send results to MLflow, and then asks the
dispatcher to send due jobs. It runs no job itself.
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

# If a sweep comes late, at most this many intervals count as time in which the jobs were observed.
_ATTENTIVE = 2.0


class Sweeper:
    """Checks every running job every few seconds, and ends leases that are not renewed.

    A lease expires when its epoch and its count of renewals stay the same for `lease_s` seconds on the monotonic clock
    of this process. Time in which the machine or this process was suspended does not count.
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
        """Prepare the sweeper. It calls `after` at the end of each sweep, even if the database is unavailable."""
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
        """Start the thread. Its first sweep begins at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sweeping, and delete the database row that lists this worker, because it accepts no more jobs."""
        self._over.set()
        self._thread.join()
        try:
            with self._database.writing() as session:
                workers.remove_worker(session, self._worker)
        except (Unavailable, DiskFull) as error:
            log.warning("row of the worker not deleted", worker=self._worker, error=error.detail)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.sweep()
            except (Unavailable, DiskFull) as error:
                log.warning("database unavailable", thread="sweeper", error=error.detail)
            except Exception:
                log.exception("sweep failed")
            self._after()
            self._over.wait(self._timings.look_every_s)

    def sweep(self) -> int:
        """Check every running job once; return how many leases were ended because their workers are gone."""
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
                    error = Stalled("The worker of this job was lost at every attempt.")
                    job.error = error.record()
                    handler.failed(session, job, error)
        log.warning("lease taken over", job=observation.job_id, state=job.state.value)
        return True
