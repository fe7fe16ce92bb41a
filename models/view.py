"""Views: what can be looked at of a finished run, computed when it is first asked for and kept from then on.

queued → running → succeeded, or no row any more: a failure is told once, and whoever asks again begins anew

Computes nothing. One job makes one view; whoever asks meanwhile is told how far it is. A view that shows images goes
with them when their data set is deleted, what was measured on them stays with the run. Rows are locked in the order
data set, job, view.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, String, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from artifacts.store import Digest
from errors import NotReady
from models import job as jobs
from models.base import Base, new_id, now, text_enum
from models.dataset import Dataset, DatasetVersion
from models.job import Job, JobKind, Queue
from models.run import Run

DATASET_DELETED = "The data set of this run was deleted with its images, so that this cannot be computed any more."


class ViewKind(StrEnum):
    """What is shown: which layers there are, what one of them makes of an image, or what more images would bring."""

    LAYERS = "layers"
    ACTIVATIONS = "activations"
    LEARNING_CURVE = "learning-curve"

    @property
    def shows_images(self) -> bool:
        """Whether it is a picture of an image of the data set."""
        return self is ViewKind.ACTIVATIONS

    @property
    def needs_images(self) -> bool:
        """Whether the data set's images must be there to compute it."""
        return self is not ViewKind.LAYERS

    @property
    def queue(self) -> Queue:
        """Who computes it: what takes seconds does not wait for the trainings that are in line."""
        return Queue.CPU if self is ViewKind.LEARNING_CURVE else Queue.INGEST


class ViewState(StrEnum):
    """Where a view stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class View(Base):
    """Something to look at of a run; `key` says which of its kind. Its file is there once it has succeeded."""

    __tablename__ = "view"
    __table_args__ = (UniqueConstraint("run_id", "kind", "key"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("view"))
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"))
    kind: Mapped[ViewKind] = mapped_column(text_enum(ViewKind))
    key: Mapped[str] = mapped_column(String(255))
    state: Mapped[ViewState] = mapped_column(text_enum(ViewState), default=ViewState.QUEUED)
    progress: Mapped[dict[str, Any] | None]
    sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


# --- finding -------------------------------------------------------------------------------------------------------


def find_view(session: Session, run_id: str, kind: ViewKind, key: str = "") -> View | None:
    """Return a view, or None if nobody has asked for it."""
    return session.scalar(select(View).where(View.run_id == run_id, View.kind == kind, View.key == key))


def get_views(session: Session, run_id: str) -> Sequence[View]:
    """Return the views of a run."""
    return session.scalars(select(View).where(View.run_id == run_id).order_by(View.id)).all()


def activations_key(image: Digest, layer: str) -> str:
    """Return the key of the picture of what a layer makes of an image."""
    return f"{image}/{layer}"


def image_and_layer(view: View) -> tuple[Digest, str]:
    """Return what a picture of activations shows."""
    image, _, layer = view.key.partition("/")
    return Digest(image), layer


# --- asking --------------------------------------------------------------------------------------------------------


def request_view(session: Session, run: Run, kind: ViewKind, key: str = "") -> tuple[View, Job | None]:
    """Return a view, and the job that is owed for it now: None if somebody has asked for it before.

    Raises NotReady if it needs images whose data set was deleted.
    """
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    dataset = session.get_one(Dataset, version.dataset_id, with_for_update=True, populate_existing=True)
    found = find_view(session, run.id, kind, key)
    if found is not None:
        return found, None
    if kind.needs_images and dataset.deleted_at is not None:
        raise NotReady(DATASET_DELETED)
    view = View(run_id=run.id, kind=kind, key=key)
    session.add(view)
    session.flush()
    job = jobs.add_job(session, run.project_id, JobKind.VIEW, kind.queue, view.id, priority=jobs.UNDER_WAY)
    return view, job


def pop_failure(session: Session, view_id: str) -> dict[str, Any] | None:
    """Return why a view failed, and forget it, so that whoever asks again begins anew.

    None if somebody else was told at this moment.
    """
    view = _lock(session, view_id)
    if view is None or view.state is not ViewState.FAILED:
        return None
    session.delete(view)
    return view.error


# --- changing, by the holder of its job ------------------------------------------------------------------------------


def start_view(session: Session, view_id: str) -> View | None:
    """Note that a view is worked on; None if nobody wants it any more."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.progress = ViewState.RUNNING, None
    return view


def set_progress(session: Session, view_id: str, progress: dict[str, Any]) -> None:
    """Say how far a view is: `fraction` from 0 to 1, `eta_s` the seconds that it should still take."""
    view = _lock(session, view_id)
    if view is not None:
        view.progress = progress


def requeue_view(session: Session, view_id: str) -> None:
    """Put a view back in line."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.progress = ViewState.QUEUED, None


def succeed_view(session: Session, view_id: str, file: Digest, size_bytes: int) -> View | None:
    """Keep what was computed; None if nobody wants it any more, and what it shows goes with the images."""
    view = _lock(session, view_id)
    if view is None:
        return None
    if view.kind.shows_images and _dataset_of(session, view).deleted_at is not None:
        session.delete(view)
        return None
    view.sha256, view.size_bytes = file, size_bytes
    view.state, view.progress, view.finished_at = ViewState.SUCCEEDED, None, now()
    return view


def fail_view(session: Session, view_id: str, error: dict[str, Any]) -> None:
    """Note why a view could not be computed, for who asks next."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.error, view.finished_at = ViewState.FAILED, error, now()


def cancel_view(session: Session, view_id: str) -> None:
    """Forget a view whose computation was stopped because somebody asked for it."""
    session.execute(delete(View).where(View.id == view_id))


# --- deleting ------------------------------------------------------------------------------------------------------


def request_cancel(session: Session, version_ids: Sequence[str]) -> None:
    """Ask for what is being computed from the images of versions to end, since they are deleted."""
    query = select(View).join(Run, Run.id == View.run_id).where(Run.dataset_version_id.in_(version_ids))
    unfinished = query.where(View.state.in_((ViewState.QUEUED, ViewState.RUNNING)))
    for view in session.scalars(unfinished.order_by(View.id)).all():
        if view.kind.needs_images and jobs.request_cancel(session, view.id, JobKind.VIEW):
            cancel_view(session, view.id)


def drop_pictures(session: Session, version_ids: Sequence[str], limit: int) -> tuple[int, list[Digest]]:
    """Remove up to `limit` views that show images of versions; return how many, and their files."""
    shown = [kind for kind in ViewKind if kind.shows_images]
    query = select(View.id, View.sha256).join(Run, Run.id == View.run_id)
    gone = session.execute(
        query.where(Run.dataset_version_id.in_(version_ids), View.kind.in_(shown)).order_by(View.id).limit(limit)
    ).all()
    session.execute(delete(View).where(View.id.in_([view_id for view_id, _ in gone])))
    return len(gone), [Digest(sha256) for _, sha256 in gone if sha256 is not None]


def _dataset_of(session: Session, view: View) -> Dataset:
    run = session.get_one(Run, view.run_id)
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    return session.get_one(Dataset, version.dataset_id, populate_existing=True)


def _lock(session: Session, view_id: str) -> View | None:
    return session.get(View, view_id, with_for_update=True, populate_existing=True)
