"""Removes what nothing needs any more: files without a name, checkpoints of runs that failed long ago, old answers.

Every change is a small transaction of its own. A file counts by its age, on the clock of the store that stamped it:
whoever has just stored one is about to name it.
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
"""The name that one process at a time holds, by `Database.exclusive`, to collect."""

# Names are asked for so many at a time, and so many are removed while nobody else can name a file.
_LOOKUP_BATCH = 200
_DELETE_BATCH = 25


@dataclass(frozen=True)
class CollectionSummary:
    """What was removed: files with their bytes, runs that begin anew if they are tried again, and answers."""

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
    """Remove what nothing needs any more; return what that was, or with `dry_run` what it would be.

    Files that only a failed run or a closed version names are counted once that is done. Raises Unavailable.

    Args:
        database: whose rows name files.
        store: whose files are looked at.
        older_than_s: seconds since it was written after which a file that no row names may go.
        is_over: whether to end before everything was looked at.
        dry_run: whether to leave everything as it is.
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
    """Drop those of this machine's copies that no row names and nobody used for long; return how many."""
    dropped = 0
    limit = time.time() - older_than_s
    for copies in _in_batches((copy for copy in store.cached() if copy.written_at < limit), _LOOKUP_BATCH):
        with database.reading() as session:
            loose = find_unreferenced(session, [copy.digest for copy in copies])
        store.drop_cached(loose)
        dropped += len(loose)
    return dropped


def _drop_resume_data(database: Database, run_id: str) -> bool:
    """Forget what a failed run would go on from; return False if somebody tries it again just now."""
    with database.writing() as session:
        if not runs.is_expired_failure(runs.lock_run(session, run_id)):
            return False
        run_jobs.drop_leftovers(session, run_id)
    return True


def _delete_unreferenced_files(
    database: Database, store: Store, older_than_s: float, is_over: Callable[[], bool], *, dry_run: bool
) -> Iterator[StoredFile]:
    """Remove the old files that no row names, and yield them."""
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
    """Remove files unless one was named or stored once more meanwhile; return those that are gone."""
    with database.writing() as session:
        lock_files(session)  # before they are looked at: nobody names one in between
        found = [store.find(digest) for digest in digests]
        return delete_unreferenced(session, store, [file.digest for file in found if file and file.written_at < limit])


def _in_batches(things: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield things in lists of at most so many."""
    left = iter(things)
    while some := list(islice(left, most)):
        yield some
