"""Workers: the queues that they serve, and when they were last seen.

A worker process has one slot, so it does one job at a time.
"""

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
"""How long runs wait for a GPU worker that is gone: it may be restarting, and without a GPU they take hours."""
# Each start of a worker adds a row; rows of killed workers are deleted after a week.
_FORGOTTEN_S = 7 * 86_400.0


class Worker(Base):
    """A worker process, for display and for counting free slots."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(127), primary_key=True)
    queues: Mapped[list[Any]] = mapped_column(Json)
    started_at: Mapped[datetime] = mapped_column(default=now)
    looked_at: Mapped[datetime] = mapped_column(default=now)


def see_worker(session: Session, name: str, queues: Sequence[Queue]) -> None:
    """Record that a worker is alive, and which queues it serves."""
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
    """Delete the row of a worker that has ended."""
    session.execute(delete(Worker).where(Worker.name == name))


def count_live(session: Session, queue: Queue, live_s: float) -> int:
    """Return the number of live workers that serve a queue; `live_s` is the longest time since they were seen."""
    return sum(queue in worker.queues for worker in _live(session, live_s))


def count_free(session: Session, live_s: float) -> dict[Queue, int]:
    """Return for each queue the number of live workers that serve it and run no job."""
    busy = set(session.scalars(select(Job.lease_owner).where(Job.state == JobState.RUNNING)))
    free = Counter(queue for worker in _live(session, live_s) if worker.name not in busy for queue in worker.queues)
    return {queue: free[queue] for queue in Queue}


def training_queue(session: Session, learns_layers: bool) -> Queue:
    """Return the queue for a run: `gpu` if it trains layers and a GPU worker was seen lately, else `cpu`."""
    return Queue.GPU if learns_layers and count_live(session, Queue.GPU, GPU_GRACE_S) else Queue.CPU


def move_to_cpu(session: Session) -> int:
    """Move the jobs that wait for a GPU to the queue `cpu`; return how many."""
    waiting = (Job.queue == Queue.GPU, Job.state == JobState.QUEUED)
    result: Any = session.execute(
        update(Job).where(*waiting).values(queue=Queue.CPU), execution_options={"synchronize_session": False}
    )
    return int(result.rowcount)


def _live(session: Session, live_s: float) -> Sequence[Worker]:
    # A time that far in the future comes from a wrong clock and proves as little as an old one.
    near = timedelta(seconds=live_s)
    return session.scalars(select(Worker).where(Worker.looked_at > now() - near, Worker.looked_at < now() + near)).all()
