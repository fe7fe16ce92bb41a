"""Garbage collection: deletes unreferenced files, checkpoints of expired failed runs, and expired idempotency answers.

Each change is a small transaction. Only old files are deleted, because a file is stored before a row references it. The
store's clock determines the age of a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from artifacts.store import Digest, Store, StoredFile
from models import dataset as datasets
from models import idempotency, run_jobs
from models import run as runs
from models.file_references import delete_unreferenced, find_unreferenced, lock_files
from models.session import Database

T = TypeVar("T")

GARBAGE_COLLECTION = "collection"
"""The name of the lock (`Database.exclusive`) that a process holds while it collects garbage, so that only one does."""

# Number of files in one query for references.
_LOOKUP_BATCH = 200
# Number of files that one transaction deletes. Meanwhile other transactions cannot add references.
_DELETE_BATCH = 25


@dataclass(frozen=True)
class CollectionSummary:
    """What a garbage collection deleted.

    Attributes:
        files: number of deleted files.
        size_bytes: total size of the deleted files.
        runs: number of failed runs whose checkpoints were deleted.
        answers: number of deleted answers to requests with an Idempotency-Key.
    """

    files: int
    size_bytes: int
    runs: int
    answers: int


def collect_garbage(
    database: Database,
    store: Store,
    older_than_s: float,
    is_over: Callable[[], bool] = lambda: False,
    *,
    dry_run: bool = False,
) -> CollectionSummary:
    """Delete everything that is no longer needed, and return a summary. A dry run returns the summary only.

    A dry run does not count files that are still referenced by an expired run or a closed data set version.

    Args:
        database: the rows that reference files.
        store: the files.
        older_than_s: minimum age in seconds at which an unreferenced file is deleted.
        is_over: returns True if the collection should stop early.
        dry_run: whether to change nothing.

    Raises:
        Unavailable: the database or the store does not respond.
    """
    with database.reading() as session:
        failed = runs.find_expired_failures(session)
        closed = datasets.find_leftover_archives(session)
    if not dry_run:
        for version_id in closed:
            with database.writing() as session:
                datasets.drop_archive(session, version_id)
    forgotten = len(failed) if dry_run else sum(_drop_resume_data(database, run_id) for run_id in failed)
    with database.writing() as session:
        answers = idempotency.count_expired_answers(session) if dry_run else idempotency.drop_expired_answers(session)
    removed = list(_delete_unreferenced_files(database, store, older_than_s, is_over, dry_run=dry_run))
    return CollectionSummary(len(removed), sum(file.size_bytes for file in removed), forgotten, answers)


def drop_copies(database: Database, store: Store, older_than_s: float) -> int:
    """Delete this machine's copies of bucket files that no row references; return how many were deleted.

    Copies that were used within the last `older_than_s` seconds stay.
    """
    dropped = 0
    limit = time.time() - older_than_s
    for copies in _in_batches((copy for copy in store.cached() if copy.written_at < limit), _LOOKUP_BATCH):
        with database.reading() as session:
            loose = find_unreferenced(session, [copy.digest for copy in copies])
        store.drop_cached(loose)
        dropped += len(loose)
    return dropped


def _drop_resume_data(database: Database, run_id: str) -> bool:
    """Delete the checkpoints and fold outcomes of an expired failed run; return False if it was retried meanwhile."""
    with database.writing() as session:
        if not runs.is_expired_failure(runs.lock_run(session, run_id)):
            return False
        run_jobs.drop_leftovers(session, run_id)
    return True


def _delete_unreferenced_files(
    database: Database, store: Store, older_than_s: float, is_over: Callable[[], bool], *, dry_run: bool
) -> Iterator[StoredFile]:
    """Delete files that are older than `older_than_s` and that no row references; yield each deleted file."""
    limit = store.now() - older_than_s
    for files in _in_batches((file for file in store.files() if file.written_at < limit), _LOOKUP_BATCH):
        if is_over():
            return
        with database.reading() as session:
            loose = find_unreferenced(session, [file.digest for file in files])
        for few in _in_batches(loose, _DELETE_BATCH):
            removed = few if dry_run else _delete_batch(database, store, few, limit)
            yield from (file for file in files if file.digest in removed)


def _delete_batch(database: Database, store: Store, digests: Sequence[Digest], limit: float) -> list[Digest]:
    """Delete files, except those that were referenced or stored again meanwhile; return the deleted ones."""
    with database.writing() as session:
        lock_files(session)  # before the check, so that no reference is added in between
        found = [store.find(digest) for digest in digests]
        return delete_unreferenced(session, store, [file.digest for file in found if file and file.written_at < limit])


def _in_batches(things: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield the things in lists of at most `most` items."""
    left = iter(things)
    while some := list(islice(left, most)):
        yield some
