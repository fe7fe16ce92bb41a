from __future__ import annotations

import io
import tarfile
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import records
import sample
from buckets import EACH_STORE, EACH_STORE_SLOWLY
from manual_clock import ManualClock
from PIL import Image
from records import PRINCIPAL
from sqlalchemy import select
from sqlalchemy.orm import Session
from waiting import until
from working import QUICK, LostCommitDatabase, SendFromChild, claimed_work, look, make_due, settled, slow_jpeg

from artifacts import manifest
from artifacts.archive import ArchiveLimits
from artifacts.images import ImageLimits, encode
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import Digest, Store, digest_of
from clock import Clock
from errors import Crashed, DiskFull, NotReady
from models import dataset as datasets
from models import job as jobs
from models.dataset import Dataset, DatasetState, DatasetVersion, Membership
from models.dataset import Image as ImageRow
from models.file_references import lock_files
from models.job import Job, JobKind, JobState, Queue
from models.session import Database
from recipes.defaults import ClassCount
from recipes.recipe import Task
from worker.child_process import Child
from worker.handlers import ingest
from worker.handlers.ingest import Ingest, IngestLimits, Purge
from worker.lease import Complete, Handler, Timings, Work
from worker.local_worker import LocalWorker
from worker.messages import ChildMessage, Failed, ImageBegun

LIMITS = IngestLimits(
    archive=ArchiveLimits(),
    image=ImageLimits(scans=100_000),  # so that an image may take long
    classes=1000,
    decode_cpu_s=60,
    memory_bytes=1536 * 1024**2,
)


@dataclass
class IngestCase:
    """A store, a database and the loop that takes archives in."""

    database: Database
    store: Store
    limits: IngestLimits = LIMITS
    timings: Timings = QUICK
    clock: Clock = field(default_factory=Clock)

    def upload(self, archive: bytes, name: str = "flowers") -> str:
        """Owe the ingest of an archive into a data set, as its first or its next version; return the version's id."""
        digest = self.store.put(archive)
        with self.database.writing() as session:
            return records.queue_ingest(session, digest, name)

    def take_in(self, archive: bytes | Mapping[str, bytes], name: str = "flowers") -> DatasetVersion:
        """Upload an archive, or files as a zip, see the ingest through and return the version as it stands then."""
        data = archive if isinstance(archive, bytes) else sample.zipped(archive, zipfile.ZIP_STORED)
        version_id = self.upload(data, name)
        assert self.loop().work()
        return self.version(version_id)

    def take_in_again(self, version: DatasetVersion, code_page: str | None = None) -> DatasetVersion:
        """Take the archive of a rejected version in, with its refused files or with names in a code page."""
        version_id = self.queue_again(version, code_page)
        assert self.loop().work()
        return self.version(version_id)

    def queue_again(self, version: DatasetVersion, code_page: str | None = None) -> str:
        """Queue the ingest of a rejected version's archive, as a new version; return its id."""
        with self.database.writing() as session:
            dataset = session.get_one(Dataset, version.dataset_id)
            again = datasets.add_version_again(
                session, dataset, version.number, code_page, allow_refused=code_page is None
            )
            jobs.add_job(session, dataset.project_id, JobKind.INGEST, Queue.INGEST, again.id)
            return again.id

    def delete(self, name: str = "flowers") -> str:
        """Delete a data set as the API does; return the id of the purge job."""
        with self.database.writing() as session:
            query = select(Dataset).where(Dataset.name == name, Dataset.deleted_at.is_(None))
            dataset = session.scalars(query).one()
            for version in datasets.get_versions(session, dataset.id):
                if jobs.request_cancel(session, version.id, JobKind.INGEST):
                    datasets.cancel_ingest(session, version.id)
            datasets.delete_dataset(dataset)
            return jobs.add_job(session, dataset.project_id, JobKind.PURGE, Queue.INGEST, dataset.id).id

    def loop(self, **handlers: Handler) -> LocalWorker:
        """Return a loop for the ingest queue; `ingest=…` replaces the real handler."""
        known: dict[JobKind, Handler] = {
            JobKind.INGEST: Ingest(self.store, self.limits),
            JobKind.PURGE: Purge(self.store),
        }
        replaced = {JobKind(kind): handler for kind, handler in handlers.items()}
        return LocalWorker(self.database, Queue.INGEST, known | replaced, "here", self.timings, self.clock)

    def version(self, version_id: str) -> DatasetVersion:
        with self.database.reading() as session:
            return session.get_one(DatasetVersion, version_id)

    def job(self, subject_id: str) -> Job:
        with self.database.reading() as session:
            return session.scalars(select(Job).where(Job.subject_id == subject_id)).one()

    def rows(self, version: DatasetVersion) -> list[tuple[Any, ...]]:
        """Return what the database knows of each image of a version."""
        columns = (
            Membership.path,
            ImageRow.sha256,
            Membership.label,
            Membership.target,
            Membership.group,
            Membership.split,
        )
        query = (
            select(*columns)
            .join(ImageRow, ImageRow.id == Membership.image_id)
            .where(Membership.version_id == version.id)
        )
        with self.database.reading() as session:
            return sorted(tuple(row) for row in session.execute(query))

    def manifest(self, version: DatasetVersion) -> list[Row]:
        assert version.manifest_sha256 is not None
        return manifest.load(self.store.read(Digest(version.manifest_sha256)))

    def named(self) -> set[str]:
        """Return every stored file that a row names."""
        columns = (ImageRow.sha256, DatasetVersion.archive_sha256, DatasetVersion.manifest_sha256)
        with self.database.reading() as session:
            return {file for column in columns for file in session.scalars(select(column)) if file is not None}

    def counts(self) -> tuple[int, int]:
        """Return how many images and memberships there are."""
        with self.database.reading() as session:
            return records.count(session, ImageRow), records.count(session, Membership)

    def has_nothing_but(self, *versions: DatasetVersion) -> bool:
        """Say whether exactly the files and rows of these versions are there: nothing is missing, nothing left over."""
        rows = [row for version in versions for row in self.rows(version)]
        with self.database.reading() as session:
            kept = select(DatasetVersion.archive_sha256).where(DatasetVersion.archive_until.is_not(None))
            archives = set(session.scalars(kept)) - {None}
        files = {row[1] for row in rows} | {version.manifest_sha256 for version in versions} | archives
        return (
            set(self.store.digests()) == self.named() == files
            and self.counts() == (len({row[1] for row in rows}), len(rows))
            and not list((self.store.root / "incoming").iterdir())
        )


