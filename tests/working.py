"""Handlers, timings, faulty databases and queries for tests of the worker."""

from __future__ import annotations

import io
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import records
from PIL import Image
from sqlalchemy import create_engine, select, text, update
from sqlalchemy.orm import Session
from waiting import until

from artifacts.images import ImageLimits
from clock import Clock
from errors import DiskFull, EspalierError, Unavailable
from models import job as jobs
from models.base import now
from models.job import Job, JobKind, JobState, Lease, Queue
from models.registry import RegistryRevision
from models.session import Database
from worker.handlers.train import TrainingSettings
from worker.lease import Complete, Handler, LeaseHolder, Reason, Stopped, Timings, WarmChild, Work
from worker.local_worker import LocalWorker
from worker.messages import WeightsSource
from worker.sweeper import Sweeper

QUICK = Timings(look_every_s=0.05, renew_every_s=0.05, lease_s=2.0, let_go_s=20.0, cancel_every_s=0.05, stall_s=300.0)
# The timings of a worker that never renews its lease, as if its process were frozen.
NO_RENEWALS = replace(QUICK, renew_every_s=1000.0, cancel_every_s=1000.0)


# The timings of a sweeper for which a single interval can count as a whole lease.
SLOW_SWEEPS = replace(QUICK, look_every_s=QUICK.lease_s / 2)


