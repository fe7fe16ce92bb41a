"""Collects garbage once, as a worker does every hour. Run as `python -m ops.collect`, or `make collect`."""

from __future__ import annotations

import argparse
import sys

from artifacts.bucket_store import open_store
from artifacts.store import Store
from errors import EspalierError
from models import garbage
from models.garbage import GARBAGE_COLLECTION, CollectionSummary
from models.run import RESUMABLE_FOR
from models.session import Database
from startup import exit_with_a_sentence, load_settings, open_database, prepare_folder

MIB = 1024 * 1024


def collect(database: Database, store: Store, older_than_s: float, *, dry_run: bool) -> str:
    """Collect garbage and return a summary as text. With `dry_run`, only count what would be deleted."""
    left = len(list(store.unfinished(older_than_s))) if dry_run else store.drop_unfinished(older_than_s)
    copies = 0 if dry_run else garbage.drop_copies(database, store, older_than_s)
    with database.exclusive(GARBAGE_COLLECTION) as is_held:
        if not is_held:
            return "Another process is collecting garbage now. See the logs of the workers, or try again later."
        found = garbage.collect_garbage(database, store, older_than_s, dry_run=dry_run)
    return _summary(found, left, copies, older_than_s, dry_run=dry_run)


def _summary(found: CollectionSummary, left: int, copies: int, older_than_s: float, *, dry_run: bool) -> str:
    lines = [
        f"{'Would remove' if dry_run else 'Removed'} {found.files:,} unreferenced files that are older than "
        f"{older_than_s / 3600:g} h ({found.size_bytes / MIB:,.1f} MiB)",
        f"{left:,} unfinished files",
        f"{found.answers:,} expired idempotency answers",
        f"checkpoints of {found.runs:,} runs that failed more than {RESUMABLE_FOR.days} days ago",
    ]
    if copies:
        lines.append(f"{copies:,} local copies")
    if dry_run and found.runs:
        lines.append("and then the files of these checkpoints")
    return ", ".join(lines) + "."


def main() -> int:
    """Collect garbage, as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="only report what would be removed")
    arguments = parser.parse_args()
    with exit_with_a_sentence():
        settings = load_settings()
        prepare_folder(settings.var)
        database = open_database(settings, must_answer=True)
    try:
        print(collect(database, open_store(settings.store), settings.collect_after_s, dry_run=arguments.dry_run))
    except EspalierError as error:
        print(error.detail, file=sys.stderr)
        return 1
    finally:
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
