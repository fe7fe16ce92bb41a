"""Garbage collection: what is deleted and what stays, with a store in a folder and in a bucket."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import records
from buckets import Bucket, NetworkProxy
from records import PRINCIPAL
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from artifacts.store import Digest, Store, StoredFile, digest_of
from errors import Crashed, NotReady, StoreUnavailable, Unavailable
from models import dataset as datasets
from models import idempotency, registry, run_jobs
from models import run as runs
from models.base import now
from models.dataset import DatasetVersion
from models.file_references import lock_files
from models.garbage import CollectionSummary, collect_garbage, drop_copies
from models.idempotency import Answer
from models.registry import Weights
from models.run import Run
from models.session import Database
from recipes.catalogue import BackboneName

DAY_S = 86_400.0
NOTHING = CollectionSummary(0, 0, 0, 0)


class Clocked(Store):
    """A store in a folder whose clock differs from the clock of this machine."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


@pytest.fixture
def store(tmp_path: Path) -> Clocked:
    return Clocked(tmp_path / "store")


def name(session: Session, file: Digest) -> None:
    registry.set_weights(session, Weights(network=BackboneName.VGG16, name=file[:8], sha256=file, source={}))


def age(store: Store, *files: Digest) -> None:
    """Make files look as if they were written two days ago."""
    for file in files:
        os.utime(store.path_for(file), (time.time() - 2 * DAY_S,) * 2)


def plant(store: Store, count: int) -> list[Digest]:
    """Create this number of old files in a folder, without syncing each of them."""
    files = [digest_of(b"%d" % number) for number in range(count)]
    for number, file in enumerate(files):
        store.path_for(file).parent.mkdir(exist_ok=True)
        store.path_for(file).write_bytes(b"%d" % number)
    age(store, *files)
    return files


# --- files -----------------------------------------------------------------------------------------------------------


def test_old_files_that_no_row_names_go_and_all_others_stay(database: Database, store: Clocked) -> None:
    named, old, fresh = store.put(b"named"), store.put(b"old, of nobody"), store.put(b"about to be named")
    many = plant(store, 300)
    age(store, named, old)
    with database.writing() as session:
        name(session, named)
        for file in many[::2]:
            name(session, file)
    size_bytes = len(b"old, of nobody") + sum(len(b"%d" % number) for number in range(1, 300, 2))
    expected = CollectionSummary(151, size_bytes, 0, 0)
    before = set(store.digests())
    assert collect_garbage(database, store, DAY_S, dry_run=True) == expected
    assert set(store.digests()) == before, "a dry run leaves everything"
    assert collect_garbage(database, store, DAY_S) == expected
    assert set(store.digests()) == {named, fresh, *many[::2]}
    assert collect_garbage(database, store, DAY_S) == NOTHING


def test_a_file_counts_by_the_clock_of_its_store(database: Database, store: Clocked) -> None:
    file = store.put(b"of nobody")
    store.ahead_s = DAY_S - 60
    assert collect_garbage(database, store, DAY_S) == NOTHING
    store.ahead_s = DAY_S + 60
    assert collect_garbage(database, store, DAY_S).files == 1 and not store.has(file)


def test_a_file_that_is_stored_again_while_it_is_collected_stays(database: Database, tmp_path: Path) -> None:
    class Busy(Store):
        """Store the file again after garbage collection has listed it as old."""

        def files(self) -> Iterator[StoredFile]:
            for file in list(super().files()):
                self.put(b"of nobody")
                yield file

    store = Busy(tmp_path / "store")
    file = store.put(b"of nobody")
    age(store, file)
    assert collect_garbage(database, store, DAY_S) == NOTHING
    assert store.has(file)


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_file_that_is_just_being_named_stays(database: Database, store: Clocked) -> None:
    file = store.put(b"about to be named")
    age(store, file)
    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        lock_files(session)
        name(session, file)
        collected = pool.submit(collect_garbage, database, store, DAY_S)
        with pytest.raises(TimeoutError):  # it waits for the lock
            collected.result(timeout=0.5)
        session.commit()
        assert collected.result(timeout=120) == NOTHING
    assert store.has(file)


def test_a_collection_that_is_to_end_ends_in_between(database: Database, store: Clocked) -> None:
    plant(store, 500)
    calls: list[int] = []

    def is_over() -> bool:
        calls.append(len(list(store.digests())))
        return len(calls) == 2

    assert collect_garbage(database, store, DAY_S, is_over).files == 200
    assert calls == [500, 300]


# --- what failed long ago --------------------------------------------------------------------------------------------


def failed_run(session: Session, store: Store, ago: timedelta, version: DatasetVersion) -> tuple[str, list[Digest]]:
    """Add a run that failed some time ago after its first fold; return the run and the files to resume from."""
    run = records.running_run(session, version)
    files = [store.put(f"{run.id} {number}".encode()) for number in range(2)]
    age(store, *files)
    runs.add_fold(session, records.fold(run.id, outcome_sha256=files[0]))
    runs.add_checkpoint(session, run.id, 1, 3, files[1], 9)
    runs.fail_run(session, run.id, Crashed("It died.").record())
    session.execute(update(Run).where(Run.id == run.id).values(finished_at=now() - ago))
    return run.id, files


