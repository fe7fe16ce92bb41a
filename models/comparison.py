"""Comparisons: several recipes trained on the same folds, one run each, and the resulting table. Measures nothing.

queued → running → succeeded | failed | cancelled
           ↖ a failed run is retried ↙

When the last run of a comparison ends, the same transaction queues the job that makes the table. To avoid deadlocks,
every transaction locks rows in the order job, run, comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, String, func, select
from sqlalchemy.orm import Mapped, Session, defer, mapped_column

from artifacts.store import Digest
from errors import NotFound, NothingToCompare
from models import job as jobs
from models import run as runs
from models import run_jobs
from models.base import NO_KEY_UPDATE, Base, new_id, now, text_enum
from models.job import Job, JobKind, Queue
from models.paging import PageRequest, RowPage, fetch_records
from models.project import Principal, owner, scope
from models.run import Run, RunState
from recipes.recipe import Recipe


class ComparisonState(StrEnum):
    """The state of a comparison, from its request to its table."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the comparison has ended."""
        return self not in (ComparisonState.QUEUED, ComparisonState.RUNNING)


class Comparison(Base):
    """A comparison of recipes on one data set version. Table, picture and report are set when it succeeds."""

    __tablename__ = "comparison"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("cmp"))
    project_id: Mapped[str] = owner()
    dataset_version_id: Mapped[str] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    name: Mapped[str] = mapped_column(String(63))
    state: Mapped[ComparisonState] = mapped_column(text_enum(ComparisonState), default=ComparisonState.QUEUED)
    table: Mapped[dict[str, Any] | None]
    picture_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    report_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


class ComparisonRun(Base):
    """Links a run to its comparison. `position` is the index of the run's recipe in the comparison, from 0."""

    __tablename__ = "comparison_run"

    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparison.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), unique=True)


# --- finding -------------------------------------------------------------------------------------------------------


def get_comparison(session: Session, principal: Principal, comparison_id: str) -> Comparison:
    """Return a comparison. Raises NotFound."""
    query = select(Comparison).where(Comparison.id == comparison_id, scope(Comparison.project_id, principal))
    comparison = session.scalar(query)
    if comparison is None:
        raise NotFound(f"No comparison has the id {comparison_id!r}.")
    return comparison


def list_comparisons(
    session: Session,
    principal: Principal,
    page: PageRequest,
    state: ComparisonState | None = None,
    name: str | None = None,
    dataset_versions: Collection[str] | None = None,
) -> RowPage[Comparison]:
    """Return one page of the comparisons, the newest first: all, or those of a state, a name or data set versions."""
    query = select(Comparison).where(scope(Comparison.project_id, principal))
    if state is not None:
        query = query.where(Comparison.state == state)
    if name is not None:
        query = query.where(Comparison.name == name)
    if dataset_versions is not None:
        query = query.where(Comparison.dataset_version_id.in_(dataset_versions))
    return fetch_records(session, query, Comparison.id, page)


def get_runs(session: Session, comparison_id: str, *, with_metrics: bool = True) -> Sequence[Run]:
    """Return the runs of a comparison in the order of its recipes. Metrics take megabytes if there are many classes."""
    query = select(Run).join(ComparisonRun, ComparisonRun.run_id == Run.id)
    if not with_metrics:
        query = query.options(defer(Run.metrics))
    return session.scalars(
        query.where(ComparisonRun.comparison_id == comparison_id).order_by(ComparisonRun.position)
    ).all()


def find_comparison(session: Session, run_id: str) -> tuple[Comparison, int] | None:
    """Return the comparison that contains a run, and the run's position in it; None if no comparison contains it."""
    query = select(Comparison, ComparisonRun.position).join(ComparisonRun, ComparisonRun.comparison_id == Comparison.id)
    found = session.execute(query.where(ComparisonRun.run_id == run_id)).one_or_none()
    return found and (found.Comparison, found.position)


