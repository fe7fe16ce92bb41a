"""Celery's consumer, which comes back within seconds after a broker was away."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker import consumer

# By default the pause between two attempts grows to 30 s.
_RETRY_EVERY_S = 2.0


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """A consumer whose attempts to reach the broker are a constant time apart."""

    def ensure_connected(self, conn: Any) -> Any:
        """Wait until a connection is established, and return it."""
        conn.ensure_connection = partial(
            conn.ensure_connection, interval_start=_RETRY_EVERY_S, interval_step=0, interval_max=_RETRY_EVERY_S
        )
        # A heartbeat that cannot be sent waits for the connection. By default Celery sends it again and again, and does
        # not look whether the worker is to end.
        conn.ensure = partial(conn.ensure, max_retries=0)
        return super().ensure_connected(conn)
