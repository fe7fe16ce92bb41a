"""The outbox: facts about runs that were not sent to MLflow yet, in the order in which they happened.

Never calls MLflow: publish jobs send the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer, String, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from models import job as jobs
from models.base import Base, Json, now
from models.job import UNFINISHED, Job, JobKind, Queue
from models.run import Run


class Outbox(Base):
    """One fact about a run that was not sent to MLflow yet. The row is deleted after MLflow has received the fact."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), index=True)
    kind: Mapped[str] = mapped_column(String(32))
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(default=now)


def add_to_outbox(session: Session, run_id: str, kind: str, payload: dict[str, Any]) -> None:
    """Add a fact about a run that MLflow must receive. Call it in the transaction that makes the fact true."""
    session.add(Outbox(run_id=run_id, kind=kind, payload=payload))


REFUSED = "refused"
"""The kind of rows that are not sent but record what MLflow refused for good; the payload has `what` and `reason`."""


def record_refusals(session: Session, run_id: str, refusals: Sequence[Mapping[str, str]]) -> None:
    """Record what MLflow refused of a run for good; a later refusal of the same thing replaces an earlier one."""
    known = {row.payload["what"]: row for row in get_refusals(session, run_id)}
    for refusal in refusals:
        row = known.get(refusal["what"])
        if row is None:
            row = known[refusal["what"]] = Outbox(run_id=run_id, kind=REFUSED, payload={})
            session.add(row)
        row.payload = dict(refusal)


def drop_refusals(session: Session, run_id: str) -> None:
    """Delete the refusals of a run, because all of the run is sent to MLflow again."""
    session.execute(delete(Outbox).where(Outbox.run_id == run_id, Outbox.kind == REFUSED))


def get_refusals(session: Session, run_id: str) -> Sequence[Outbox]:
    """Return what MLflow refused of a run for good, oldest first."""
    query = select(Outbox).where(Outbox.run_id == run_id, Outbox.kind == REFUSED)
    return session.scalars(query.order_by(Outbox.id)).all()


@dataclass(frozen=True)
class OutboxSummary:
    """How many facts MLflow does not have: those that wait, since when, those that it refused, and the last refusal."""

    waiting: int
    waiting_since: datetime | None
    refused: int
    last_refusal: Outbox | None


def summarize_outbox(session: Session) -> OutboxSummary:
    """Return a summary of the facts about all runs that MLflow does not have."""
    waiting, since = session.execute(
        select(func.count(), func.min(Outbox.created_at)).where(Outbox.kind != REFUSED)
    ).one()
    refused = select(Outbox).where(Outbox.kind == REFUSED)
    last = session.scalar(refused.order_by(Outbox.id.desc()).limit(1))
    count = session.scalar(select(func.count()).select_from(refused.subquery())) or 0
    return OutboxSummary(waiting, since, count, last)


def add_end_to_outbox(session: Session, run_id: str) -> None:
    """Add the end of a run that was cancelled while no worker held it.

    Does nothing if MLflow does not know the run and the outbox has no rows of it.
    """
    if session.get_one(Run, run_id).mlflow_run_id is not None or get_unsent_rows(session, run_id):
        add_to_outbox(session, run_id, "finished", {})


def get_unsent_rows(session: Session, run_id: str) -> Sequence[Outbox]:
    """Return the facts about a run that are still to be sent to MLflow, the oldest first."""
    query = select(Outbox).where(Outbox.run_id == run_id, Outbox.kind != REFUSED)
    return session.scalars(query.order_by(Outbox.id)).all()


def add_publish_jobs(session: Session) -> int:
    """Queue a publish job for every run that has rows in the outbox, unless it already has an unfinished publish job.

    Returns how many jobs were queued.
    """
    busy = select(Job.subject_id).where(Job.kind == JobKind.PUBLISH, Job.state.in_(UNFINISHED))
    query = select(Run.id, Run.project_id).where(
        Run.id.in_(select(Outbox.run_id).where(Outbox.kind != REFUSED)), Run.id.not_in(busy)
    )
    added = 0
    for run_id, project_id in session.execute(query).all():
        try:
            with session.begin_nested():
                jobs.add_job(session, project_id, JobKind.PUBLISH, Queue.TRACKING, run_id)
        except IntegrityError:
            continue  # another worker queued it at the same moment
        added += 1
    return added
