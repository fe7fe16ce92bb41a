"""Views of a finished run: layers, activations and learning curve. Computes nothing itself.

queued → running → succeeded | failed

The first request for a view queues a job that computes it. Until it is computed, requests receive the progress; after
that, they receive the result, which is kept. A failure is reported once and then deleted, so that the next request
starts again. When a data set is deleted, views that show its images are deleted too; other views stay with the run.
To avoid deadlocks, every transaction locks rows in the order data set, job, view.
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

DATASET_DELETED = "The data set of this run and its images were deleted, so this view can no longer be computed."


class ViewKind(StrEnum):
    """What a view shows: the list of layers, the maps of one layer for an image, or the learning curve."""

    LAYERS = "layers"
    ACTIVATIONS = "activations"
    LEARNING_CURVE = "learning-curve"

    @property
    def shows_images(self) -> bool:
        """Whether the computed view contains an image of the data set."""
        return self is ViewKind.ACTIVATIONS

    @property
    def needs_images(self) -> bool:
        """Whether computing the view reads images of the data set."""
        return self is not ViewKind.LAYERS

    @property
    def queue(self) -> Queue:
        """The queue of the job that computes the view.

        Views that take seconds are computed in the queue `ingest`, so that they do not wait behind trainings.
        """
        return Queue.CPU if self is ViewKind.LEARNING_CURVE else Queue.INGEST


class ViewState(StrEnum):
    """The state of a view's computation."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class View(Base):
    """One view of a run, in the file `sha256` once it is computed.

    `key` distinguishes views of the same run and kind, for example by image and layer.
    """

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
    """Return a view, or None if it was never requested."""
    return session.scalar(select(View).where(View.run_id == run_id, View.kind == kind, View.key == key))


def get_views(session: Session, run_id: str) -> Sequence[View]:
    """Return all views of a run in the order of their creation."""
    return session.scalars(select(View).where(View.run_id == run_id).order_by(View.id)).all()


def activations_key(image: Digest, layer: str) -> str:
    """Return the key of a view that shows the activations of a layer for an image."""
    return f"{image}/{layer}"


def image_and_layer(view: View) -> tuple[Digest, str]:
    """Return the image and the layer whose activations a view shows, parsed from the view's key."""
    image, _, layer = view.key.partition("/")
    return Digest(image), layer


# --- requesting ----------------------------------------------------------------------------------------------------


def request_view(session: Session, run: Run, kind: ViewKind, key: str = "") -> tuple[View, Job | None]:
    """Return a view, and the job that will compute it if this is the first request for the view, else None.

    Raises NotReady if computing the view needs images and their data set was deleted.
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
    """Return the error of a failed view and delete the view, so that the next request computes it again.

    Returns None if another request has already received the error.
    """
    view = _lock(session, view_id)
    if view is None or view.state is not ViewState.FAILED:
        return None
    session.delete(view)
    return view.error


# --- changing, by the holder of its job ------------------------------------------------------------------------------


def start_view(session: Session, view_id: str) -> View | None:
    """Mark a view as running and return it; return None if it was deleted."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.progress = ViewState.RUNNING, None
    return view


def set_progress(session: Session, view_id: str, progress: dict[str, Any]) -> None:
    """Save the progress of a view's computation: `fraction` is from 0 to 1, `eta_s` the estimated seconds left."""
    view = _lock(session, view_id)
    if view is not None:
        view.progress = progress


def requeue_view(session: Session, view_id: str) -> None:
    """Mark a view as queued again and clear its progress."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.progress = ViewState.QUEUED, None


def succeed_view(session: Session, view_id: str, file: Digest, size_bytes: int) -> View | None:
    """Save the file of a view, mark the view as succeeded, and return it.

    Returns None if the view was deleted, or if it shows images of a data set that was deleted.
    """
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
    """Mark a view as failed. The next request for the view receives the error."""
    view = _lock(session, view_id)
    if view is not None:
        view.state, view.error, view.finished_at = ViewState.FAILED, error, now()


def cancel_view(session: Session, view_id: str) -> None:
    """Delete a view whose job was cancelled."""
    session.execute(delete(View).where(View.id == view_id))


# --- deleting ------------------------------------------------------------------------------------------------------


def request_cancel(session: Session, version_ids: Sequence[str]) -> None:
    """Cancel unfinished views whose computation needs images of these data set versions."""
    query = select(View).join(Run, Run.id == View.run_id).where(Run.dataset_version_id.in_(version_ids))
    unfinished = query.where(View.state.in_((ViewState.QUEUED, ViewState.RUNNING)))
    for view in session.scalars(unfinished.order_by(View.id)).all():
        if view.kind.needs_images and jobs.request_cancel(session, view.id, JobKind.VIEW):
            cancel_view(session, view.id)


def drop_pictures(session: Session, version_ids: Sequence[str], limit: int) -> tuple[int, list[Digest]]:
    """Delete up to `limit` views that show images of these data set versions; return their number and their files."""
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
