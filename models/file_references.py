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

_LOCK = 0x65737061  # an arbitrary number that no other advisory lock uses


def try_delete_unreferenced(session: Session, store: Store, digests: Sequence[Digest]) -> bool:
    """Delete the files of `digests` that no row references; return False if the store is unavailable.

    If the store is unavailable, the files stay for now, because a change of state must not wait for the store. Garbage
    collection (`models.garbage`) deletes them later.
    """
    try:
        delete_unreferenced(session, store, digests)
    except StoreUnavailable as error:
        log.warning("unreferenced files not deleted yet", files=len(digests), error=error.detail)
        return False
    return True


def delete_unreferenced(session: Session, store: Store, digests: Sequence[Digest]) -> list[Digest]:
    """Delete the files of `digests` that no row references; return the deleted ones. Raises StoreUnavailable."""
    session.flush()
    lock_files(session)
    removed = find_unreferenced(session, digests)
    store.delete(*removed)
    return removed


def delete_unreferenced_after_commit(session: Session, store: Store, digests: Sequence[Digest]) -> None:
    """Delete the files of `digests` that no row references, but only after this transaction is committed.

    A file that was deleted earlier could not be restored if the transaction is rolled back.
    """
    if digests:
        after_commit(session, lambda own: try_delete_unreferenced(own, store, digests))


def find_unreferenced(session: Session, digests: Collection[Digest]) -> list[Digest]:
    """Return the files of `digests` that no row references, in the given order."""
    referenced = {
        found for column in _COLUMNS for found in session.scalars(select(column).where(column.in_(digests)).distinct())
    }
    return [digest for digest in digests if digest not in referenced]


def referenced_files(session: Session) -> set[Digest]:
    """Return the digests of all files that any row references."""
    found = (session.scalars(select(column).where(column.is_not(None)).distinct()) for column in _COLUMNS)
    return {Digest(sha256) for column in found for sha256 in column if sha256 is not None}


def lock_files(session: Session) -> None:
    """Lock the references to files until this transaction ends.

    Meanwhile no other transaction that takes this lock can add references or delete files. PostgreSQL uses an advisory
    lock; SQLite needs none, because it has only one writer at a time.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
