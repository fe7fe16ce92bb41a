"""A local worker that has found nothing to do and waits to be woken, so that no test has to guess when it does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from working import QUICK

from clock import Clock
from models.job import JobKind, Queue
from models.session import Database
from worker.lease import Handler
from worker.local_worker import LocalWorker

_LOOK_EVERY_S = 600.0


@contextmanager
def resting_loop(database: Database, handler: Handler) -> Iterator[LocalWorker]:
    """Run a loop that would not look by itself; it has done what was queued before, and has found no more."""
    is_resting = threading.Event()

    class Flag(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout == _LOOK_EVERY_S:
                is_resting.set()
            return super().wait(timeout)

    timings = replace(QUICK, look_every_s=_LOOK_EVERY_S)
    loop = LocalWorker(database, Queue.CPU, {JobKind.TRAIN: handler}, "here", timings, Clock(flag=Flag))
    loop.start()
    try:
        assert is_resting.wait(120)
        yield loop
    finally:
        loop.drain()
        loop.join(60)
    assert has_ended(loop)


def has_ended(loop: LocalWorker) -> bool:
    """Say whether a loop's own thread is over."""
    assert isinstance(loop._thread, threading.Thread)
    return not loop._thread.is_alive()
