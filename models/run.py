"""Runs: what was asked, how far it is, what came out. Trains nothing.

queued → running → succeeded | failed | cancelled        running → queued when its worker was lost
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from artifacts.recipe import Recipe
from artifacts.store import Digest
from errors import NotFound
from models.base import Base, Json, new_id, now, text_enum
from models.project import Principal, owner, scope


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Say whether nothing will happen any more."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


class EventKind(StrEnum):
    """What an event tells."""

    PROGRESS = "progress"
    EPOCH = "epoch"
    FOLD = "fold"
    STATE = "state"


class Run(Base):
    """One training of one model on one data set version."""

    __tablename__ = "run"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("run"))
    project_id: Mapped[str] = owner()
    dataset_version_id: Mapped[str] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    name: Mapped[str] = mapped_column(String(63))
    recipe: Mapped[dict[str, Any]]
    state: Mapped[RunState] = mapped_column(text_enum(RunState), default=RunState.QUEUED)
    progress: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    extraction: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    mlflow_experiment_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class RunEvent(Base):
    """One thing that happened in a run; `seq` counts from 1 without a gap."""

    __tablename__ = "run_event"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[EventKind] = mapped_column(text_enum(EventKind))
    payload: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=now)


class Fold(Base):
    """What one fold of a run measured; `history` has one entry per epoch."""

    __tablename__ = "fold"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epochs: Mapped[int]
    best_epoch: Mapped[int]
    stopped: Mapped[str] = mapped_column(String(32))
    metrics: Mapped[dict[str, Any]]
    history: Mapped[list[Any]]


class RunArtifact(Base):
    """A file that a run made, by its name in the run."""

    __tablename__ = "run_artifact"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(127))


def get_run(session: Session, principal: Principal, run_id: str) -> Run:
    """Return a run. Raises NotFound."""
    run = session.scalar(select(Run).where(Run.id == run_id, scope(Run.project_id, principal)))
    if run is None:
        raise NotFound(f"No run has the id {run_id!r}.")
    return run


def get_folds(session: Session, run_id: str) -> Sequence[Fold]:
    """Return the folds that are done, in their order."""
    return session.scalars(select(Fold).where(Fold.run_id == run_id).order_by(Fold.number)).all()


def get_artifacts(session: Session, run_id: str) -> Sequence[RunArtifact]:
    """Return the files of a run by name."""
    return session.scalars(select(RunArtifact).where(RunArtifact.run_id == run_id).order_by(RunArtifact.name)).all()


def get_events(session: Session, run_id: str, after: int, limit: int = 500) -> Sequence[RunEvent]:
    """Return the events after number `after`, in their order."""
    query = select(RunEvent).where(RunEvent.run_id == run_id, RunEvent.seq > after)
    return session.scalars(query.order_by(RunEvent.seq).limit(limit)).all()


def last_event(session: Session, run_id: str) -> int:
    """Return the number of a run's last event; 0 before the first."""
    return session.scalar(select(func.max(RunEvent.seq)).where(RunEvent.run_id == run_id)) or 0


def is_any_active(session: Session, version_ids: Sequence[str]) -> bool:
    """Say whether a run on one of these data set versions is queued or running."""
    states = (RunState.QUEUED, RunState.RUNNING)
    return bool(
        session.scalar(select(func.count()).where(Run.dataset_version_id.in_(version_ids), Run.state.in_(states)))
    )


def create_run(session: Session, principal: Principal, version_id: str, name: str, recipe: Recipe) -> Run:
    """Add a queued run with its recipe as it will be trained."""
    run = Run(
        project_id=principal.project_id,
        dataset_version_id=version_id,
        name=name,
        recipe=recipe.model_dump(mode="json"),
        progress=progress(stage="queued"),
    )
    session.add(run)
    session.flush()
    add_event(session, run.id, EventKind.STATE, {"state": RunState.QUEUED})
    return run


