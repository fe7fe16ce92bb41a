"""Sends due jobs to workers: as many as a queue has free slots, those of highest priority first.

A job is not sent before a slot is free, so a more urgent job that is queued meanwhile can still go first. The next
dispatch sends a lost message again. A duplicate message does nothing, because a job can be claimed only once.
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
    """Sends due jobs to free workers."""

    def request(self) -> None:
        """Ask for a dispatch of due jobs soon. Returns at once and raises nothing."""
        ...


def dispatch(database: Database, broker: Broker, live_s: float) -> int:
    """Send as many due jobs as workers are free, those of highest priority first; return how many were sent.

    If n messages of a queue already wait in the broker, the first n due jobs are skipped, because those messages are
    assumed to be for them.

    Args:
        database: holds the jobs and the workers.
        broker: carries the messages.
        live_s: maximum seconds since a worker was last seen for it to count as live.

    Raises:
        Unavailable, DiskFull: the database does not answer, or its disk is full.
        Exception: an exception of the broker's client, if the broker does not answer.
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
    """A dispatcher with its own thread, because calls to a broker that does not answer block for seconds."""

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
        """Start the dispatcher's thread."""
        self._thread.start()

    def request(self) -> None:
        """Ask for a dispatch of due jobs soon. Returns at once and raises nothing."""
        self._is_requested.set()

    def close(self) -> None:
        """Stop the thread after one last dispatch, then close the broker's connections.

        Waits at most 5 seconds for the dispatch.
        """
        self._is_closed.set()
        self._is_requested.set()
        self._thread.join(_CLOSE_S)
        self._broker.close()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._is_requested.wait()
            self._is_requested.clear()
            is_last = self._is_closed.is_set()  # read first, so that a request just before `close` is still served
            self._dispatch()

    def _dispatch(self) -> None:
        try:
            dispatch(self._database, self._broker, self._live_s)
        except (Unavailable, DiskFull) as error:
            log.warning("database unavailable", thread="dispatcher", error=error.detail)
        except Exception as error:  # any exception of the broker's client; the next sweep dispatches again
            log.warning("jobs not sent", error=str(error) or type(error).__name__)


class NoDispatcher:
    """A dispatcher for a process without a broker: it sends nothing."""

    def request(self) -> None:
        """Ignore the request."""
