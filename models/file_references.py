"""Finds stored files that no row references, and deletes them. Knows every column that can name a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from artifacts.store import Digest, Store
from errors import StoreUnavailable
from models.comparison import Comparison
from models.dataset import DatasetVersion, Image
from models.registry import Backbone, ModelVersion, QuantisedBackbone, Weights
from models.run import Checkpoint, Fold, Run, RunArtifact
from models.session import after_commit
from models.view import View

_COLUMNS: tuple[InstrumentedAttribute[str] | InstrumentedAttribute[str | None], ...] = (
    Image.sha256,
    DatasetVersion.archive_sha256,
    DatasetVersion.manifest_sha256,
    RunArtifact.sha256,
    Run.weights_sha256,
    Run.quantised_sha256,
    Fold.outcome_sha256,
    Checkpoint.sha256,
    Comparison.picture_sha256,
    Comparison.report_sha256,
    View.sha256,
    ModelVersion.bundle_sha256,
    ModelVersion.backbone_sha256,
    Backbone.sha256,
    QuantisedBackbone.sha256,
    Weights.sha256,
)

log = structlog.get_logger()

_LOCK = 0x65737061  # arbitrary, used nowhere else


def try_delete_unreferenced(session: Session, store: Store, digests: Sequence[Digest]) -> bool:
    """Delete those of the files that no row references; return False if the store is unavailable.

    A change of state must not wait for the store: `models.garbage` finds and deletes the files later.
    """
    try:
        delete_unreferenced(session, store, digests)
    except StoreUnavailable as error:
        log.warning("unreferenced files not deleted yet", files=len(digests), error=error.detail)
        return False
    return True


def delete_unreferenced(session: Session, store: Store, digests: Sequence[Digest]) -> list[Digest]:
    """Delete those of the files that no row references, and return them. Raises StoreUnavailable."""
    session.flush()
    lock_files(session)
    removed = find_unreferenced(session, digests)
    store.delete(*removed)
    return removed


def delete_unreferenced_after_commit(session: Session, store: Store, digests: Sequence[Digest]) -> None:
    """Delete those of the files that no row references once this transaction is committed.

    A deleted file could not be restored by a rollback.
    """
    if digests:
        after_commit(session, lambda own: try_delete_unreferenced(own, store, digests))


def find_unreferenced(session: Session, digests: Collection[Digest]) -> list[Digest]:
    """Return those of the files that no row references, in their order."""
    referenced = {
        found for column in _COLUMNS for found in session.scalars(select(column).where(column.in_(digests)).distinct())
    }
    return [digest for digest in digests if digest not in referenced]


def referenced_files(session: Session) -> set[Digest]:
    """Return every file that a row references."""
    found = (session.scalars(select(column).where(column.is_not(None)).distinct()) for column in _COLUMNS)
    return {Digest(sha256) for column in found for sha256 in column if sha256 is not None}


def lock_files(session: Session) -> None:
    """Keep other transactions from adding references or deleting files until this one ends.

    SQLite has one writer at a time anyway; PostgreSQL takes an advisory lock.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
