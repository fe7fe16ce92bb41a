"""Runs: recipe, state, progress, events, folds and files of each training. Trains nothing.

queued → running → succeeded | failed | cancelled
running → queued when its worker was lost        failed → queued when it is retried

A run that is queued again keeps its finished folds and the checkpoints of unfinished folds. A failed run keeps them for
a week.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, delete, func, or_, select, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, Session, defer, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from artifacts.store import Digest
from errors import NotFound
from models.base import NO_KEY_UPDATE, Base, Json, new_id, now, text_enum
from models.paging import PageRequest, RowPage, fetch_records
from models.project import Principal, owner, scope
from recipes.recipe import Recipe

FINAL_PART = -1
"""Part number of the final fit; the folds are parts 0, 1, and so on."""

RESUMABLE_FOR = timedelta(days=7)
"""How long a failed run keeps its checkpoints. A retry after that time starts from the beginning."""

# The newest checkpoint, and the one before it in case the newest cannot be read.
_CHECKPOINTS_KEPT = 2


class RunState(StrEnum):
    """The state of a run, from its request to its end."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


class EventKind(StrEnum):
    """What an event of a run reports."""

    PROGRESS = "progress"
    EPOCH = "epoch"
    FOLD = "fold"
    STATE = "state"


METRIC_TABLES = ("confusion", "per_class")
"""Metrics with a row for each class, which lists leave out."""


class Run(Base):
    """One training of one model on one data set version.

    Attributes:
        batch_size: the reduced batch size after memory ran out; None if the recipe's batch size applies.
        weights_sha256: the weights from which all folds start; set while the run is unfinished.
        quantised_sha256: the int8 network that all folds use, if they use one; set while the run is unfinished.
        precision_choice: how the precision was chosen, if the recipe says `auto`; set while the run is unfinished.
        features_choice: where features come from, if the recipe leaves the choice to the run.
        job_id: the train job of the current attempt. Jobs of earlier attempts can no longer change the run.
        training_s: seconds of training summed over all folds and the final fit, without waiting.
    """

    __tablename__ = "run"
    __table_args__ = (Index(None, "project_id", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("run"))
    project_id: Mapped[str] = owner()
    dataset_version_id: Mapped[str] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    name: Mapped[str] = mapped_column(String(63))
    recipe: Mapped[dict[str, Any]]
    batch_size: Mapped[int | None]
    weights_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    quantised_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    precision_choice: Mapped[dict[str, Any] | None]
    features_choice: Mapped[dict[str, Any] | None]
    job_id: Mapped[str | None] = mapped_column(String(40))
    state: Mapped[RunState] = mapped_column(text_enum(RunState), default=RunState.QUEUED)
    progress: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    extraction: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    training_s: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    mlflow_experiment_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class RunEvent(Base):
    """One event of a run, for clients that follow its progress. `seq` counts the run's events from 1 without gaps."""

    __tablename__ = "run_event"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[EventKind] = mapped_column(text_enum(EventKind))
    payload: Mapped[dict[str, Any]]
    at: Mapped[datetime] = mapped_column(default=now)


class Fold(Base):
    """The result of one finished fold of a run. `history` has one entry per epoch.

    `outcome_sha256` is the file from which the final job reads the fold's result. It is removed when the run ends.
    """

    __tablename__ = "fold"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epochs: Mapped[int]
    best_epoch: Mapped[int]
    stopped: Mapped[str] = mapped_column(String(32))
    metrics: Mapped[dict[str, Any]]
    history: Mapped[list[Any]]
    seconds: Mapped[float | None]
    outcome_sha256: Mapped[str | None] = mapped_column(String(64), index=True)


class Checkpoint(Base):
    """A stored file from which an interrupted part of a run resumes. `part` is a fold number or FINAL_PART."""

    __tablename__ = "checkpoint"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epochs: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[datetime] = mapped_column(default=now)


class RunArtifact(Base):
    """A file that a run produced, such as its report. `name` is unique within the run."""

    __tablename__ = "run_artifact"

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(127))


def get_run(session: Session, principal: Principal, run_id: str) -> Run:
    """Return the run with this id. Raises NotFound."""
    run = session.scalar(select(Run).where(Run.id == run_id, scope(Run.project_id, principal)))
    if run is None:
        raise NotFound(f"No run has the id {run_id!r}.")
    return run