def test_a_run_that_failed_long_ago_begins_anew_and_one_that_failed_lately_goes_on(
    database: Database, store: Clocked
) -> None:
    with database.writing() as session:
        version = records.ready_version(session)
        lately, kept = failed_run(session, store, timedelta(days=6), version)
        long_ago, dropped = failed_run(session, store, timedelta(days=8), version)
    dry = collect_garbage(database, store, DAY_S, dry_run=True)
    assert (dry.runs, dry.files) == (1, 0)
    done = collect_garbage(database, store, DAY_S)
    assert (done.runs, done.files) == (1, 2)
    assert set(store.digests()) == set(kept) and not set(dropped) & set(kept)
    with database.writing() as session:
        for run_id, found in ((lately, (1, 1)), (long_ago, (0, 0))):
            run_jobs.retry(session, runs.get_run(session, PRINCIPAL, run_id))
            assert (len(runs.get_folds(session, run_id)), len(runs.get_checkpoints(session, run_id))) == found
    assert collect_garbage(database, store, DAY_S) == NOTHING


def test_a_run_that_is_tried_again_just_now_keeps_what_it_goes_on_from(database: Database, store: Clocked) -> None:
    with database.writing() as session:
        run_id, files = failed_run(session, store, timedelta(days=8), records.ready_version(session))

    class Retrying(Database):
        """Retry the run after garbage collection has listed it as expired."""

        @contextmanager
        def reading(self) -> Iterator[Session]:
            with super().reading() as session:
                yield session
            with super().writing() as session:
                try:
                    run_jobs.retry(session, runs.get_run(session, PRINCIPAL, run_id))
                except NotReady:
                    return

    busy = Retrying(database.engine.url)
    assert collect_garbage(busy, store, DAY_S) == NOTHING
    busy.close()
    assert set(store.digests()) == set(files)


def test_archives_go_that_were_kept_for_a_day_or_whose_worker_ended_before_it_removed_them(
    database: Database, store: Clocked
) -> None:
    archives = {name: store.put(name.encode()) for name in ("of-a-dead-worker", "waiting", "kept", "kept-too-long")}
    age(store, *archives.values())
    with database.writing() as session:
        records.ready_version(session, "of-a-dead-worker").archive_sha256 = archives["of-a-dead-worker"]
        for name in ("waiting", "kept", "kept-too-long"):
            version = records.waiting_version(session, name)
            version.archive_sha256 = archives[name]
            if name != "waiting":
                datasets.mark_rejected(session, version.id, {}, keep_archive=True)
        assert version.archive_until is not None
        version.archive_until -= datasets.ARCHIVE_KEPT + timedelta(seconds=1)
    assert collect_garbage(database, store, DAY_S, dry_run=True).files == 0
    assert collect_garbage(database, store, DAY_S).files == 2
    assert set(store.digests()) == {archives["waiting"], archives["kept"]}


def test_old_answers_are_forgotten(database: Database, store: Clocked) -> None:
    with database.writing() as session:
        for number, days in enumerate((1, 6, 8, 9)):
            idempotency.save_answer(session, PRINCIPAL, str(number), "same", None, {})
            session.execute(
                update(Answer).where(Answer.key == str(number)).values(created_at=now() - timedelta(days=days))
            )
    with database.writing() as session:
        assert idempotency.drop_expired_answers(session) == 1  # the first old one went when the second was kept
        session.execute(update(Answer).where(Answer.key == "1").values(created_at=now() - timedelta(days=8)))
    assert collect_garbage(database, store, DAY_S, dry_run=True).answers == 1
    assert collect_garbage(database, store, DAY_S).answers == 1
    with database.reading() as session:
        assert session.scalars(select(Answer.key)).all() == ["0"]


# --- a bucket --------------------------------------------------------------------------------------------------------


def test_a_bucket_is_collected_like_a_folder(database: Database, bucket: Bucket) -> None:
    store = bucket.store()
    named, loose = store.put(b"named"), store.put(b"of nobody")
    with database.writing() as session:
        name(session, named)
    assert collect_garbage(database, store, DAY_S) == NOTHING
    bucket.age(named, loose)
    fresh = store.put(b"about to be named")
    assert collect_garbage(database, store, DAY_S) == CollectionSummary(1, len(b"of nobody"), 0, 0)
    assert bucket.digests() == {named, fresh} and not store.path_for(loose).exists()


def test_copies_that_nobody_names_or_uses_go_from_every_machine(
    database: Database, bucket: Bucket, tmp_path: Path
) -> None:
    here, there = bucket.store(), bucket.seen_from(tmp_path / "there").store()
    named, loose, fresh = here.put(b"named"), here.put(b"of nobody"), here.put(b"about to be named")
    for file in (named, loose, fresh):
        there.read(file)
    with database.writing() as session:
        name(session, named)
    here.delete(loose)
    age(there, named, loose)
    assert drop_copies(database, there, DAY_S) == 1
    assert {copy.digest for copy in there.cached()} == {named, fresh}
    assert bucket.digests() == {named, fresh}


def test_a_folder_that_is_no_cache_has_no_copies_to_drop(database: Database, store: Clocked) -> None:
    age(store, store.put(b"of nobody"))
    assert drop_copies(database, store, DAY_S) == 0 and len(list(store.digests())) == 1


def test_a_bucket_or_a_database_that_is_away_is_told_and_nothing_is_lost(
    database: Database, bucket: Bucket, line: NetworkProxy, tmp_path: Path
) -> None:
    store = bucket.seen_from(tmp_path / "far", line.endpoint).store()
    file = store.put(b"of nobody")
    line.cut()
    with pytest.raises(StoreUnavailable):
        collect_garbage(database, store, -60)
    away = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(Unavailable):
        collect_garbage(away, store, -60)
    away.close()
    line.mend()
    assert bucket.digests() == {file}
    assert collect_garbage(database, store, -60).files == 1 and bucket.digests() == set()