def get_files(session: Session, comparison_id: str) -> list[Digest]:
    """Return the digests of a comparison's picture and report; an empty list before the comparison has a table."""
    comparison = session.get_one(Comparison, comparison_id)
    return [Digest(file) for file in (comparison.picture_sha256, comparison.report_sha256) if file]


def is_any_active(session: Session, version_ids: Sequence[str]) -> bool:
    """Return whether a comparison on one of these data set versions has not ended."""
    states = (ComparisonState.QUEUED, ComparisonState.RUNNING)
    query = select(func.count()).where(Comparison.dataset_version_id.in_(version_ids), Comparison.state.in_(states))
    return bool(session.scalar(query))


# --- changing ------------------------------------------------------------------------------------------------------


def create_comparison(
    session: Session, principal: Principal, version_id: str, name: str, recipes: Sequence[Recipe]
) -> tuple[Comparison, list[Job]]:
    """Add a comparison and a queued run for each recipe; return the comparison and the train jobs of its runs.

    `recipes` must have all defaults filled in.
    """
    comparison = Comparison(project_id=principal.project_id, dataset_version_id=version_id, name=name)
    session.add(comparison)
    session.flush()
    added = []
    for position, recipe in enumerate(recipes):
        run = runs.create_run(session, principal, version_id, name, recipe)
        session.add(ComparisonRun(comparison_id=comparison.id, position=position, run_id=run.id))
        added.append(run_jobs.queue_training(session, run))
    session.flush()
    return comparison, added


def on_run_started(session: Session, run_id: str) -> None:
    """If a run that has just started belongs to a comparison, mark the comparison as running."""
    comparison = _lock_comparison_of(session, run_id)
    if comparison is not None and comparison.state is ComparisonState.QUEUED:
        comparison.state = ComparisonState.RUNNING


def on_run_ended(session: Session, run_id: str) -> Job | None:
    """If a run that ends in this transaction belongs to a comparison, update the comparison.

    When all runs of the comparison have ended and at least one has succeeded, queue and return the job that makes the
    table. When all have ended and none has succeeded, end the comparison without a table. Otherwise return None.
    """
    comparison = _lock_comparison_of(session, run_id)
    return None if comparison is None else _finish_if_runs_ended(session, comparison)


def on_run_retried(session: Session, run_id: str) -> None:
    """If a retried run belongs to a comparison, reopen the comparison; it keeps its table until a new one is made."""
    comparison = _lock_comparison_of(session, run_id)
    if comparison is not None and comparison.state in (ComparisonState.SUCCEEDED, ComparisonState.FAILED):
        comparison.state = ComparisonState.RUNNING
        comparison.error = comparison.finished_at = None


def succeed_comparison(
    session: Session, comparison_id: str, table: dict[str, Any], picture: Digest, report: Digest
) -> bool:
    """Save the table of a comparison and mark the comparison as succeeded; return whether that was possible.

    It is not possible if the comparison has already ended, or if the table is outdated because a run was retried
    meanwhile. An outdated table is made again: now if the retried run has succeeded, otherwise when it ends.
    """
    comparison = _lock(session, comparison_id)
    if comparison.state.is_final:
        return False
    query = select(ComparisonRun.position, Run.state).join(Run, Run.id == ComparisonRun.run_id)
    found = session.execute(query.where(ComparisonRun.comparison_id == comparison_id))
    states = {row.position: row.state for row in found}
    if not all(state.is_final for state in states.values()):
        return False
    succeeded = {position for position, state in states.items() if state is RunState.SUCCEEDED}
    if not succeeded <= {row["position"] for row in table["rows"]}:
        _queue_table_job(session, comparison)
        return False
    comparison.table = table
    comparison.picture_sha256, comparison.report_sha256 = picture, report
    _end(comparison, ComparisonState.SUCCEEDED)
    return True


