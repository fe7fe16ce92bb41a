"""The one Celery task: a bell. It wakes the loop that claims whatever is due; a stale bell wakes it for nothing."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

import bell


def add_task(celery: Celery, wake: Callable[[], None]) -> None:
    """Answer `espalier.work(job_id)` by waking the worker's loops."""

    @celery.task(name=bell.TASK, shared=False)  # type: ignore[untyped-decorator]
    def work(job_id: str) -> None:
        wake()
