"""The names of queues in `broker` and in the database."""

from __future__ import annotations

import broker
from models.job import Queue


def test_celery_and_the_database_name_the_same_queues() -> None:
    # `broker` may import no room, so the two lists cannot share their definition.
    assert set(broker.QUEUES) == {queue.value for queue in Queue}