def list_runs(
    session: Session,
    principal: Principal,
    page: PageRequest,
    state: RunState | None = None,
    name: str | None = None,
    dataset_versions: Collection[str] | None = None,
) -> RowPage[Run]:
    """Return one page of the runs, the newest first: all, or those of a state, a name or data set versions by id."""
    query = select(Run).where(scope(Run.project_id, principal)).options(defer(Run.metrics))
    if state is not None:
        query = query.where(Run.state == state)
    if name is not None:
        query = query.where(Run.name == name)
    if dataset_versions is not None:
        query = query.where(Run.dataset_version_id.in_(dataset_versions))
    return fetch_records(session, query, Run.id, page)


class _WithoutTables(FunctionElement[Any]):
    """Metrics without their tables, cut out by the database: for 1,000 classes they are 99.9 % of two megabytes."""

    type = Json
    inherit_cache = True


@compiles(_WithoutTables, "sqlite")
def _remove_on_sqlite(element: _WithoutTables, compiler: SQLCompiler, **options: Any) -> str:
    paths = ", ".join(f"'$.{table}'" for table in METRIC_TABLES)
    return f"json_remove({compiler.process(element.clauses, **options)}, {paths})"


@compiles(_WithoutTables, "postgresql")
def _remove_on_postgresql(element: _WithoutTables, compiler: SQLCompiler, **options: Any) -> str:
    metrics = compiler.process(element.clauses, **options)
    minus = "".join(f" - '{table}'" for table in METRIC_TABLES)
    return f"CASE WHEN jsonb_typeof({metrics}) = 'object' THEN {metrics}{minus} END"


def get_brief_metrics(session: Session, run_ids: Collection[str]) -> dict[str, dict[str, Any] | None]:
    """Return the metrics of runs without `METRIC_TABLES`, by run id."""
    query = select(Run.id, _WithoutTables(Run.metrics)).where(Run.id.in_(run_ids))
    return dict(session.execute(query).all())


def get_brief_runs(session: Session, run_ids: Collection[str]) -> dict[str, Run]:
    """Return runs by id, without their metrics; `get_brief_metrics` returns these."""
    return {run.id: run for run in session.scalars(select(Run).where(Run.id.in_(run_ids)).options(defer(Run.metrics)))}


def get_folds(session: Session, run_id: str) -> Sequence[Fold]:
    """Return the finished folds of a run in the order of their numbers."""
    return session.scalars(select(Fold).where(Fold.run_id == run_id).order_by(Fold.number)).all()


def get_artifacts(session: Session, run_id: str) -> Sequence[RunArtifact]:
    """Return the files that a run has produced, sorted by name."""
    return session.scalars(select(RunArtifact).where(RunArtifact.run_id == run_id).order_by(RunArtifact.name)).all()


def get_events(session: Session, run_id: str, after: int, limit: int = 500) -> Sequence[RunEvent]:
    """Return up to `limit` events of a run whose numbers are greater than `after`, in order."""
    query = select(RunEvent).where(RunEvent.run_id == run_id, RunEvent.seq > after)
    return session.scalars(query.order_by(RunEvent.seq).limit(limit)).all()


def last_event_number(session: Session, run_id: str) -> int:
    """Return the number of a run's last event, or 0 if it has no events."""
    return session.scalar(select(func.max(RunEvent.seq)).where(RunEvent.run_id == run_id)) or 0


def get_checkpoints(session: Session, run_id: str) -> dict[int, list[Digest]]:
    """Return the files of a run's checkpoints by part number; those of one part are sorted, the newest first."""
    found: dict[int, list[Digest]] = {}
    query = select(Checkpoint.part, Checkpoint.sha256).where(Checkpoint.run_id == run_id)
    for part, sha256 in session.execute(query.order_by(Checkpoint.part, Checkpoint.seq.desc())):
        found.setdefault(part, []).append(Digest(sha256))
    return found


def is_any_active(session: Session, version_ids: Sequence[str]) -> bool:
    """Return whether a run on one of these data set versions is queued or running."""
    states = (RunState.QUEUED, RunState.RUNNING)
    return bool(
        session.scalar(select(func.count()).where(Run.dataset_version_id.in_(version_ids), Run.state.in_(states)))
    )