def start_run(session: Session, run_id: str) -> Run:
    """Mark a run as running, forgetting what an interrupted attempt left."""
    run = _change(session, run_id, RunState.RUNNING, {"started_at": now(), "progress": progress(stage="starting")})
    for fold in get_folds(session, run_id):
        session.delete(fold)
    return run


def requeue_run(session: Session, run_id: str) -> None:
    """Put a run back in line after its worker was lost; one whose worker never began is still there."""
    run = session.get_one(Run, run_id, with_for_update=True)
    if run.state is not RunState.QUEUED:
        _change(session, run_id, RunState.QUEUED, {"started_at": None, "progress": progress(stage="queued")})


def succeed_run(session: Session, run_id: str, metrics: dict[str, Any], extraction: dict[str, Any]) -> Run:
    """Close a run with what it measured."""
    done = {"metrics": metrics, "extraction": extraction, "finished_at": now()}
    return _change(session, run_id, RunState.SUCCEEDED, done | {"progress": progress(stage="done", fraction=1.0)})


def fail_run(session: Session, run_id: str, error: dict[str, Any]) -> Run:
    """Close a run with what went wrong."""
    return _change(session, run_id, RunState.FAILED, {"error": error, "finished_at": now()})


def cancel_run(session: Session, run_id: str) -> Run:
    """Close a run because somebody asked for it."""
    return _change(session, run_id, RunState.CANCELLED, {"finished_at": now()})


_ALLOWED = {
    RunState.QUEUED: {RunState.RUNNING, RunState.CANCELLED, RunState.FAILED},
    RunState.RUNNING: {RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
}


def _change(session: Session, run_id: str, state: RunState, values: Mapping[str, Any]) -> Run:
    run = session.get_one(Run, run_id, with_for_update=True)
    if state not in _ALLOWED.get(run.state, set()):
        raise RuntimeError(f"Run {run_id} cannot go from {run.state} to {state}. This is a bug.")
    run.state = state
    for name, value in values.items():
        setattr(run, name, value)
    add_event(session, run_id, EventKind.STATE, {"state": state, "error": run.error})
    return run


def add_event(session: Session, run_id: str, kind: EventKind, payload: dict[str, Any]) -> None:
    """Append an event; the caller holds the run's lease or its row, so that numbers do not clash."""
    seq = last_event(session, run_id) + 1
    session.add(RunEvent(run_id=run_id, seq=seq, kind=kind, payload=payload))
    session.flush()


def progress(
    stage: str,
    fraction: float = 0.0,
    fold: int | None = None,
    folds: int | None = None,
    epoch: int | None = None,
    epochs: int | None = None,
    eta_s: float | None = None,
) -> dict[str, Any]:
    """Return how far a run is: `fraction` of the whole from 0 to 1, `eta_s` the seconds it should still take."""
    return {
        "stage": stage,
        "fraction": fraction,
        "fold": fold,
        "folds": folds,
        "epoch": epoch,
        "epochs": epochs,
        "eta_s": eta_s,
    }


def set_progress(session: Session, run_id: str, state: dict[str, Any]) -> None:
    """Replace a run's progress and tell it as an event."""
    session.get_one(Run, run_id).progress = state
    add_event(session, run_id, EventKind.PROGRESS, state)


def add_fold(session: Session, fold: Fold) -> None:
    """Add a finished fold and tell it as an event."""
    session.add(fold)
    payload = {"fold": fold.number, "epochs": fold.epochs, "best_epoch": fold.best_epoch, "metrics": fold.metrics}
    add_event(session, fold.run_id, EventKind.FOLD, payload)


def add_artifact(session: Session, run_id: str, name: str, digest: Digest, size_bytes: int, media_type: str) -> None:
    """Name a stored file as belonging to a run, replacing an earlier one of that name."""
    session.merge(RunArtifact(run_id=run_id, name=name, sha256=digest, size_bytes=size_bytes, media_type=media_type))
