"""Celery as Espalier uses it: its configuration, the names of tasks, and how many messages wait in the broker.

A job is a Celery task with the name of its kind, and its only argument is the job's id. The database decides which job
is next and who works on it, so a message may be lost, delayed or delivered twice. Knows no database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from celery import Celery

QUEUES = ("ingest", "cpu", "gpu", "tracking")
"""Names of the queues, in Celery and in the database."""
LOCAL_URL = "redis://127.0.0.1:6379/0"
"""Where a broker is expected if REDIS_URL is not set."""


class Broker(Protocol):
    """What carries messages to workers. Every method raises if the broker does not answer."""

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
    """Return a Celery app: small JSON messages, no stored results, one slot in each worker, no trust in delivery.

    Both functions are called when the configuration is first read, not at import.

    Args:
        url: returns the broker's address.
        queues: returns the queues that a worker serves if it is started without `-Q`.
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
    # No limit: by default Celery ends a worker after 100 failed attempts, whatever it is doing.
    "broker_connection_max_retries": None,
    "broker_connection_retry_on_startup": True,
    # A job is acknowledged when it begins: the lease in the database sees to a worker that dies, Redis would deliver a
    # task of more than an hour a second time.
    "task_acks_late": False,
    "task_default_queue": "cpu",
    "task_ignore_result": True,
    "task_publish_retry": False,
    # For tasks that are acknowledged late, which ours are not. Without it Celery warns at each lost connection.
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_concurrency": 1,
    "worker_consumer": "worker.consumer:Consumer",
    # A message that waits in a busy worker could be done by another one that is free.
    "worker_disable_prefetch": True,
    "worker_hijack_root_logger": False,
    "worker_pool": "threads",
    "worker_prefetch_multiplier": 1,
    "worker_redirect_stdouts": False,
    # For `celery events` and Flower.
    "task_send_sent_event": True,
    "worker_send_task_events": True,
}


class CeleryBroker:
    """Sends and counts messages through Celery's pool of connections."""

    def __init__(self, url: str) -> None:
        self._app = make_celery(lambda: url)
        # By default each message would be tried for 6 s while the broker is away.
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
        """Let go of the connections: they are closed with the objects that hold them."""
        self._app.close()
