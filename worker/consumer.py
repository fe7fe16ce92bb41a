"""A Celery consumer that reconnects within seconds after the broker was unreachable."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker import consumer

# Celery's default pause between two attempts to connect grows up to 30 s.
_RETRY_EVERY_S = 2.0


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Tries to reach an unreachable broker every 2 s, instead of less and less often."""

    def ensure_connected(self, conn: Any) -> Any:
        """Wait until the connection to the broker is established, and return it."""
        conn.ensure_connection = partial(
            conn.ensure_connection, interval_start=_RETRY_EVERY_S, interval_step=0, interval_max=_RETRY_EVERY_S
        )
        # Without this, Celery repeats a heartbeat that cannot be sent for ever, and does not notice meanwhile that the
        # worker has been asked to shut down.
        conn.ensure = partial(conn.ensure, max_retries=0)
        return super().ensure_connected(conn)
