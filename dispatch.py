"""Sends jobs to workers: for each free slot of a queue the due job of highest priority, and nothing ahead of that.

The order of jobs stays the database's until a slot is free, so what becomes urgent meanwhile goes first. A lost message
is sent again at the next look, and a doubled one does nothing: a job has one claim.
"""

from __future__ import annotations

from typing import Protocol

import structlog

from broker import Broker
from clock import Clock
from errors import DiskFull, Unavailable
from models import job as jobs
from models import worker as workers
from models.session import Database

log = structlog.get_logger()

_CLOSE_S = 5.0


class Dispatcher(Protocol):
    """What sends due jobs to free workers."""

    def request(self) -> None:
        """Look for due jobs soon. Never waits and never fails."""
        ...


def dispatch(database: Database, broker: Broker, live_s: float) -> int:
    """Send the due jobs of highest priority for which slots are free; return how many.

    Messages that wait already are taken to be for the jobs that come first.

    Args:
        database: decides which jobs are due and which workers are free.
        broker: carries the messages.
        live_s: a worker counts as live if it was seen within so many seconds.

    Raises:
        Unavailable, DiskFull: the database does not answer.
        Exception: whatever the broker's client raises if the broker does not answer.
    """
    with database.reading() as session:
        free = workers.count_free(session, live_s)
        due = {queue: jobs.due_jobs(session, queue, slots) for queue, slots in free.items() if slots}
    sent = 0
    for queue, found in due.items():
        for job_id, kind in found[broker.count_waiting(queue.value) :] if found else ():
            broker.send(queue.value, kind.value, job_id)
            log.info("job sent", job=job_id, kind=kind.value, queue=queue.value)
            sent += 1
    return sent


class ThreadDispatcher:
    """Dispatches on a thread of its own, since a broker that is away holds its callers for seconds."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        live_s: float,
        clock: Clock = Clock(),  # noqa: B008 - frozen
    ) -> None:
        self._database = database
        self._broker = broker
        self._live_s = live_s
        self._is_requested = clock.flag()
        self._is_closed = clock.flag()
        self._thread = clock.thread(self._run, "dispatcher")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def request(self) -> None:
        """Look for due jobs soon. Never waits and never fails."""
        self._is_requested.set()

    def close(self) -> None:
        """Stop, after a look that was requested before, or after a few seconds; close the broker's connections."""
        self._is_closed.set()
        self._is_requested.set()
        self._thread.join(_CLOSE_S)
        self._broker.close()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._is_requested.wait()
            self._is_requested.clear()
            is_last = self._is_closed.is_set()  # before the look, so that a request just before the end is looked at
            self._dispatch()

    def _dispatch(self) -> None:
        try:
            dispatch(self._database, self._broker, self._live_s)
        except (Unavailable, DiskFull) as error:
            log.warning("database away", thread="dispatcher", error=error.detail)
        except Exception as error:  # whatever the broker's client raises: the next sweep looks again
            log.warning("jobs not sent", error=str(error) or type(error).__name__)


class NoDispatcher:
    """Sends nothing, where no broker is configured."""

    def request(self) -> None:
        """Do nothing."""