class Outage:
    """Takes a database away and brings it back: SQLite is locked, PostgreSQL drops and refuses its connections."""

    def __init__(self, database: Database) -> None:
        self._url = database.engine.url
        self._lock: sqlite3.Connection | None = None
        self._is_sqlite = database.is_sqlite

    def begin(self) -> None:
        """Make the database unavailable."""
        if self._is_sqlite:
            self._lock = sqlite3.connect(
                str(self._url.database), isolation_level=None, timeout=10, check_same_thread=False
            )
            self._lock.execute("BEGIN EXCLUSIVE")
        else:
            cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._url.database}'"
            self._administer(f"ALTER DATABASE {self._url.database} ALLOW_CONNECTIONS false", cut)

    def end(self) -> None:
        """Make the database available again; do nothing if it is."""
        if not self._is_sqlite:
            self._administer(f"ALTER DATABASE {self._url.database} ALLOW_CONNECTIONS true")
        elif self._lock is not None:
            self._lock.close()
            self._lock = None

    def _administer(self, *statements: str) -> None:
        engine = create_engine(self._url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()


class LostCommitDatabase(Database):
    """A database whose connection breaks after every other commit: the commit succeeded, but `writing` raises."""

    _is_cut = False

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction and commit it at the end. Raises Unavailable every other time, after the commit."""
        with super().writing() as session:
            yield session
        self._is_cut = not self._is_cut
        if self._is_cut:
            raise Unavailable("The connection was cut during the commit.")


class FullDiskDatabase(Database):
    """A database whose disk is full while `is_full` is True: every write is then rolled back."""

    is_full = False

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction and commit it at the end. Raises DiskFull instead while there is no room."""
        with super().writing() as session:
            yield session
            if self.is_full:
                raise DiskFull("The disk of the database is full.")


SendFromChild = Callable[..., None]
"""Makes the next child process send these messages, `apart_s` seconds apart."""


class StartLoop(Protocol):
    """Starts a local worker that is drained at the end of the test."""

    def __call__(
        self,
        database: Database,
        handler: Handler,
        *,
        kind: JobKind = JobKind.TRAIN,
        queue: Queue = Queue.CPU,
        timings: Timings = QUICK,
        worker: str = "here",
    ) -> LocalWorker: ...


@contextmanager
def claimed_work(
    database: Database, draining: threading.Event | None = None, through: Database | None = None
) -> Iterator[Work]:
    """Claim the next job and renew its lease during a block, without a worker.

    The `Work` uses the database `through`, if it is given.
    """
    with database.writing() as session:
        job = records.claim_next(session, list(Queue), "here")
    assert job is not None
    is_draining = (draining or threading.Event()).is_set
    warm_child = WarmChild()
    with LeaseHolder(database, Lease(job.id, job.lease_epoch), QUICK, is_draining) as holder:
        yield Work(through or database, job, holder, warm_child)
    warm_child.clear()


def training_settings(folder: Path) -> TrainingSettings:
    """Return settings for training in `folder`, without a source of weights."""
    source = WeightsSource("http://127.0.0.1:1", "", 1.0, 1.0)
    return TrainingSettings(
        features=str(folder / "features"),
        pixels=str(folder / "pixels"),
        pixels_bytes=10**9,
        image_limits=ImageLimits(),
        threads=1,
        source=source,
        checkpoint_share=1.0,
    )


def slow_jpeg(scans: int, side: int = 4000) -> bytes:
    """Return a small JPEG that takes long to decode: its last scan is repeated, at about 10 ms each."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    start = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[start:-2] * scans + whole[-2:]


class FunctionHandler(Handler):
    """A handler that calls a function to do the work, and records the calls of its other methods."""

    def __init__(self, run: Callable[[Work], Complete | None]) -> None:
        self._run = run
        self.calls: list[tuple[Any, ...]] = []

    def run(self, work: Work) -> Complete:
        return self._run(work) or leave_mark

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        self.calls.append(("requeued", job.subject_id))

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        self.calls.append(("failed", job.subject_id, error.code))

    def cancelled(self, session: Session, job: Job) -> None:
        self.calls.append(("cancelled", job.subject_id))


def work_on(work: Work) -> None:
    """Report progress until the job must stop."""
    until(lambda: _go_on(work), within_s=120)


def _go_on(work: Work) -> bool:
    work.check()
    work.report_progress()
    return False


def reason_to_stop(work: Work) -> Reason:
    """Report progress until the job must stop; return the reason."""
    try:
        work_on(work)
    except Stopped as stopped:
        return stopped.reason
    raise AssertionError("unreachable")


def leave_mark(session: Session) -> None:
    """Change something in the database that `marks` counts."""
    session.execute(update(RegistryRevision).values(revision=RegistryRevision.revision + 1))


def marks(database: Database) -> int:
    """Return how often `leave_mark` was committed."""
    with database.reading() as session:
        return session.scalars(select(RegistryRevision.revision)).one()


def add_job(database: Database, subject: str = "run_1", kind: JobKind = JobKind.TRAIN, queue: Queue = Queue.CPU) -> str:
    """Queue a job and return its id."""
    with database.writing() as session:
        return jobs.add_job(session, records.PRINCIPAL.project_id, kind, queue, subject).id


def look(database: Database, job_id: str) -> Job:
    """Return the current row of a job."""
    with database.reading() as session:
        return session.get_one(Job, job_id)


def settled(database: Database, job_id: str, state: JobState, within_s: float = 120.0) -> Job:
    """Wait until a job is in this state; return its row."""
    until(lambda: look(database, job_id).state is state, within_s)
    return look(database, job_id)


def make_due(database: Database, job_id: str) -> None:
    """Make a job due that waits for its next attempt."""
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(next_attempt_at=now() - timedelta(seconds=1)))


def request_cancel(database: Database, subject: str = "run_1") -> None:
    """Request the cancellation of the training of a run."""
    with database.writing() as session:
        jobs.request_cancel(session, subject, JobKind.TRAIN)


def sweep_twice(database: Database, handler: Handler) -> int:
    """Sweep twice, so that every lease without renewals expires; return how many leases expired."""
    clock = [100.0]
    handlers = dict.fromkeys(JobKind, handler)
    sweeper = Sweeper(database, [Queue.CPU], handlers, "there", SLOW_SWEEPS, Clock(lambda: clock[0]))
    assert sweeper.sweep() == 0
    clock[0] += SLOW_SWEEPS.lease_s
    return sweeper.sweep()