def fail_comparison(session: Session, comparison_id: str, error: dict[str, Any], since: datetime) -> None:
    """Mark a comparison as failed because its table could not be made. An ended comparison stays unchanged.

    The comparison does not fail if one of its runs was retried meanwhile. While the retried run is unfinished, nothing
    changes: its end queues a new table job. If the retried run has succeeded since the table job began (`since`), a new
    table job is queued now. An earlier table is kept in any case.
    """
    comparison = _lock(session, comparison_id)
    made = get_runs(session, comparison_id)
    if comparison.state.is_final or not all(run.state.is_final for run in made):
        return
    if any(run.state is RunState.SUCCEEDED and run.finished_at and run.finished_at > since for run in made):
        _queue_table_job(session, comparison)
        return
    _end(comparison, ComparisonState.FAILED, error)


def cancel_comparison(session: Session, comparison_id: str) -> None:
    """Mark a comparison as cancelled. An ended comparison stays unchanged."""
    comparison = _lock(session, comparison_id)
    if not comparison.state.is_final:
        _end(comparison, ComparisonState.CANCELLED)


def request_cancel(session: Session, comparison_id: str) -> Job | None:
    """Cancel a comparison and its unfinished runs. An ended comparison stays unchanged.

    A comparison that already has a table is open only because one of its runs was retried. Then only that run is
    cancelled, and the comparison gets a new table. Return the job that makes this table if it is queued now, else None.
    """
    for run in get_runs(session, comparison_id):
        run_jobs.request_cancel(session, run.id)
    # The comparison is read without a lock, because jobs must be locked before it. If a table is saved in between, the
    # job that made it has ended, too.
    if session.get_one(Comparison, comparison_id, populate_existing=True).table is not None:
        return _finish_if_runs_ended(session, _lock(session, comparison_id))
    jobs.request_cancel(session, comparison_id, JobKind.COMPARE)
    cancel_comparison(session, comparison_id)
    return None


def _finish_if_runs_ended(session: Session, comparison: Comparison) -> Job | None:
    """If all runs of a comparison have ended, queue and return its table job; end it if no run has succeeded."""
    if comparison.state.is_final:
        return None
    states = [run.state for run in get_runs(session, comparison.id)]
    if not all(state.is_final for state in states):
        return None
    if RunState.SUCCEEDED in states:
        comparison.state = ComparisonState.RUNNING
        if jobs.has_unfinished(session, JobKind.COMPARE, comparison.id):  # a run was retried while the table was made
            return None
        return _queue_table_job(session, comparison)
    if RunState.FAILED in states:
        error = NothingToCompare("No run of the comparison succeeded. See the error of each run, then retry one.")
        _end(comparison, ComparisonState.FAILED, error.record())
    else:
        _end(comparison, ComparisonState.CANCELLED)
    return None


def _queue_table_job(session: Session, comparison: Comparison) -> Job:
    """Queue a job that makes the table. Its index is new, so it can be queued while an earlier one is still running."""
    query = select(func.count()).where(Job.kind == JobKind.COMPARE, Job.subject_id == comparison.id)
    number = session.scalar(query) or 0
    return jobs.add_job(
        session,
        comparison.project_id,
        JobKind.COMPARE,
        Queue.CPU,
        comparison.id,
        index=number,
        priority=jobs.UNDER_WAY,
    )


def _end(comparison: Comparison, state: ComparisonState, error: dict[str, Any] | None = None) -> None:
    comparison.state, comparison.error, comparison.finished_at = state, error, now()


def _lock(session: Session, comparison_id: str) -> Comparison:
    """Lock the row of a comparison until the transaction ends; return the comparison with its current values."""
    return session.get_one(Comparison, comparison_id, with_for_update=NO_KEY_UPDATE, populate_existing=True)


def _lock_comparison_of(session: Session, run_id: str) -> Comparison | None:
    found = session.scalar(select(ComparisonRun.comparison_id).where(ComparisonRun.run_id == run_id))
    return None if found is None else _lock(session, found)
