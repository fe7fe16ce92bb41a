"""Which stored files are still named by a row; those that are not can be collected."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from artifacts.store import Digest, Store
from models.comparison import Comparison
from models.dataset import DatasetVersion, Image
from models.registry import Backbone, ModelVersion, Weights
from models.run import RunArtifact

_COLUMNS: tuple[InstrumentedAttribute[str] | InstrumentedAttribute[str | None], ...] = (
    Image.sha256,
    DatasetVersion.archive_sha256,
    DatasetVersion.manifest_sha256,
    RunArtifact.sha256,
    Comparison.picture_sha256,
    Comparison.report_sha256,
    ModelVersion.bundle_sha256,
    ModelVersion.backbone_sha256,
    Backbone.sha256,
    Weights.sha256,
)

_LOCK = 0x65737061  # any number that is only used here


def collect(session: Session, store: Store, digests: Sequence[Digest]) -> None:
    """Remove those of the stored files that no row names."""
    session.flush()
    lock_files(session)
    for digest in _unnamed(session, digests):
        store.delete(digest)


def _unnamed(session: Session, digests: Collection[Digest]) -> list[Digest]:
    """Return those of the stored files that no row names."""
    named = {
        found for column in _COLUMNS for found in session.scalars(select(column).where(column.in_(digests)).distinct())
    }
    return [digest for digest in digests if digest not in named]


def lock_files(session: Session) -> None:
    """Keep naming files and removing unnamed ones apart until the transaction ends.

    SQLite has one writer at a time anyway; PostgreSQL gets an advisory lock.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
