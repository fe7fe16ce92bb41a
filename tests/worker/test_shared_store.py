"""Ingest and training with a bucket: who is given its keys, what is in it when, and what happens while it is away."""

from __future__ import annotations

import json
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import records
import sample
from buckets import KEYS, Bucket, NetworkProxy
from sqlalchemy import select
from working import QUICK, SendFromChild, claimed_work, make_due, training_settings

from artifacts import manifest
from artifacts.archive import ArchiveLimits
from artifacts.images import ImageLimits
from artifacts.store import Digest, Store, StoreAddress, digest_of
from errors import EspalierError, StoreUnavailable
from models import dataset as datasets
from models import job as jobs
from models import run as runs
from models import run_jobs
from models.dataset import DatasetState, DatasetVersion
from models.job import Job, JobKind, JobState, Queue
from models.session import Database
from worker.child_process import store_keys
from worker.handlers.compare import Compare
from worker.handlers.ingest import Ingest, IngestLimits, Purge
from worker.handlers.train import Train
from worker.local_worker import LocalWorker
from worker.messages import Failed, line_of

LIMITS = IngestLimits(ArchiveLimits(), ImageLimits(), classes=1000, decode_cpu_s=60, memory_bytes=1536 * 1024**2)


@dataclass
class Case:
    """A database, the bucket as a worker's machine sees it, and the loop that takes archives in there."""

    database: Database
    store: Store

    def upload(self, files: dict[str, bytes], name: str = "flowers") -> str:
        archive = self.store.put(sample.zipped(files, zipfile.ZIP_STORED))
        with self.database.writing() as session:
            return records.queue_ingest(session, archive, name)

    def work(self) -> bool:
        handlers = {JobKind.INGEST: Ingest(self.store, LIMITS), JobKind.PURGE: Purge(self.store)}
        return LocalWorker(self.database, Queue.INGEST, handlers, "here", QUICK).work()

    def version(self, version_id: str) -> DatasetVersion:
        with self.database.reading() as session:
            return session.get_one(DatasetVersion, version_id)

    def job(self, subject_id: str) -> Job:
        with self.database.reading() as session:
            return session.scalars(select(Job).where(Job.subject_id == subject_id)).one()


@pytest.fixture
def case(sqlite: Database, bucket: Bucket) -> Case:
    return Case(sqlite, bucket.store())


@pytest.fixture
def far(sqlite: Database, bucket: Bucket, line: NetworkProxy, tmp_path: Path) -> Case:
    """The same on a machine whose line to the bucket can be cut."""
    return Case(sqlite, bucket.seen_from(tmp_path / "far", line.endpoint).store())


@pytest.fixture
def child_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which every child notes its environment and its first order."""
    folder = tmp_path / "sidecar"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"""
import json, os, sys
if "worker.child" in sys.orig_argv:
    order = sys.stdin.buffer.raw.readline()
    with open({str(folder / "noted")!r}, "w") as file:
        json.dump([dict(os.environ), json.loads(order)], file)
    again, feed = os.pipe()
    os.write(feed, order)
    os.dup2(again, 0)
    os.set_inheritable(feed, False)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "noted"


# --- ingest ----------------------------------------------------------------------------------------------------------