@pytest.fixture
def intake(sqlite: Database, store: Store) -> IngestCase:
    return IngestCase(sqlite, store)


@pytest.fixture
def anywhere(database: Database, store: Store) -> IngestCase:
    """The same on each kind of database."""
    return IngestCase(database, store)


def refused(version: DatasetVersion) -> dict[str, str]:
    return {file["path"]: file["reason"] for file in version.refused}


def is_stored(intake: IngestCase, data: bytes) -> bool:
    return intake.store.has(digest_of(data))


def is_read(intake: IngestCase, data: bytes) -> bool:
    """Say whether a child has written an image into the store that it was lent."""
    digest = digest_of(data)
    return any(intake.store.root.glob(f"incoming/*/{digest[:2]}/{digest}"))


# --- what a data set becomes -----------------------------------------------------------------------------------------


@EACH_STORE
def test_folders_become_classes(anywhere: IngestCase) -> None:
    files = sample.coloured(per_class=4) | {"__MACOSX/x": b"litter", "blue/.DS_Store": b"litter"}
    version = anywhere.take_in(files)
    assert (version.state, version.task, version.error) == (DatasetState.READY, Task.MULTICLASS, None)
    assert (version.images, version.duplicates, version.ignored, version.refused_total) == (12, 0, 2, 0)
    assert version.class_counts == [ClassCount(name, 4, 4) for name in ("blue", "green", "red")]
    assert version.target is None and version.ready_at is not None
    images = {path: data for path, data in files.items() if path.endswith(".png")}
    assert anywhere.rows(version) == sorted(
        (path, digest_of(data), path.split("/")[0], None, None, Split.TRAIN) for path, data in images.items()
    )
    assert [(row.path, row.sha256, row.labels) for row in anywhere.manifest(version)] == sorted(
        (path, digest_of(data), (path.split("/")[0],)) for path, data in images.items()
    )
    with anywhere.database.reading() as session:
        image = session.scalars(select(ImageRow).where(ImageRow.sha256 == digest_of(files["red/0.png"]))).one()
    assert (image.width, image.height, image.format) == (40, 40, "PNG")
    assert image.size_bytes == len(files["red/0.png"])
    assert anywhere.job(version.id).state is JobState.SUCCEEDED
    assert anywhere.has_nothing_but(version)  # the archive is gone, for one


def test_a_tar_and_an_outer_folder_change_nothing(intake: IngestCase) -> None:
    files = sample.coloured(per_class=2, classes=2)
    plain = intake.take_in(files, "plain")
    wrapped = intake.take_in(sample.tarred({f"outer/{path}": data for path, data in files.items()}), "wrapped")
    assert (wrapped.state, wrapped.task, wrapped.classes) == (DatasetState.READY, Task.BINARY, plain.classes)
    assert [row.sha256 for row in intake.manifest(wrapped)] == [row.sha256 for row in intake.manifest(plain)]
    assert intake.has_nothing_but(plain, wrapped)


def test_labels_groups_and_splits_come_from_the_csv(intake: IngestCase) -> None:
    lines = ["path,label,group,split"]
    files: dict[str, bytes] = {}
    for number in range(8):
        files[f"{number}.png"] = sample.png(number)
        split = {6: "validation", 7: "test"}.get(number, "")
        label, bush = ("daisy", "rose")[number % 2], number // 2 if number < 6 else number
        lines.append(f"{number}.png,{label},bush-{bush},{split}")
    version = intake.take_in(files | {"labels.csv": "\n".join(lines).encode()})
    assert (version.state, version.task) == (DatasetState.READY, Task.BINARY)
    rows = intake.manifest(version)
    assert [row.labels for row in rows] == [("daisy",), ("rose",)] * 4
    assert [row.group for row in rows] == [f"bush-{number}" for number in (0, 0, 1, 1, 2, 2, 6, 7)]
    assert [row.split for row in rows] == [Split.TRAIN] * 6 + [Split.VALIDATION, Split.TEST]
    # Foldable: groups with an image of the class to train on.
    assert version.class_counts == [ClassCount("daisy", 4, 3), ClassCount("rose", 4, 3)]
    assert [row[3:] for row in intake.rows(version)] == [(None, row.group, row.split) for row in rows]
    assert intake.has_nothing_but(version)


def test_several_labels_make_a_multilabel_set(intake: IngestCase) -> None:
    csv = b"path,label\n0.png,sea|sand\n1.png,sand\n2.png,|\n3.png,sea\n"
    files = {f"{number}.png": sample.png(number) for number in range(4)}
    version = intake.take_in(files | {"labels.csv": csv})
    assert (version.state, version.task, version.images) == (DatasetState.READY, Task.MULTILABEL, 4)
    assert version.class_counts == [ClassCount("sand", 2, 2), ClassCount("sea", 2, 2)]
    assert [row[2] for row in intake.rows(version)] == ["sand|sea", "sand", "", "sea"]


def test_targets_make_a_regression(intake: IngestCase) -> None:
    csv = b"path,target\n0.png,1.5\n1.png,-2\n2.png,3.5\n"
    files = {f"{number}.png": sample.png(number) for number in range(3)}
    version = intake.take_in(files | {"labels.csv": csv})
    assert (version.state, version.task, version.classes) == (DatasetState.READY, Task.REGRESSION, [])
    assert version.target == {"min": -2.0, "max": 3.5, "mean": 1.0, "groups": 3} and version.groups == 3
    assert [row[2:4] for row in intake.rows(version)] == [(None, 1.5), (None, -2.0), (None, 3.5)]