def find_expired_failures(session: Session) -> Sequence[str]:
    """Return the ids of runs that failed more than `RESUMABLE_FOR` ago and still have checkpoints or similar files."""
    keeps = or_(
        Run.weights_sha256.is_not(None),
        Run.quantised_sha256.is_not(None),
        select(Checkpoint.run_id).where(Checkpoint.run_id == Run.id).exists(),
        select(Fold.run_id).where(Fold.run_id == Run.id, Fold.outcome_sha256.is_not(None)).exists(),
    )
    query = select(Run.id).where(Run.state == RunState.FAILED, Run.finished_at < now() - RESUMABLE_FOR, keeps)
    return session.scalars(query.order_by(Run.id)).all()


def is_expired_failure(run: Run) -> bool:
    """Return whether a run failed more than `RESUMABLE_FOR` ago."""
    return run.state is RunState.FAILED and run.finished_at is not None and run.finished_at < now() - RESUMABLE_FOR


def create_run(session: Session, principal: Principal, version_id: str, name: str, recipe: Recipe) -> Run:
    """Add a queued run. All defaults of `recipe` must be filled in."""
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


def lock_run(session: Session, run_id: str) -> Run:
    """Lock the row of a run until the transaction ends; return the run with its current values."""
    return session.get_one(Run, run_id, with_for_update=NO_KEY_UPDATE, populate_existing=True)


def start_run(session: Session, run_id: str) -> Run:
    """Mark a run as running. It keeps folds that an interrupted attempt has finished."""
    run = _change(session, run_id, RunState.RUNNING, {"progress": progress(stage="starting")})
    run.started_at = run.started_at or now()
    return run


def requeue_run(session: Session, run_id: str, stage: str = "queued") -> None:
    """Mark a running run as queued again, because its worker was lost. A queued run stays unchanged."""
    state = lock_run(session, run_id).state
    if state.is_final:
        raise RuntimeError(f"Run {run_id} cannot go from {state} to queued by itself. This is a bug.")
    if state is not RunState.QUEUED:
        _change(session, run_id, RunState.QUEUED, {"progress": progress(stage=stage)})


def reopen_run(session: Session, run_id: str) -> Run:
    """Mark a failed run as queued again and clear its error."""
    # Folds that an older version of Espalier trained have no outcome file, so they must be trained again.
    session.execute(delete(Fold).where(Fold.run_id == run_id, Fold.outcome_sha256.is_(None)))
    again = {"error": None, "started_at": None, "finished_at": None, "progress": progress(stage="queued")}
    return _change(session, run_id, RunState.QUEUED, again)


def succeed_run(session: Session, run_id: str, metrics: dict[str, Any], training_s: float) -> Run:
    """Mark a run as succeeded, with its metrics and training seconds."""
    done = {"metrics": metrics, "training_s": training_s, "finished_at": now()}
    return _change(session, run_id, RunState.SUCCEEDED, done | {"progress": progress(stage="done", fraction=1.0)})


def fail_run(session: Session, run_id: str, error: dict[str, Any]) -> Run:
    """Mark a run as failed, with its error record."""
    return _change(session, run_id, RunState.FAILED, {"error": error, "finished_at": now()})


def cancel_run(session: Session, run_id: str) -> Run:
    """Mark a run as cancelled."""
    return _change(session, run_id, RunState.CANCELLED, {"finished_at": now()})


_TRANSITIONS = {
    RunState.QUEUED: {RunState.RUNNING, RunState.CANCELLED, RunState.FAILED},
    RunState.RUNNING: {RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED},
    RunState.FAILED: {RunState.QUEUED},
}


def _change(session: Session, run_id: str, state: RunState, values: Mapping[str, Any]) -> Run:
    run = lock_run(session, run_id)
    if state not in _TRANSITIONS.get(run.state, set()):
        raise RuntimeError(f"Run {run_id} cannot go from {run.state} to {state}. This is a bug.")
    run.state = state
    for name, value in values.items():
        setattr(run, name, value)
    add_event(session, run_id, EventKind.STATE, {"state": state, "error": run.error})
    return run


def add_event(session: Session, run_id: str, kind: EventKind, payload: dict[str, Any]) -> None:
    """Append an event to a run. The caller must hold the lock of the run's row, so that event numbers are unique."""
    seq = last_event_number(session, run_id) + 1
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
    """Return the progress record of a run: `fraction` is from 0 to 1, `eta_s` is the estimated seconds left."""
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
    """Replace the progress record of a run, and add an event that reports it."""
    session.get_one(Run, run_id).progress = state
    add_event(session, run_id, EventKind.PROGRESS, state)