def test_an_ingest_child_has_no_keys_and_no_bucket_and_its_images_reach_both(
    case: Case, bucket: Bucket, child_notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_STORE_URL", bucket.address.url or "")
    files = sample.coloured(per_class=4)
    version_id = case.upload(files)
    assert case.work()
    environment, order = json.loads(child_notes.read_text())
    assert not [name for name in environment if name.startswith(("AWS_", "ESPALIER_STORE"))]
    assert (
        not [value for value in KEYS.values() if value in child_notes.read_text()]
        and bucket.name not in child_notes.read_text()
    )
    assert Path(order["store"]).is_relative_to(case.store.root / "incoming") and not Path(order["store"]).exists()
    version = case.version(version_id)
    assert version.state is DatasetState.READY and version.manifest_sha256 is not None
    assert bucket.digests() == {version.manifest_sha256, *map(digest_of, files.values())}
    there = bucket.seen_from(tmp_path / "there").store()
    rows = manifest.load(there.read(Digest(version.manifest_sha256)))
    assert {row.path: there.read(row.sha256) for row in rows} == files


def test_images_that_are_not_taken_in_are_never_uploaded(case: Case, bucket: Bucket) -> None:
    files = sample.coloured(per_class=8, classes=2)
    files |= {"green/liar.png": files["blue/0.png"], "blue/bad.png": b"no image"}
    version_id = case.upload(files)
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.update(bucket.digests())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert case.work()
    over.set()
    watcher.join()
    version = case.version(version_id)
    assert version.state is DatasetState.READY and version.refused_total == 3
    assert not {digest_of(files["blue/0.png"]), digest_of(b"no image")} & seen


def test_an_ingest_waits_for_a_bucket_that_is_away_and_then_begins_anew(
    far: Case, bucket: Bucket, line: NetworkProxy
) -> None:
    files = sample.coloured(per_class=4)
    version_id = far.upload(files)
    (archive,) = bucket.digests()
    line.cut(up_bytes=4_000, down_bytes=4_000)  # some of the images go through
    assert far.work()
    job, version = far.job(version_id), far.version(version_id)
    assert (job.state, job.attempt, version.state) == (JobState.QUEUED, 0, DatasetState.UPLOADED)
    assert job.next_attempt_at is not None and not list((far.store.root / "incoming").iterdir())
    line.mend()
    make_due(far.database, job.id)
    assert far.work()
    version = far.version(version_id)
    assert version.state is DatasetState.READY and archive not in bucket.digests()
    assert bucket.digests() == {version.manifest_sha256, *map(digest_of, files.values())}


def test_an_ingest_tells_that_it_stores_its_images(far: Case, line: NetworkProxy) -> None:
    version_id = far.upload(sample.coloured(per_class=20))
    reports: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if progress := far.version(version_id).progress:
                reports.append(progress)

    line.delay_s = 0.1
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert far.work()
    over.set()
    watcher.join()
    assert far.version(version_id).state is DatasetState.READY
    storing = [progress for progress in reports if progress["stage"] == "storing"]
    assert storing and all(0 <= progress["fraction"] < 1 and progress["eta_s"] is not None for progress in storing)


def test_an_archive_that_another_machine_received_is_read_here(
    sqlite: Database, bucket: Bucket, tmp_path: Path
) -> None:
    api = Case(sqlite, bucket.seen_from(tmp_path / "api").store())
    version_id = api.upload(sample.coloured(per_class=3))
    worker = Case(sqlite, bucket.seen_from(tmp_path / "worker").store())
    assert worker.work()
    assert worker.version(version_id).state is DatasetState.READY
    assert worker.version(version_id).archive_sha256 is None and len(bucket.digests()) == 10


def test_what_cannot_be_removed_while_the_bucket_is_away_does_not_hold_a_purge_up(
    far: Case, bucket: Bucket, line: NetworkProxy
) -> None:
    version_id = far.upload(sample.coloured(per_class=3))
    assert far.work()
    with far.database.writing() as session:
        version = session.get_one(DatasetVersion, version_id)
        datasets.delete_dataset(session.get_one(datasets.Dataset, version.dataset_id))
        purge = jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.PURGE, Queue.INGEST, version.dataset_id)
    line.cut()
    assert far.work()
    line.mend()
    assert far.job(purge.subject_id).state is JobState.SUCCEEDED
    with far.database.reading() as session:
        assert records.count(session, datasets.Membership) == records.count(session, datasets.Image) == 0
    assert len(bucket.digests()) == 10, "a collection finds them"


# --- training --------------------------------------------------------------------------------------------------------


def test_a_training_child_is_given_the_keys_and_where_the_bucket_is(
    sqlite: Database, bucket: Bucket, tmp_path: Path
) -> None:
    store = bucket.store()
    with sqlite.writing() as session:
        version = records.ready_version(session)
        run = runs.create_run(session, records.PRINCIPAL, version.id, "flowers", records.RECIPE)
        job = run_jobs.queue_training(session, run)
    train = Train(store, training_settings(tmp_path))
    with sqlite.writing() as session:
        order = train._make_order(session, session.get_one(Job, job.id))
    assert order is not None
    assert order.spec.store == StoreAddress(
        folder=str(bucket.folder),
        url=bucket.address.url,
        endpoint=bucket.endpoint,
        region=bucket.address.region,
        cache_bytes=bucket.cache_bytes,
    )
    assert not [value for value in KEYS.values() if value in line_of(order)]
    assert store_keys(store) == KEYS and store_keys(Store(tmp_path / "folder")) == {}


@pytest.mark.parametrize("kind", ["train", "compare"])
def test_the_keys_stand_in_the_environment_of_a_child_that_needs_them(
    sqlite: Database, bucket: Bucket, tmp_path: Path, child_notes: Path, kind: str
) -> None:
    store = bucket.store()
    with sqlite.writing() as session:
        version = records.ready_version(session)
        if kind == "train":
            run_jobs.queue_training(
                session, runs.create_run(session, records.PRINCIPAL, version.id, "flowers", records.RECIPE)
            )
        else:
            comparison = records.queued_comparison(session, version)
            for job in session.scalars(select(Job)):
                job.state = JobState.SUCCEEDED
            jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.COMPARE, Queue.CPU, comparison.id)
    handler = Train(store, training_settings(tmp_path)) if kind == "train" else Compare(store, 1)
    with claimed_work(sqlite) as work, pytest.raises((EspalierError, RuntimeError)):  # nothing is there to work on
        handler.run(work)
    environment, _ = json.loads(child_notes.read_text())
    assert environment.items() >= KEYS.items()


def test_a_run_waits_for_a_bucket_that_is_away(
    sqlite: Database, bucket: Bucket, send_from_child: SendFromChild, tmp_path: Path
) -> None:
    with sqlite.writing() as session:
        version = records.ready_version(session)
        run = runs.create_run(session, records.PRINCIPAL, version.id, "flowers", records.RECIPE)
        job = run_jobs.queue_training(session, run)
    send_from_child(Failed.by(StoreUnavailable("Away.")))
    train = Train(bucket.store(), training_settings(tmp_path))
    assert LocalWorker(sqlite, Queue.CPU, {JobKind.TRAIN: train}, "here", QUICK).work()
    with sqlite.reading() as session:
        waiting, run = session.get_one(Job, job.id), runs.get_run(session, records.PRINCIPAL, run.id)
    assert (waiting.state, waiting.attempt) == (JobState.QUEUED, 0) and waiting.next_attempt_at is not None
    assert (run.state, run.progress["stage"]) == (runs.RunState.QUEUED, "waiting-for-store")