# --- files that are refused ------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_listed_and_the_rest_goes_on(intake: IngestCase) -> None:
    whole = sample.jpeg(1)
    files = sample.coloured(per_class=6) | {
        "red/text.png": b"this is no image at all",
        "blue/cut.jpg": whole[: len(whole) // 2],
        "blue/vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "green/huge.png": sample.png(1, side=200),
        "readme.txt": b"hello",
    }
    limits = replace(LIMITS, image=ImageLimits(pixels=20_000))
    version = replace(intake, limits=limits).take_in(files)
    assert (version.state, version.images, version.refused_total) == (DatasetState.READY, 18, 4)
    reasons = refused(version)
    assert list(reasons) == ["blue/cut.jpg", "blue/vector.svg", "green/huge.png", "red/text.png"]
    assert "damaged" in reasons["blue/cut.jpg"]
    assert "Received an SVG." in reasons["blue/vector.svg"]
    assert reasons["red/text.png"].endswith("Received something else.")
    assert "The image has 200 × 200 pixels" in reasons["green/huge.png"]
    assert version.ignored == 1
    warning, loss = version.warnings
    assert "blue" in loss and "2 of its 8" in loss
    assert "4 of 22 files were refused" in warning and "Expected an image" in warning
    assert intake.has_nothing_but(version)


def test_a_file_that_its_archive_cannot_give_is_refused_with_the_others(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2)
    buffer = io.BytesIO(sample.tarred(files, "w"))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("blue/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)
    version = intake.take_in(buffer.getvalue())
    assert (version.state, version.images) == (DatasetState.READY, 6)
    assert "Received a symbolic link" in refused(version)["blue/link.png"]


def test_a_table_of_labels_that_its_archive_cannot_give_is_not_replaced_by_the_folders(intake: IngestCase) -> None:
    buffer = io.BytesIO(sample.tarred(sample.coloured(per_class=3, classes=2), "w"))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("labels.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "../labels.csv"
        tar.addfile(link)
    version = intake.take_in(buffer.getvalue())
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert "labels.csv cannot be used. Expected a file with content. Received" in version.error["detail"]


@EACH_STORE_SLOWLY
def test_the_same_file_twice_counts_as_a_duplicate(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2)
    files["blue/again.png"] = files["blue/0.png"]
    version = intake.take_in(files)
    assert (version.images, version.duplicates, version.refused_total) == (7, 1, 0)
    assert version.class_counts == [ClassCount("blue", 4, 3), ClassCount("green", 3, 3)]  # twins are one group
    assert intake.counts() == (6, 7)
    assert intake.has_nothing_but(version)


@EACH_STORE_SLOWLY
def test_the_same_file_under_two_labels_is_refused(intake: IngestCase) -> None:
    files = sample.coloured(per_class=6, classes=2)
    files["green/liar.png"] = files["blue/0.png"]
    version = intake.take_in(files)
    assert (version.state, version.images, version.duplicates) == (DatasetState.READY, 11, 0)
    reason = "this image appears more than once, with two labels: blue and green"
    assert refused(version) == {"blue/0.png": reason, "green/liar.png": reason}
    assert not is_stored(intake, files["blue/0.png"])  # no row names it
    assert intake.has_nothing_but(version)


def test_the_same_file_under_two_numbers_is_refused_however_close_they_are(intake: IngestCase) -> None:
    files = {f"{number}.png": sample.png(number) for number in range(4)} | {"again.png": sample.png(0)}
    lines = [
        "path,target",
        *(f"{number}.png,{number}" for number in range(1, 4)),
        "0.png,2018.123",
        "again.png,2018.119",
    ]
    version = intake.take_in({"labels.csv": "\n".join(lines).encode(), **files})
    assert set(refused(version)) == {"0.png", "again.png"}
    assert "2018.119 and 2018.123" in refused(version)["0.png"]


@EACH_STORE_SLOWLY
def test_too_many_refused_files_reject_the_set_until_its_owner_accepts_that(anywhere: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2) | {f"blue/bad{number}.png": b"bad" for number in range(2)}
    version = anywhere.take_in(files)
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert (version.error["code"], version.error["retry"]) == ("dataset-refused", "allow_refused")
    assert "2 of 8 files cannot be used" in version.error["detail"]
    assert "at most 20% may be unusable" in version.error["detail"]
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/ingest"
    assert f"POST {address}?allow_refused=true ingests it." in version.error["detail"]
    assert list(refused(version)) == ["blue/bad0.png", "blue/bad1.png"]
    assert anywhere.counts() == (0, 0)
    assert anywhere.has_nothing_but()
    assert anywhere.job(version.id).state is JobState.SUCCEEDED  # the job did what it should
    again = anywhere.take_in_again(version)
    assert (again.state, again.number, again.images) == (DatasetState.READY, 2, 6)
    assert "2 of 8 files were refused" in again.warnings[0]
    assert anywhere.has_nothing_but(again)
    with pytest.raises(NotReady, match=r"is not kept.* Upload it again"):
        anywhere.take_in_again(version)


def test_a_class_of_which_every_image_is_refused_rejects_the_set(intake: IngestCase) -> None:
    files = sample.coloured(per_class=9, classes=2) | {"bird/1.heic": b"bad", "bird/2.heic": b"bad"}
    version = intake.take_in(files)
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert "Received none of 'bird'" in version.error["detail"] and version.error["retry"] == "allow_refused"
    again = intake.take_in_again(version)
    assert (again.state, again.task) == (DatasetState.READY, Task.BINARY)
    assert "No image of class 'bird' could be used; the data set does not have it." in again.warnings


def test_a_class_that_lost_many_images_is_warned_of(intake: IngestCase) -> None:
    files = sample.coloured(per_class=9, classes=2) | {"bird/1.heic": b"bad", "bird/2.png": sample.png(2)}
    version = intake.take_in(files)
    assert version.state is DatasetState.READY
    assert "Class 'bird' lost 1 of its 2 images, which were refused." in version.warnings


def test_names_in_a_code_page_that_is_not_clear_are_taken_in_once_it_is_chosen(intake: IngestCase) -> None:
    names = {f"{name}/{number}.png" for name in ("고양이", "강아지") for number in range(2)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="cp949") as tar:
        for number, name in enumerate(sorted(names)):
            data = sample.png(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    version = intake.take_in(buffer.getvalue())
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert "고양이" in version.error["readings"]["cp949"]
    pages = list(version.error["readings"])
    choices = f"ingest?names={pages[0]} (or {' or '.join(f'names={page}' for page in pages[1:])}) ingests it."
    assert len(pages) > 1 and version.error["detail"].endswith(choices)
    wrong = intake.take_in_again(version, "ascii")
    assert wrong.error is not None and list(wrong.error["readings"]) == pages
    assert "/versions/2/ingest?" in wrong.error["detail"]
    with pytest.raises(NotReady, match="Version 2 of this data set still has its archive"):
        intake.take_in_again(version, "cp949")
    again = intake.take_in_again(wrong, "cp949")
    assert again.state is DatasetState.READY and {row[0] for row in intake.rows(again)} == names


@pytest.mark.parametrize(
    ("archive", "code", "detail"),
    [
        (sample.zipped(sample.coloured(3, classes=1)), "dataset-refused", "A data set needs 2 to 1,000 classes"),
        (sample.zipped({"a/b/c/d.png": b"x", "e.png": b"y"}), "layout-unknown", "Expected one folder per class"),
        (b"PK\x03\x04 but then nothing of a zip", "archive-refused", "The zip cannot be read"),
        (sample.zipped({"a/1.png": b"bad", "b/1.png": b"bad"}), "dataset-refused", "The archive has no usable image"),
    ],
    ids=["one class", "too deep", "no zip", "no image"],
)
def test_what_makes_no_data_set_is_rejected_with_its_reason(
    intake: IngestCase, archive: bytes, code: str, detail: str
) -> None:
    version = intake.take_in(archive)
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert version.error["code"] == code and detail in version.error["detail"]
    assert intake.has_nothing_but()


# --- images that break decoders --------------------------------------------------------------------------------------


@EACH_STORE_SLOWLY
def test_an_image_that_takes_too_long_to_decode_is_refused_and_the_rest_goes_on(intake: IngestCase) -> None:
    files = sample.coloured(per_class=2, classes=2)
    paths = list(files)
    hostile = {**{path: files[path] for path in paths[:2]}, "blue/slow.jpg": slow_jpeg(1500)}
    version = replace(intake, limits=replace(LIMITS, decode_cpu_s=1)).take_in(hostile | files)
    assert (version.state, version.images) == (DatasetState.READY, 4)
    assert refused(version) == {"blue/slow.jpg": "the decoder crashed on it: The process ended with SIGXCPU."}
    assert intake.has_nothing_but(version)


def test_an_image_that_would_take_too_long_to_decode_is_refused_unread(intake: IngestCase) -> None:
    files = sample.coloured(per_class=2, classes=2) | {"blue/slow.jpg": slow_jpeg(20_000)}
    version = replace(intake, limits=replace(LIMITS, image=ImageLimits())).take_in(files)
    assert (version.state, version.images) == (DatasetState.READY, 4)
    # One that had been read would have been killed for its CPU time before it was counted to its end.
    assert refused(version) == {"blue/slow.jpg": "The JPEG has more scans than the limit of 100."}
    assert intake.has_nothing_but(version)


def test_an_image_that_takes_too_much_memory_is_refused_and_the_rest_goes_on(intake: IngestCase) -> None:
    wide = encode(Image.new("L", (6000, 6000)), "PNG")
    files = sample.coloured(per_class=2, classes=2) | {"blue/wide.png": wide}
    version = replace(intake, limits=replace(LIMITS, memory_bytes=330 * 1024**2)).take_in(files)
    assert (version.state, version.images) == (DatasetState.READY, 4)
    assert refused(version) == {"blue/wide.png": "The image is damaged: MemoryError."}
    assert intake.has_nothing_but(version)


def test_a_process_without_memory_rejects_the_set_and_says_so(intake: IngestCase) -> None:
    files = sample.coloured(per_class=2, classes=2) | {"blue/big.png": bytes(60 * 1024**2)}
    version = replace(intake, limits=replace(LIMITS, memory_bytes=280 * 1024**2)).take_in(files)
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert version.error["code"] == "out-of-memory"
    assert intake.has_nothing_but()


# --- adding a version ------------------------------------------------------------------------------------------------


def test_a_further_version_adds_what_is_new(anywhere: IngestCase) -> None:
    long = f"green/{'é' * 125}.png"  # 254 of the 255 bytes that a name may have
    files = sample.coloured(per_class=3, classes=2) | {long: sample.png(903)}
    first = anywhere.take_in(files)
    more = {
        "blue/0.png": files["blue/0.png"],  # known
        "blue/9.png": sample.png(900),
        "red/0.png": sample.png(901),  # a new class
        "green/again.png": files["green/1.png"],  # a known file at another path
        "green/2.png": sample.png(902),  # another file at a known path
        long: sample.png(904),
    }
    second = anywhere.take_in(more)
    assert (second.state, second.number, second.task) == (DatasetState.READY, 2, Task.MULTICLASS)
    assert refused(second) == {}
    assert "2 images have the names of other images" in second.warnings[0] and "'green/2 (2).png'" in second.warnings[0]
    assert (second.images, second.duplicates) == (12, 1)
    assert [(count.name, count.images) for count in second.class_counts] == [("blue", 4), ("green", 7), ("red", 1)]
    expected = files | {path: more[path] for path in ("blue/9.png", "red/0.png", "green/again.png")}
    expected["green/2 (2).png"] = more["green/2.png"]
    expected[f"green/{'é' * 123} (2).png"] = more[long]
    assert [row[:2] for row in anywhere.rows(second)] == sorted(
        (path, digest_of(data)) for path, data in expected.items()
    )
    assert sorted(row.path for row in anywhere.manifest(second)) == sorted(expected)
    assert anywhere.version(first.id).images == 7 and len(anywhere.rows(first)) == 7  # what it was stays so
    assert anywhere.has_nothing_but(first, second)
    third = anywhere.take_in(more)
    assert third.state is DatasetState.REJECTED and third.error is not None
    assert "Received none: 6 are in it already" in third.error["detail"]
    assert anywhere.has_nothing_but(first, second)


def test_a_file_that_changes_its_label_is_refused(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2)
    first = intake.take_in(files)
    more = {f"green/{number}.png": sample.png(100 * number) for number in range(7, 12)}
    second = intake.take_in({"green/0b.png": files["blue/0.png"], **more})
    assert refused(second) == {"green/0b.png": "this image appears more than once, with two labels: blue and green"}
    assert second.images == 11 and is_stored(intake, files["blue/0.png"])
    assert intake.has_nothing_but(first, second)


def test_a_version_from_before_keeps_its_spelling_of_macos_and_is_added_to(intake: IngestCase) -> None:
    files = {f"é{number}.png": sample.png(number) for number in range(4)}
    table = "path,label,group\n" + "".join(
        f"é{number}.png,{'chêne' if number % 2 else 'if'},grün\n" for number in range(4)
    )
    first = intake.take_in(files | {"labels.csv": table.encode()})
    old = [
        replace(row, path=nfd(row.path), labels=tuple(map(nfd, row.labels)), group=nfd(row.group or ""))
        for row in intake.manifest(first)
    ]
    with intake.database.writing() as session:
        session.get_one(DatasetVersion, first.id).manifest_sha256 = intake.store.put(manifest.dump(old))
        for member in session.scalars(select(Membership)):
            member.path, member.label, member.group = nfd(member.path), nfd(member.label or ""), nfd("grün")
    more = {"é1.png": files["é1.png"], "é9.png": sample.png(9)}
    second = intake.take_in(more | {"labels.csv": "path,label,group\né1.png,chêne,grün\né9.png,chêne,grün\n".encode()})
    assert (second.state, second.task, second.images) == (DatasetState.READY, Task.BINARY, 5)
    new = Row("é9.png", digest_of(more["é9.png"]), (nfd("chêne"),), None, nfd("grün"), Split.TRAIN)
    assert intake.manifest(second) == sorted([*old, new], key=lambda row: row.path)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_targets_do_not_go_onto_classes_nor_classes_onto_targets(intake: IngestCase) -> None:
    targets = {"1.png": sample.png(1), "2.png": sample.png(2), "labels.csv": b"path,target\n1.png,1\n2.png,2\n"}
    classes = sample.coloured(per_class=2, classes=2)
    kept = []
    for name, base, onto in (("classes", classes, targets), ("numbers", targets, classes)):
        kept.append(intake.take_in(base, name))
        second = intake.take_in(onto, name)
        assert second.state is DatasetState.REJECTED and second.error is not None
        assert "as in the earlier version" in second.error["detail"]
        assert intake.rows(second) == []
    assert intake.has_nothing_but(*kept)


def deep(value: int, count: int) -> dict[str, bytes]:
    """Return 16-bit images in two folders, whose largest value is this."""
    return {
        f"{name}/{value}-{number}.png": encode(Image.fromarray(np.full((8, 8), value - number, np.uint16)), "PNG")
        for name, numbers in {"blue": range(count), "green": range(count, 2 * count)}.items()
        for number in numbers
    }


def test_the_bit_depth_of_a_data_set_is_told_and_grows_with_its_images(intake: IngestCase) -> None:
    plain = intake.take_in(sample.coloured(per_class=2, classes=2))
    assert (plain.bit_depth, plain.warnings) == (None, [])
    first = intake.take_in(deep(4000, 2))
    assert first.bit_depth == 12 and "No value of the 16-bit images is above 4,095." in first.warnings[0]
    darker = intake.take_in(deep(900, 2))
    assert (darker.bit_depth, darker.warnings) == (12, [])
    second = intake.take_in(deep(40_000, 2))
    assert (
        second.bit_depth == 16 and "have values of 16 bits, those of the earlier version have 12." in second.warnings[0]
    )
    assert intake.version(first.id).bit_depth == 12
    assert (intake.take_in(deep(50_000, 2), "scans").bit_depth, second.state) == (16, DatasetState.READY)
    third = intake.take_in(deep(3000, 2))
    assert third.bit_depth == 16 and "No value of the new 16-bit images is above 4,095." in third.warnings[0]


def test_files_with_further_pictures_are_warned_of(intake: IngestCase) -> None:
    pages = io.BytesIO()
    Image.new("L", (8, 8)).save(pages, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    version = intake.take_in(sample.coloured(per_class=2, classes=2) | {"blue/pages.tif": pages.getvalue()})
    assert version.state is DatasetState.READY
    assert "1 files have several pictures" in version.warnings[0] and "'blue/pages.tif'" in version.warnings[0]


@EACH_STORE_SLOWLY
def test_a_rejected_addition_leaves_the_version_before_alone(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2)
    first = intake.take_in(files)
    bad = {"blue/0.png": files["blue/0.png"], "blue/new.png": sample.png(9)}
    bad |= {f"blue/bad{number}.png": b"bad" for number in range(60)}
    assert intake.take_in(bad).state is DatasetState.REJECTED  # and its archive is kept
    assert not is_stored(intake, bad["blue/new.png"])
    assert intake.has_nothing_but(first)
    third = intake.take_in({"blue/new.png": sample.png(9)})
    assert (third.state, third.number, third.parent_id, third.images) == (DatasetState.READY, 3, first.id, 7)
    assert intake.has_nothing_but(first, third)


# --- interruptions ---------------------------------------------------------------------------------------------------


def slow_set(scans: int) -> dict[str, bytes]:
    """Return files of which the last one keeps the child busy."""
    return sample.coloured(per_class=3, classes=2) | {"green/slow.jpg": slow_jpeg(scans)}


@contextmanager
def held_at_the_slow_image() -> Iterator[threading.Event]:
    """Have no ingest go on beyond its slow image while the block runs; yields what is set once one is there."""
    is_there, may_go_on = threading.Event(), threading.Event()
    receive = Child.receive

    def held(child: Child, work: Work) -> ChildMessage | None:
        message = receive(child, work)
        if isinstance(message, ImageBegun) and message.path == "green/slow.jpg":
            is_there.set()
            may_go_on.wait(120)
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "receive", held)
        try:
            yield is_there
        finally:
            may_go_on.set()


Begin = Callable[..., tuple[str, LocalWorker]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begin an ingest in a thread; return its version and its loop once all images but the last are read."""
    threads = []

    def begin(intake: IngestCase, files: Mapping[str, bytes], name: str = "flowers") -> tuple[str, LocalWorker]:
        version_id = intake.upload(sample.zipped(files, zipfile.ZIP_STORED), name)
        loop = intake.loop()
        threads.append(threading.Thread(target=loop.work))
        threads[-1].start()
        until(lambda: is_read(intake, list(files.values())[-2]))
        return version_id, loop

    yield begin
    for thread in threads:
        thread.join(60)


def test_an_ingest_that_was_interrupted_ends_as_if_it_had_not_been(anywhere: IngestCase, begin: Begin) -> None:
    files = slow_set(scans=100)
    with held_at_the_slow_image() as is_there:
        version_id, loop = begin(anywhere, files)
        assert is_there.wait(120)
        loop.drain()
    until(lambda: anywhere.job(version_id).state is JobState.QUEUED)
    assert anywhere.version(version_id).state is DatasetState.UPLOADED
    assert anywhere.job(version_id).attempt == 0
    assert anywhere.loop().work()
    resumed = anywhere.version(version_id)
    unbroken = anywhere.take_in(files, "unbroken")
    assert resumed.state is unbroken.state is DatasetState.READY
    assert (resumed.manifest_sha256, resumed.classes) == (unbroken.manifest_sha256, unbroken.classes)
    assert anywhere.rows(resumed) == anywhere.rows(unbroken)
    assert anywhere.has_nothing_but(resumed, unbroken)


def test_what_an_attempt_wrote_before_its_worker_died_is_not_in_the_way(anywhere: IngestCase) -> None:
    version_id = anywhere.upload(sample.zipped(sample.coloured(per_class=3)))
    abandon(anywhere, version_id)
    assert anywhere.counts() == (9, 9)
    assert anywhere.loop().work()
    version = anywhere.version(version_id)
    assert (version.state, version.images, version.duplicates) == (DatasetState.READY, 9, 0)
    assert anywhere.has_nothing_but(version)


def test_what_an_attempt_wrote_is_purged_though_the_next_one_was_cancelled(anywhere: IngestCase) -> None:
    files = slow_set(scans=60)
    version_id = anywhere.upload(sample.zipped(files, zipfile.ZIP_STORED))
    abandon(anywhere, version_id)
    assert anywhere.counts() == (7, 7)
    thread = threading.Thread(target=anywhere.loop().work)
    with held_at_the_slow_image() as is_there:
        thread.start()
        assert is_there.wait(120)
        assert anywhere.counts() == (0, 0), "the next attempt begins anew"
        purge = anywhere.delete()
        renewals = anywhere.job(version_id).renewals
        until(lambda: anywhere.job(version_id).renewals >= renewals + 2)  # by then its worker knows
    thread.join(60)
    assert anywhere.job(version_id).state is JobState.CANCELLED
    assert anywhere.loop().work()
    assert look(anywhere.database, purge).state is JobState.SUCCEEDED
    assert anywhere.counts() == (0, 0)
    assert not [path for path, data in files.items() if is_stored(anywhere, data)]


def abandon(intake: IngestCase, version_id: str) -> None:
    """Do everything of an ingest but its end, as a worker that is killed just before; then take its job over."""
    handler = Ingest(intake.store, intake.limits)
    with claimed_work(intake.database) as work:
        assert work.subject_id == version_id
        handler.run(work)
    with intake.database.writing() as session:
        (observation,) = jobs.observe_leases(session)
        job = jobs.take_over(session, observation)
        assert job is not None
        if job.state is JobState.FAILED:
            handler.failed(session, job, Crashed("The worker of this job was lost at every attempt."))
        else:
            handler.requeued(session, job, None)


@EACH_STORE_SLOWLY
def test_what_attempts_wrote_is_dropped_once_the_last_one_lost_its_worker(anywhere: IngestCase) -> None:
    shared = sample.coloured(per_class=2, classes=2)
    kept = anywhere.take_in(shared, "kept")
    files = shared | {"blue/mine.png": sample.png(77)}
    version_id = anywhere.upload(sample.zipped(files))
    job_id = anywhere.job(version_id).id
    for _ in range(jobs.MAX_ATTEMPTS):
        abandon(anywhere, version_id)
    assert look(anywhere.database, job_id).state is JobState.FAILED
    assert anywhere.version(version_id).state is DatasetState.REJECTED
    assert anywhere.counts() == (5, 9)
    assert anywhere.loop().work()
    assert anywhere.counts() == (4, 4) and len(anywhere.rows(kept)) == 4
    assert is_stored(anywhere, files["blue/0.png"]) and not is_stored(anywhere, files["blue/mine.png"])
    assert anywhere.loop().work() is False
    again = anywhere.take_in(files)
    assert (again.state, again.number) == (DatasetState.READY, 2)
    assert anywhere.has_nothing_but(kept, again)


def test_a_kept_archive_is_ingested_though_workers_die_over_it(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2) | {f"blue/bad{number}.png": b"bad" for number in range(2)}
    version_id = intake.upload(sample.zipped(files))
    abandon(intake, version_id)  # its worker dies before it writes that the version is rejected
    assert intake.loop().work()
    rejected = intake.version(version_id)
    assert rejected.state is DatasetState.REJECTED and rejected.archive_until is not None
    version_id = intake.queue_again(rejected)
    abandon(intake, version_id)
    assert intake.loop().work()
    again = intake.version(version_id)
    assert (again.state, again.images) == (DatasetState.READY, 6)
    assert intake.has_nothing_but(again)


@EACH_STORE_SLOWLY
def test_what_was_written_though_its_answer_was_lost_is_written_once(intake: IngestCase) -> None:
    files = sample.coloured(per_class=3, classes=2)
    first = intake.take_in(files)
    version_id = intake.upload(sample.zipped({"blue/9.png": sample.png(9), "blue/0.png": files["blue/0.png"]}))
    forgetful = LostCommitDatabase(intake.database.engine.url)
    with claimed_work(intake.database, through=forgetful) as work:
        complete = Ingest(intake.store, LIMITS).run(work)
        with intake.database.writing() as session:
            complete(session)
            jobs.finish(session, work.lease, JobState.SUCCEEDED)
        for _ in range(4):  # each of the two removals is tried until it is heard of
            work.tidy()
    forgetful.close()
    version = intake.version(version_id)
    assert (version.state, version.images, len(intake.rows(version))) == (DatasetState.READY, 7, 7)
    assert intake.has_nothing_but(first, version)


def test_an_end_that_could_not_be_written_does_not_cost_the_archive(intake: IngestCase) -> None:
    class Interrupted(Ingest):
        """Its worker breaks while the first end is being written."""

        has_broken = False

        def run(self, work: Work) -> Complete:
            complete = super().run(work)

            def broken(session: Session) -> None:
                complete(session)
                if not self.has_broken:
                    self.has_broken = True
                    raise Crashed("The worker broke before the commit.")

            return broken

    version_id = intake.upload(sample.zipped(sample.coloured(per_class=3)))
    loop = intake.loop(ingest=Interrupted(intake.store, LIMITS))
    assert loop.work()
    assert intake.version(version_id).state is DatasetState.UPLOADED
    make_due(intake.database, intake.job(version_id).id)
    assert loop.work()
    version = intake.version(version_id)
    assert (version.state, version.error, version.images) == (DatasetState.READY, None, 9)
    assert intake.has_nothing_but(version)


def test_an_ingest_that_has_no_room_waits_and_rejects_nothing(
    intake: IngestCase, send_from_child: SendFromChild
) -> None:
    version_id = intake.upload(sample.zipped(sample.coloured(per_class=3)))
    send_from_child(Failed.by(DiskFull("The disk is full.")))
    assert intake.loop().work()
    job = intake.job(version_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0) and job.next_attempt_at is not None
    assert intake.version(version_id).state is DatasetState.UPLOADED


def test_an_ingest_that_stalls_is_rejected_and_leaves_nothing(intake: IngestCase, begin: Begin) -> None:
    clock = ManualClock()
    slow = replace(intake, timings=replace(QUICK, let_go_s=1000.0), clock=Clock(clock.monotonic))
    with held_at_the_slow_image() as is_there:
        version_id, _ = begin(slow, slow_set(scans=20_000))
        assert is_there.wait(120)
        clock.sleep(QUICK.stall_s + 1)
        lease = f"lease-{intake.job(version_id).id}"  # who holds it looks once more, and then no longer
        until(lambda: lease not in {thread.name for thread in threading.enumerate()})
    settled(intake.database, intake.job(version_id).id, JobState.FAILED)
    version = intake.version(version_id)
    assert version.state is DatasetState.REJECTED and version.error is not None
    assert version.error["code"] == "stalled"
    until(intake.has_nothing_but)  # its files go once that is written


def test_an_ingest_tells_how_far_it_is(intake: IngestCase, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = SimpleNamespace(monotonic=count().__next__)  # one passes between any two looks at this clock
    monkeypatch.setattr(ingest, "time", seconds)
    with held_at_the_slow_image() as is_there:
        files = {"loose.png": b""} | sample.coloured(per_class=2, classes=2) | {"green/slow.jpg": slow_jpeg(1)}
        version_id, _ = begin(intake, files)
        assert is_there.wait(120)
        # The layout, and two messages for each of four images.
        expected = {"stage": "reading", "fraction": 5 / 6, "eta_s": pytest.approx(9 / 5)}
        assert intake.version(version_id).progress == expected
    settled(intake.database, intake.job(version_id).id, JobState.SUCCEEDED)
    assert intake.version(version_id).progress is None


# --- deletion --------------------------------------------------------------------------------------------------------


@EACH_STORE_SLOWLY
def test_a_deleted_set_is_purged_but_for_what_another_names(anywhere: IngestCase) -> None:
    shared, mine = sample.coloured(per_class=2, classes=2), {"blue/mine.png": sample.png(77)}
    kept = anywhere.take_in(shared, "kept")
    gone = anywhere.take_in(shared | mine, "gone")
    anywhere.take_in({"green/more.png": sample.png(78)}, "gone")
    anywhere.delete("gone")
    assert anywhere.loop().work()
    assert anywhere.has_nothing_but(kept)
    assert not is_stored(anywhere, mine["blue/mine.png"]) and anywhere.version(gone.id).manifest_sha256 is None
    anywhere.delete("kept")
    assert anywhere.loop().work()
    assert anywhere.has_nothing_but()


@EACH_STORE_SLOWLY
def test_a_set_that_is_deleted_before_its_ingest_leaves_nothing(intake: IngestCase) -> None:
    version_id = intake.upload(sample.zipped(sample.coloured(2)))
    intake.delete()
    assert intake.loop().work()
    assert intake.version(version_id).state is DatasetState.REJECTED
    assert intake.job(version_id).state is JobState.CANCELLED
    assert intake.has_nothing_but()
    assert intake.loop().work() is False


def test_a_set_that_is_deleted_during_its_ingest_leaves_nothing(anywhere: IngestCase, begin: Begin) -> None:
    version_id, _ = begin(anywhere, slow_set(scans=20_000))
    purge = anywhere.delete()
    settled(anywhere.database, anywhere.job(version_id).id, JobState.CANCELLED)
    assert anywhere.version(version_id).state is DatasetState.REJECTED
    assert anywhere.loop().work()
    assert look(anywhere.database, purge).state is JobState.SUCCEEDED
    assert anywhere.has_nothing_but()


def test_a_purge_waits_for_an_ingest_that_is_under_way(intake: IngestCase, begin: Begin) -> None:
    with held_at_the_slow_image() as is_there:
        version_id, _ = begin(intake, slow_set(scans=20_000))
        assert is_there.wait(120)
        purge = intake.delete()
        assert intake.loop().work()  # another worker is quicker than the ingest can be cancelled
        waiting = look(intake.database, purge)
        assert (waiting.state, waiting.attempt) == (JobState.QUEUED, 1) and waiting.next_attempt_at is not None
    settled(intake.database, intake.job(version_id).id, JobState.CANCELLED)
    make_due(intake.database, purge)
    assert intake.loop().work()
    assert look(intake.database, purge).state is JobState.SUCCEEDED
    assert intake.has_nothing_but()


def test_a_file_that_a_purge_takes_while_an_ingest_reads_it_is_stored_again(anywhere: IngestCase, begin: Begin) -> None:
    shared = sample.coloured(per_class=2, classes=2)
    anywhere.take_in(shared, "gone")
    files = shared | {"green/new.png": sample.png(5), "green/slow.jpg": slow_jpeg(100)}
    with held_at_the_slow_image() as is_there:
        version_id, _ = begin(anywhere, files, "staying")
        assert is_there.wait(120)
        purge = anywhere.delete("gone")
        assert anywhere.loop().work()  # nothing names the shared files yet
        assert look(anywhere.database, purge).state is JobState.SUCCEEDED
        assert not is_stored(anywhere, shared["blue/0.png"])
    settled(anywhere.database, anywhere.job(version_id).id, JobState.SUCCEEDED)
    version = anywhere.version(version_id)
    assert (version.state, version.images) == (DatasetState.READY, 6)
    until(lambda: anywhere.has_nothing_but(version))  # its archive goes once that is written


def test_a_file_that_a_purge_takes_before_a_row_names_it_is_stored_again(sqlite: Database, tmp_path: Path) -> None:
    taken = digest_of(sample.coloured(per_class=2)["blue/0.png"])

    class Robbed(Store):
        """A store from which somebody takes a file just after its import, once."""

        def import_files(self, lent: Store, digests: Iterable[Digest]) -> Iterator[Digest]:
            yield from super().import_files(lent, digests)
            if not (self.root / "robbed").exists():
                (self.root / "robbed").touch()
                self.delete(taken)

    intake = IngestCase(sqlite, Robbed(tmp_path / "store"))
    version_id = intake.upload(sample.zipped(sample.coloured(per_class=2)))
    loop = intake.loop()
    assert loop.work()
    assert intake.version(version_id).state is DatasetState.UPLOADED
    make_due(sqlite, intake.job(version_id).id)
    assert loop.work()
    assert intake.version(version_id).state is DatasetState.READY
    assert intake.has_nothing_but(intake.version(version_id))


@EACH_STORE_SLOWLY
def test_a_manifest_that_a_purge_took_just_before_the_end_is_stored_again(anywhere: IngestCase) -> None:
    files = sample.coloured(per_class=2, classes=2)
    anywhere.take_in(files, "gone")
    version_id = anywhere.upload(sample.zipped(files), "staying")
    with claimed_work(anywhere.database) as work:
        complete = Ingest(anywhere.store, LIMITS).run(work)
        purge = anywhere.delete("gone")
        assert anywhere.loop().work()
        assert look(anywhere.database, purge).state is JobState.SUCCEEDED
        with anywhere.database.writing() as session:
            complete(session)
            jobs.finish(session, work.lease, JobState.SUCCEEDED)
        work.tidy()
    version = anywhere.version(version_id)
    assert len(anywhere.manifest(version)) == 4
    assert anywhere.has_nothing_but(version)


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_an_image_that_another_set_is_just_naming_is_not_purged(anywhere: IngestCase) -> None:
    shared = sample.coloured(per_class=2, classes=2)
    anywhere.take_in(shared, "gone")
    purge = anywhere.delete("gone")
    with ThreadPoolExecutor(1) as pool, anywhere.database.writing() as session:
        version = records.waiting_version(session, "staying")
        datasets.start_ingest(session, version.id)
        lock_files(session)
        image = records.accepted("1.png")
        datasets.add_images(
            session,
            PRINCIPAL.project_id,
            version.id,
            [replace(image, row=replace(image.row, sha256=digest_of(shared["blue/0.png"])))],
        )
        purged = pool.submit(anywhere.loop().work)
        with pytest.raises(TimeoutError):
            purged.result(timeout=0.5)
        session.commit()
        assert purged.result(timeout=120)
    assert look(anywhere.database, purge).state is JobState.SUCCEEDED
    assert is_stored(anywhere, shared["blue/0.png"]) and not is_stored(anywhere, shared["blue/1.png"])
    assert anywhere.counts() == (1, 1)
