"""A worker for tests and benchmarks that needs neither Celery nor a broker. It does the due jobs of one queue."""

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
    """Does the due jobs of one queue: in a thread that polls every `look_every_s`, or one job per call of `work`."""

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
        """Start the polling thread."""
        self._thread.start()

    def wake(self) -> None:
        """Poll for a due job now, instead of at the next interval."""
        self._is_woken.set()

    def drain(self) -> None:
        """Put the current job back into its queue and accept no more jobs."""
        self.runner.drain()
        self._draining.set()
        self._is_woken.set()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread of a drained worker has ended, at most `timeout_s`."""
        self._thread.join(timeout_s)

    def work(self) -> bool:
        """Do the due job that comes first; return False if no job is due."""
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
                    log.warning("database unavailable", queue=self._queue.value, error=error.detail)
                except Exception:
                    log.exception("polling failed", queue=self._queue.value)
                self._is_woken.wait(self._look_every_s)
                self._is_woken.clear()
        finally:
            self.runner.close()