def record_extraction(session: Session, run_id: str, extraction: dict[str, Any]) -> None:
    """Record from how many images a run has extracted features, and the seconds that this took.

    The first record counts, so a resumed attempt does not change it. Only its seconds are replaced by a larger number:
    fine-tuning reports the time for features first, then the time for everything that it computed before training.
    """
    run = session.get_one(Run, run_id)
    earlier = run.extraction or extraction
    run.extraction = earlier | {"seconds": max(earlier["seconds"], extraction["seconds"])}


def halve_batch(session: Session, run_id: str) -> None:
    """Halve the batch size of a run."""
    run = session.get_one(Run, run_id)
    run.batch_size = max(1, (run.batch_size or run.recipe["batch_size"]) // 2)
    run.precision_choice = None  # it was chosen by measurements with the full batch size


def add_fold(session: Session, fold: Fold) -> None:
    """Add a finished fold to its run, and an event with the fold's metrics."""
    session.add(fold)
    payload = {"fold": fold.number, "epochs": fold.epochs, "best_epoch": fold.best_epoch, "metrics": fold.metrics}
    add_event(session, fold.run_id, EventKind.FOLD, payload)


def drop_folds(session: Session, run_id: str) -> list[Digest]:
    """Delete all folds of a run that restarts from the beginning; return the digests of their outcome files."""
    dropped = _outcome_files(session, run_id)
    session.execute(delete(Fold).where(Fold.run_id == run_id))
    return dropped


def drop_outcomes(session: Session, run_id: str) -> list[Digest]:
    """Remove the references from an ended run's folds to their outcome files; return the files."""
    dropped = _outcome_files(session, run_id)
    session.execute(update(Fold).where(Fold.run_id == run_id).values(outcome_sha256=None))
    return dropped


def _outcome_files(session: Session, run_id: str) -> list[Digest]:
    return [Digest(fold.outcome_sha256) for fold in get_folds(session, run_id) if fold.outcome_sha256]


def add_checkpoint(
    session: Session, run_id: str, part: int, epochs: int, digest: Digest, size_bytes: int
) -> list[Digest]:
    """Add a checkpoint of one fold or of the final fit, and delete its oldest checkpoints; return their files."""
    mine = (Checkpoint.run_id == run_id, Checkpoint.part == part)
    newest = session.scalar(select(Checkpoint).where(*mine).order_by(Checkpoint.seq.desc()).limit(1))
    if newest is not None and newest.sha256 == digest:  # it was added before, but the caller was not told so
        return []
    last = newest.seq if newest else 0
    old = (*mine, Checkpoint.seq <= last + 1 - _CHECKPOINTS_KEPT)
    dropped = [Digest(sha256) for sha256 in session.scalars(select(Checkpoint.sha256).where(*old))]
    session.execute(delete(Checkpoint).where(*old))
    row = Checkpoint(run_id=run_id, part=part, seq=last + 1, epochs=epochs, sha256=digest, size_bytes=size_bytes)
    session.add(row)
    return dropped


def drop_checkpoints(session: Session, run_id: str, part: int | None = None) -> list[Digest]:
    """Delete the checkpoints of one part of a run, or of all parts if `part` is None; return their files."""
    mine = [Checkpoint.run_id == run_id] + ([] if part is None else [Checkpoint.part == part])
    dropped = [Digest(sha256) for sha256 in session.scalars(select(Checkpoint.sha256).where(*mine))]
    session.execute(delete(Checkpoint).where(*mine))
    return dropped


def drop_networks(session: Session, run_id: str) -> list[Digest]:
    """Remove the references from a run to its weights and int8 network, and its choices; return the files."""
    run = session.get_one(Run, run_id)
    dropped = [Digest(sha256) for sha256 in (run.weights_sha256, run.quantised_sha256) if sha256]
    run.weights_sha256 = run.quantised_sha256 = run.precision_choice = run.features_choice = None
    return dropped


def add_artifact(session: Session, run_id: str, name: str, digest: Digest, size_bytes: int, media_type: str) -> None:
    """Add a stored file to the files of a run. It replaces an earlier file with the same name."""
    session.merge(RunArtifact(run_id=run_id, name=name, sha256=digest, size_bytes=size_bytes, media_type=media_type))
