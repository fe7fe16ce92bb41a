"""Workers: which queues each of them serves, and when it was last seen. A worker does one job at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import String, delete, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Json, now
from models.job import Job, JobState, Queue

GPU_GRACE_S = 300.0
"""Seconds for which runs still go to the queue `gpu` after its last worker was seen.

The worker may only be restarting, and without a GPU the runs would take hours.
"""
# Each start of a worker adds a row; rows of killed workers are deleted after a week.
_FORGOTTEN_S = 7 * 86_400.0


class Worker(Base):
    """A worker process. The rows are shown to operators, and the dispatcher counts free workers by them."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(127), primary_key=True)
    queues: Mapped[list[Any]] = mapped_column(Json)
    started_at: Mapped[datetime] = mapped_column(default=now)
    looked_at: Mapped[datetime] = mapped_column(default=now)


def see_worker(session: Session, name: str, queues: Sequence[Queue]) -> None:
    """Record that a worker is alive now, and which queues it serves."""
    worker = session.get(Worker, name)
    if worker is None:
        session.execute(delete(Worker).where(Worker.looked_at < now() - timedelta(seconds=_FORGOTTEN_S)))
        session.add(Worker(name=name, queues=list(queues)))
    else:
        worker.looked_at = now()
        worker.queues = list(queues)  # a new process may have the name of an old one


def list_workers(session: Session, limit: int) -> Sequence[Worker]:
    """Return at most `limit` workers, the most recently seen first."""
    return session.scalars(select(Worker).order_by(Worker.looked_at.desc()).limit(limit)).all()


def remove_worker(session: Session, name: str) -> None:
    """Delete the row of a worker that has shut down."""
    session.execute(delete(Worker).where(Worker.name == name))


def count_live(session: Session, queue: Queue, live_s: float) -> int:
    """Return how many workers that serve a queue were seen within the last `live_s` seconds."""
    return sum(queue in worker.queues for worker in _live(session, live_s))


def count_free(session: Session, live_s: float) -> dict[Queue, int]:
    """Return how many workers of each queue are free: seen within the last `live_s` seconds and running no job."""
    busy = set(session.scalars(select(Job.lease_owner).where(Job.state == JobState.RUNNING)))
    free = Counter(queue for worker in _live(session, live_s) if worker.name not in busy for queue in worker.queues)
    return {queue: free[queue] for queue in Queue}


def training_queue(session: Session, learns_layers: bool) -> Queue:
    """Return the queue for a run: `gpu` if the run trains layers and a GPU worker was seen recently, else `cpu`."""
    return Queue.GPU if learns_layers and count_live(session, Queue.GPU, GPU_GRACE_S) else Queue.CPU


def move_to_cpu(session: Session) -> int:
    """Move all queued jobs from the queue `gpu` to the queue `cpu`; return how many were moved."""
    waiting = (Job.queue == Queue.GPU, Job.state == JobState.QUEUED)
    result: Any = session.execute(
        update(Job).where(*waiting).values(queue=Queue.CPU), execution_options={"synchronize_session": False}
    )
    return int(result.rowcount)


def _live(session: Session, live_s: float) -> Sequence[Worker]:
    # A time far in the future comes from a wrong clock, so it does not show that the worker is alive.
    near = timedelta(seconds=live_s)
    return session.scalars(select(Worker).where(Worker.looked_at > now() - near, Worker.looked_at < now() + near)).all()
