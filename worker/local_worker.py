"""A worker without Celery and a broker, for tests and benchmarks: does the due jobs of one queue in this process."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from clock import Clock
from errors import DiskFull, Unavailable
from models import job as jobs
from models import outbox
from models.job import JobKind, Queue
from models.session import Database
from worker.job_runner import JobFailed, JobRunner, Outcome
from worker.lease import Handler, Timings

log = structlog.get_logger()


class LocalWorker:
    """Looks for due jobs every `look_every_s` on a thread of its own, or does one when `work` is called."""

    def __init__(
        self,
        database: Database,
        queue: Queue,
        handlers: Mapping[JobKind, Handler],
        worker: str,
        timings: Timings,
        clock: Clock = Clock(),  # noqa: B008 - frozen
    ) -> None:
        self.runner = JobRunner(database, [queue], handlers, worker, timings, clock)
        self._database = database
        self._queue = queue
        self._look_every_s = timings.look_every_s
        self._is_woken = clock.flag()
        self._draining = clock.flag()
        self._thread = clock.thread(self._run, f"queue-{queue.value}")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Look for a job now."""
        self._is_woken.set()

    def drain(self) -> None:
        """Give the present job back and accept no other one."""
        self.runner.drain()
        self._draining.set()
        self._is_woken.set()

    def join(self, timeout_s: float) -> None:
        """Wait until a drained worker has ended."""
        self._thread.join(timeout_s)

    def work(self) -> bool:
        """Do the job that is next; return whether there was one."""
        if self._queue is Queue.TRACKING:
            with self._database.writing() as session:
                outbox.add_publish_jobs(session)
        with self._database.reading() as session:
            due = jobs.due_jobs(session, self._queue, 1)
        if not due:
            return False
        try:
            return self.runner.run(due[0][0]) is not Outcome.NOT_CLAIMED
        except JobFailed:
            return True

    def _run(self) -> None:
        try:
            while not self._draining.is_set():
                try:
                    if self.work():
                        continue
                    self.runner.close()
                except (Unavailable, DiskFull) as error:
                    log.warning("database away", queue=self._queue.value, error=error.detail)
                except Exception:
                    log.exception("look failed", queue=self._queue.value)
                self._is_woken.wait(self._look_every_s)
                self._is_woken.clear()
        finally:
            self.runner.close()
