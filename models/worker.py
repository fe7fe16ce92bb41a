"""Workers: which queues they serve and when they last looked. Where work waits hangs on this, never whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import String, delete, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from models.base import Base, Json, now
from models.job import Job, JobState, Queue

# A worker that has not looked for work for this long counts as gone, as does one whose clock is that far ahead.
UNSEEN_S = 300.0
# Each start of a worker is a row of its own; those of long ago tell nothing.
_FORGOTTEN_S = 7 * 86_400.0


class Worker(Base):
    """A worker process, for display."""

    __tablename__ = "worker"

    name: Mapped[str] = mapped_column(String(127), primary_key=True)
    queues: Mapped[list[Any]] = mapped_column(Json)
    started_at: Mapped[datetime] = mapped_column(default=now)
    looked_at: Mapped[datetime] = mapped_column(default=now)


def see_worker(session: Session, name: str, queues: Sequence[Queue]) -> None:
    """Note that a worker looked for work."""
    worker = session.get(Worker, name)
    if worker is None:
        session.execute(delete(Worker).where(Worker.looked_at < now() - timedelta(seconds=_FORGOTTEN_S)))
        session.add(Worker(name=name, queues=list(queues)))
    else:
        worker.looked_at = now()
        worker.queues = list(queues)  # a new process may have an old one's name


def count_serving(session: Session, queue: Queue) -> int:
    """Return how many workers that were seen lately serve a queue."""
    near = timedelta(seconds=UNSEEN_S)
    seen = session.scalars(select(Worker).where(Worker.looked_at > now() - near, Worker.looked_at < now() + near))
    return sum(queue in worker.queues for worker in seen)


def training_queue(session: Session, learns_layers: bool) -> Queue:
    """Return where a run belongs: on a GPU if its layers learn and a worker with one has been seen lately."""
    return Queue.GPU if learns_layers and count_serving(session, Queue.GPU) else Queue.CPU


def hand_over_unserved(session: Session) -> int:
    """Give what waits for a GPU to the processors once no worker with one is there; return how many jobs."""
    if count_serving(session, Queue.GPU):
        return 0
    waiting = (Job.queue == Queue.GPU, Job.state == JobState.QUEUED)
    result: Any = session.execute(
        update(Job).where(*waiting).values(queue=Queue.CPU), execution_options={"synchronize_session": False}
    )
    return int(result.rowcount)
