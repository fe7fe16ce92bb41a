"""What the worker's tests share: loops that end with their test, and databases that go away for a while."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from working import QUICK, Outage, SendFromChild, StartLoop

from models import job as jobs
from models.job import JobKind, Queue
from models.session import Database
from worker.lease import Handler, Timings
from worker.local_worker import LocalWorker
from worker.messages import ChildMessage, line_of


@pytest.fixture
def sqlite(tmp_path: Path, migrated_file: Path) -> Iterator[Database]:
    """A migrated SQLite database, for what does not depend on the kind."""
    database = Database(f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'test.db')}")
    yield database
    database.close()


@pytest.fixture
def impatient(database: Database) -> Iterator[Database]:
    """The same database through connections that notice quickly when it is away."""
    hasty = Database(database.engine.url, busy_timeout_s=0.05)
    yield hasty
    hasty.close()


@pytest.fixture
def outage(database: Database) -> Iterator[Outage]:
    """What takes the database away."""
    outage = Outage(database)
    yield outage
    outage.end()


@pytest.fixture
def start_loop() -> Iterator[StartLoop]:
    """Start loops that are drained at the end of the test."""
    loops: list[LocalWorker] = []

    def start(
        database: Database,
        handler: Handler,
        *,
        kind: JobKind = JobKind.TRAIN,
        queue: Queue = Queue.CPU,
        timings: Timings = QUICK,
        worker: str = "here",
    ) -> LocalWorker:
        loop = LocalWorker(database, queue, {kind: handler}, worker, timings)
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.drain()
    for loop in loops:
        loop.join(60)


@pytest.fixture
def long_back_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], float]:
    """Have a job that failed for now wait so long that only a test makes it due; return how long, by its attempts."""

    def back_off_s(attempt: int) -> float:
        return 1000.0 * attempt

    monkeypatch.setattr(jobs, "BACK_OFF_S", 10_000.0)  # what is to wait longer than this counts as due
    monkeypatch.setattr(jobs, "back_off_s", back_off_s)
    return back_off_s


@pytest.fixture
def send_from_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SendFromChild:
    """Have the next child send these messages, a while apart; after one that asks it waits for the answer."""

    def make(*messages: ChildMessage, apart_s: float = 0.0, on_drain: Sequence[ChildMessage] | None = None) -> None:
        (tmp_path / "messages").write_text("".join(map(line_of, messages)))
        (tmp_path / "last").write_text("".join(map(line_of, on_drain or [])))
        (tmp_path / "sitecustomize.py").write_text(
            f"""
import os, sys, time
if "worker.child" in sys.orig_argv:
    channel = int(sys.orig_argv[-1])
    sys.stdin.readline()
    open({str(tmp_path / "devices")!r}, "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    open({str(tmp_path / "threads")!r}, "w").write(os.environ.get("TF_NUM_INTRAOP_THREADS", "all"))
    for line in open({str(tmp_path / "messages")!r}):
        os.write(channel, line.strip().encode() + b"\\n")
        if "add_backbone" in line:
            sys.stdin.readline()
        time.sleep({apart_s})
    if {on_drain is not None}:
        sys.stdin.readline()
        os.write(channel, open({str(tmp_path / "last")!r}, "rb").read())
    os._exit(0)
"""
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make
