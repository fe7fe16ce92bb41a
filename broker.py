"""How Espalier uses Celery: configuration, names of tasks, and counting and sending of messages. Knows no database.

Each job is a Celery task. The task is named after the job's kind, and its only argument is the job's id. The database
decides which job is next and which worker does it, so a message may be lost, delayed or delivered twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from celery import Celery

QUEUES = ("ingest", "cpu", "gpu", "tracking")
"""Names of the queues in Celery: the values of `models.job.Queue`, which this module may not import."""
LOCAL_URL = "redis://127.0.0.1:6379/0"
"""Address of the broker that a worker uses if REDIS_URL is not set."""


class Broker(Protocol):
    """A service that carries messages to workers. `count_waiting` and `send` raise if it does not answer."""

    def count_waiting(self, queue: str) -> int:
        """Return how many messages of a queue no worker has fetched yet."""
        ...

    def send(self, queue: str, kind: str, job_id: str) -> None:
        """Send the message that has a worker do a job."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


def task_name(kind: str) -> str:
    """Return the name of the Celery task that does jobs of a kind."""
    return f"espalier.{kind}"


def make_celery(url: Callable[[], str], queues: Callable[[], Sequence[str]] = lambda: QUEUES) -> Celery:
    """Return a Celery app for JSON messages. It stores no results, and each worker does one task at a time.

    Args:
        url: returns the broker's address. Called when Celery first reads its configuration, not at import.
        queues: returns the queues that a worker serves if it is started without `-Q`. Called like `url`.
    """
    app = Celery("espalier", set_as_current=False)
    app.add_defaults(
        lambda: {
            **_CONFIGURATION,
            "broker_url": url(),
            "broker_transport_options": {"socket_timeout": 3, "socket_connect_timeout": 1},
            "task_queues": {name: {"exchange": name, "routing_key": name} for name in queues()},
        }
    )
    return app


_CONFIGURATION: dict[str, Any] = {
    "accept_content": ["json"],
    # No limit. By default, Celery ends a worker after 100 failed attempts to connect, even if a task is running.
    "broker_connection_max_retries": None,
    "broker_connection_retry_on_startup": True,
    # A message is acknowledged when its task begins. If the worker dies, the lease in the database expires and the job
    # is queued again. With late acknowledgement, Redis would deliver every task of more than an hour a second time.
    "task_acks_late": False,
    "task_default_queue": "cpu",
    "task_ignore_result": True,
    "task_publish_retry": False,
    # Only affects tasks that are acknowledged late, so none of ours. Without it, Celery warns at each lost connection.
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_concurrency": 1,
    "worker_consumer": "worker.consumer:Consumer",
    # A busy worker fetches no messages in advance: a free worker should get them.
    "worker_disable_prefetch": True,
    "worker_hijack_root_logger": False,
    "worker_pool": "threads",
    "worker_prefetch_multiplier": 1,
    "worker_redirect_stdouts": False,
    # `celery events` and Flower show these events.
    "task_send_sent_event": True,
    "worker_send_task_events": True,
}


class CeleryBroker:
    """Sends and counts messages through Celery's pool of connections."""

    def __init__(self, url: str) -> None:
        self._app = make_celery(lambda: url)
        # By default, kombu retries for 6 s before it reports that the broker does not answer.
        self._app.conf.broker_transport_options["max_retries"] = 0

    def count_waiting(self, queue: str) -> int:
        """Return how many messages of a queue no worker has fetched yet."""
        with self._app.pool.acquire(block=True) as connection:
            declared = self._app.amqp.queues[queue].bind(connection.default_channel).queue_declare()
            return int(declared.message_count)

    def send(self, queue: str, kind: str, job_id: str) -> None:
        """Send the message that has a worker do a job."""
        self._app.send_task(task_name(kind), args=[job_id], queue=queue)

    def close(self) -> None:
        """Release the app and its pool of connections; Celery closes them when these objects are deleted."""
        self._app.close()
