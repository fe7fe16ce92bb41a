"""Starts a local worker and waits until it is idle, so that tests need not guess when that is."""

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
def running_idle_worker(database: Database, handler: Handler) -> Iterator[LocalWorker]:
    """Run a worker that polls only when it is woken. When the block begins, it has done all due jobs and is idle."""
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
    """Return whether the thread of a local worker has ended."""
    assert isinstance(loop._thread, threading.Thread)
    return not loop._thread.is_alive()
