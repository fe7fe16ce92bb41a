"""Rings workers through Celery. The database is the truth: a bell that is not heard costs seconds, never a job.

Publishing happens on a thread of its own, since a dead broker holds a publisher for seconds.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import structlog
from celery import Celery

TASK = "espalier.work"

log = structlog.get_logger()

# A bell that nobody heard within this time is of no use: workers look by themselves more often than that.
_EXPIRES_S = 60
_WAITING = 1000
_CLOSE_S = 5.0


class Bell(Protocol):
    """Something that wakes the workers of a queue."""

    def ring(self, queue: str, job_id: str) -> None:
        """Wake a worker. Never waits and never fails."""
        ...


def celery_app(redis_url: str) -> Celery:
    """Return Celery as Espalier uses it: small JSON messages, no results, no trust in delivery."""
    app = Celery("espalier", broker=redis_url)
    app.conf.update(
        accept_content=["json"],
        # For ever: by default Celery ends a worker, whatever it is doing, after 100 tries or some 50 minutes.
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 1},
        task_acks_late=False,
        task_default_queue="espalier.cpu",
        task_ignore_result=True,
        task_publish_retry=False,
        # Of tasks that are acknowledged late, which bells are not; Celery prints a page of warning without it.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
    )
    return app


def celery_queue(queue: str) -> str:
    """Return the broker's name of a queue."""
    return f"espalier.{queue}"


class CeleryBell:
    """Rings through the broker, from a thread of its own."""

    def __init__(self, redis_url: str, expires_s: float = _EXPIRES_S) -> None:
        self._expires_s = expires_s
        self._app = celery_app(redis_url)
        # By default each bell would be tried for 6 s while the broker is away, and those behind it would wait.
        self._app.conf.broker_transport_options["max_retries"] = 0
        self._waiting: queue.Queue[tuple[str, str] | None] = queue.Queue(_WAITING)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="bell", daemon=True)
        self._thread.start()

    def ring(self, queue_name: str, job_id: str) -> None:
        """Wake a worker. Never waits and never fails."""
        try:
            self._waiting.put_nowait((queue_name, job_id))
        except queue.Full:
            log.warning("bell dropped", job=job_id, queue=queue_name)

    def close(self) -> None:
        """Stop after what was rung so far, or after a few seconds."""
        until = time.monotonic() + _CLOSE_S
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_S)
        self._thread.join(until - time.monotonic())
        self._is_closed.set()

    def _publish(self) -> None:
        while (item := self._waiting.get()) is not None and not self._is_closed.is_set():
            queue_name, job_id = item
            try:
                self._app.send_task(TASK, args=[job_id], queue=celery_queue(queue_name), expires=self._expires_s)
            except Exception as error:  # whatever the broker's client raises: workers look by themselves
                log.warning("bell not rung", job=job_id, queue=queue_name, error=str(error))


class EagerBell:
    """Calls a function in place of ringing; for tests and single-process use."""

    def __init__(self, heard: Callable[[str, str], None]) -> None:
        self._heard = heard

    def ring(self, queue: str, job_id: str) -> None:
        """Call the function."""
        self._heard(queue, job_id)
