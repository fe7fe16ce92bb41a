"""Takes an uploaded archive in: the worker's side. The archive itself is only opened in a child process."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from artifacts import manifest
from artifacts.archive import ArchiveLimits
from artifacts.images import ImageLimits
from artifacts.layout import Split, check_class_names
from artifacts.manifest import Row, group_rows, splits_of
from artifacts.store import Digest, Store
from errors import DatasetRefused, EspalierError, Refused, Unavailable
from models import dataset as datasets
from models import job as jobs
from models import view as views
from models.dataset import DatasetState, DatasetVersion, IngestedImage
from models.file_references import delete_unreferenced_after_commit, lock_files, try_delete_unreferenced
from models.job import Job, JobKind, Queue
from recipes.defaults import ClassCount
from recipes.recipe import Task
from worker.child_process import Child, ChildDied, messages
from worker.lease import Complete, Handler, Reason, Stopped, Work
from worker.messages import ChildMessage, ImageAccepted, ImageBegun, ImageRejected, IngestOrder, LayoutFound

T = TypeVar("T")

BAD_FILES = 50
BAD_SHARE = 0.05
_ROWS_PER_WRITE = 200
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class IngestLimits:
    """What a data set may be at most, and what reading one may take."""

    archive: ArchiveLimits
    image: ImageLimits
    classes: int
    decode_cpu_s: int
    memory_bytes: int


@dataclass
class _Intake:
    """What has been read of an archive so far; `stored` are the files that this may have put into the store."""

    task: Task | None = None
    samples: int = 0
    ignored: int = 0
    accepted: list[IngestedImage] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    stored: set[Digest] = field(default_factory=set)
    files: int = 0
    reading: str | None = None

    @property
    def done(self) -> list[str]:
        """The paths that need not be read again."""
        return [image.row.path for image in self.accepted] + [file.path for file in self.refused]


@dataclass(frozen=True)
class _Parent:
    """The version that new images are added to."""

    version_id: str
    task: Task
    rows: list[Row]


class Ingest(Handler):
    """The job that makes an uploaded version ready, or rejects it."""

    def __init__(self, store: Store, limits: IngestLimits) -> None:
        self._store = store
        self._limits = limits

    def run(self, work: Work) -> Complete:
        """Read the archive and return what makes the version ready or rejected."""
        version = work.write(lambda session: datasets.start_ingest(session, work.subject_id))
        assert version.archive_sha256 is not None
        archive = Digest(version.archive_sha256)
        drop_images(work, self._store, [version.id])  # which an interrupted attempt left
        intake = _Intake()
        try:
            with self._store.lend_store(archive) as lent:
                self._read(work, lent, archive, intake)
                parent = self._parent(work, version.parent_id)
                new = _merge(intake, parent)
                rows = (parent.rows if parent else []) + [image.row for image in new]
                self._check(intake, rows)
                self._write(work, lent, parent, new)
        except EspalierError as error:
            if not (error.is_transient or error.is_parked):
                return self._rejection(work, intake, error)
            self._forget(work, intake)
            raise
        except Stopped as stopped:
            if stopped.reason in (Reason.CANCELLED, Reason.STALLED):  # nobody will read these files once more
                self._forget(work, intake)
            raise
        return self._readiness(work, intake, _task(intake, parent, rows), rows)

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        datasets.requeue_ingest(session, job.subject_id)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        datasets.mark_rejected(session, job.subject_id, error.record())
        delete_unreferenced_after_commit(session, self._store, datasets.drop_archive(session, job.subject_id))
        # For the images that its attempts wrote: too many for the one transaction that this is.
        jobs.add_job(session, job.project_id, JobKind.PURGE, Queue.INGEST, job.subject_id)

    def cancelled(self, session: Session, job: Job) -> None:
        error = DatasetRefused("The data set was deleted while it was being taken in.")
        # The purge that waits for this drops its archive.
        datasets.mark_rejected(session, job.subject_id, error.record())

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, work: Work, lent: Store, archive: Digest, intake: _Intake) -> None:
        """Read the whole archive, in as many child processes as images kill; they know the store that is lent."""
        deaths = 0
        while True:
            try:
                with Child(self._order(lent, archive, intake)) as child:
                    try:
                        self._listen(work, child, intake)
                    except Stopped:
                        for message in child.stop():
                            _take_in(intake, message)
                        raise
                return
            except ChildDied as death:
                deaths += 1
                if intake.reading is None or deaths > BAD_FILES:
                    raise death.as_failure() from death
                intake.refused.append(Refused(intake.reading, f"it breaks the decoder: {death.detail}"))
                intake.reading = None

    def _order(self, lent: Store, archive: Digest, intake: _Intake) -> IngestOrder:
        return IngestOrder(
            store=str(lent.root),
            archive=archive,
            archive_limits=self._limits.archive,
            image_limits=self._limits.image,
            decode_cpu_s=self._limits.decode_cpu_s,
            memory_bytes=self._limits.memory_bytes,
            done=tuple(intake.done),
        )

    def _listen(self, work: Work, child: Child, intake: _Intake) -> None:
        progress = _ProgressReporter(work, "reading", len(intake.done))
        for message in messages(child, work):
            _take_in(intake, message)
            progress.report(len(intake.done), intake.samples)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _check(self, intake: _Intake, rows: Sequence[Row]) -> None:
        """See that the files make a data set. Raises DatasetRefused or LayoutUnknown."""
        refused = len(intake.refused)
        allowed = max(BAD_FILES, int(BAD_SHARE * intake.files))
        if refused > allowed:
            raise DatasetRefused(
                f"{refused:,} of the {intake.files:,} files cannot be used; the limit is {allowed:,}. 'refused' lists "
                "them with reasons. Remove or repair them, then upload the archive again."
            )
        if not rows:
            raise DatasetRefused("No file of the archive is an image that can be used; 'refused' says why.")
        names = {label for row in rows for label in row.labels}
        if intake.task is Task.REGRESSION:
            return
        if not 2 <= len(names) <= self._limits.classes:
            only = f", {next(iter(names))!r}" if len(names) == 1 else ""
            raise DatasetRefused(
                f"Expected 2 to {self._limits.classes:,} classes with images that can be used. "
                f"Received {len(names)}{only}."
            )
        check_class_names(names)

    # --- writing ---------------------------------------------------------------------------------------------------

    def _parent(self, work: Work, parent_id: str | None) -> _Parent | None:
        if parent_id is None:
            return None
        with work.database.reading() as session:
            version = session.get_one(DatasetVersion, parent_id)
        assert version.manifest_sha256 is not None and version.task is not None
        rows = manifest.load(self._store.read(Digest(version.manifest_sha256)))
        return _Parent(parent_id, version.task, rows)

    def _write(self, work: Work, lent: Store, parent: _Parent | None, new: Sequence[IngestedImage]) -> None:
        """Keep the files and write the version's rows in pieces, so that nobody waits long for the database."""
        version_id = work.subject_id
        after: str | None = "" if parent is not None else None
        while parent is not None and after is not None:
            copy = partial(datasets.copy_memberships, to_version=version_id, after_path=after, limit=_ROWS_PER_WRITE)
            after = work.write(partial(copy, from_version=parent.version_id))
        progress = _ProgressReporter(work, "storing")
        for start, piece in _pieces(new):
            for done, _ in enumerate(self._store.import_files(lent, [image.row.sha256 for image in piece]), start):
                work.moved()
                progress.report(done, len(new))
            work.write(partial(_add_images, project_id=work.job.project_id, version_id=version_id, images=piece))
        for _, piece in _pieces(new):
            if any(self._store.missing(image.row.sha256 for image in piece)):
                raise Unavailable(
                    "A file was removed with another data set just when this one took it over; once more."
                )
            work.moved()

    def _readiness(self, work: Work, intake: _Intake, task: Task, rows: Sequence[Row]) -> Complete:
        lines = manifest.dump(rows)
        digest = self._store.put(lines)

        def complete(session: Session) -> None:
            lock_files(session)
            if not self._store.has(digest):  # a deleted data set was the same, and its purge took the file
                self._store.put(lines)
            datasets.mark_ready(
                session,
                work.subject_id,
                manifest=digest,
                task=task,
                images=len(rows),
                duplicates=len(rows) - len({row.sha256 for row in rows}),
                ignored=intake.ignored,
                classes=_class_counts(rows),
                target=_target(rows) if task is Task.REGRESSION else None,
                refused=sorted(intake.refused, key=lambda file: file.path),
            )

        kept = {row.sha256 for row in rows}
        work.afterwards(partial(self._forget, work, intake, kept))
        work.afterwards(partial(self._forget_archive, work))
        return complete

    def _rejection(self, work: Work, intake: _Intake, error: EspalierError) -> Complete:
        drop_images(work, self._store, [work.subject_id])
        self._forget(work, intake)

        def complete(session: Session) -> None:
            refused = sorted(intake.refused, key=lambda file: file.path)
            datasets.mark_rejected(session, work.subject_id, error.record(), refused, intake.ignored)

        work.afterwards(partial(self._forget_archive, work))
        return complete

    def _forget_archive(self, work: Work) -> None:
        """Remove the archive, once no further attempt can need it: a file that is gone cannot be rolled back."""
        with work.database.writing() as session:
            try_delete_unreferenced(session, self._store, datasets.drop_archive(session, work.subject_id))

    def _forget(self, work: Work, intake: _Intake, kept: Collection[Digest] = ()) -> None:
        """Remove what the intake stored and nothing names; needs no lease, as it only removes that."""
        for _, files in _pieces(sorted(intake.stored.difference(kept))):
            with work.database.writing() as session:
                is_removed = try_delete_unreferenced(session, self._store, files)
            work.moved()
            if not is_removed:
                return


class Purge(Handler):
    """The job that drops what a deleted data set held, or a version that was given up."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def run(self, work: Work) -> Complete:
        """Drop the images with what shows them, then the manifests, once no ingest is under way or about to be."""
        with work.database.reading() as session:
            given_up = session.get(DatasetVersion, work.subject_id)
            versions = datasets.get_versions(session, work.subject_id) if given_up is None else [given_up]
        if any(version.state not in (DatasetState.READY, DatasetState.REJECTED) for version in versions):
            raise Unavailable("An ingest of the deleted data set has not ended yet.")
        drop_images(work, self._store, [version.id for version in versions])
        while work.write(lambda session: self._drop_pictures(session, [version.id for version in versions])):
            pass

        def complete(session: Session) -> None:
            try_delete_unreferenced(session, self._store, datasets.drop_files(session, work.subject_id))

        return complete

    def _drop_pictures(self, session: Session, version_ids: Sequence[str]) -> bool:
        """Remove some of the pictures that were made of the images; return whether there were any."""
        dropped, files = views.drop_pictures(session, version_ids, limit=_ROWS_PER_WRITE)
        try_delete_unreferenced(session, self._store, files)
        return dropped > 0


def drop_images(work: Work, store: Store, version_ids: Sequence[str]) -> None:
    """Remove the images of versions from the database and, where no other row names them, from the store."""

    def change(session: Session) -> bool:
        lock_files(session)  # first: an image that another data set is just naming must not look like an orphan
        dropped, orphans = datasets.drop_memberships(session, version_ids, limit=_ROWS_PER_WRITE)
        try_delete_unreferenced(session, store, orphans)
        return dropped > 0

    while work.write(change):
        pass


class _ProgressReporter:
    """Writes how far the intake of a version is, once a second; `done` files were read before it began."""

    def __init__(self, work: Work, stage: str, done: int = 0) -> None:
        self._work = work
        self._stage = stage
        self._before = done
        self._started = self._at = time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Write that so many of all files are done, if it is time. Raises Stopped if the work must end."""
        self._work.check()
        now = time.monotonic()
        if now - self._at < _PROGRESS_EVERY_S or not total:
            return
        self._at = now
        files_per_s = (done - self._before) / (now - self._started)
        eta_s = (total - done) / files_per_s if files_per_s else None
        progress = {"stage": self._stage, "fraction": done / total, "eta_s": eta_s}
        self._work.write(partial(datasets.set_progress, version_id=self._work.subject_id, progress=progress))


def _pieces(things: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield the things that may be written together, with the place of the first among all."""
    for start in range(0, len(things), _ROWS_PER_WRITE):
        yield start, things[start : start + _ROWS_PER_WRITE]


def _add_images(session: Session, project_id: str, version_id: str, images: Sequence[IngestedImage]) -> None:
    lock_files(session)
    datasets.add_images(session, project_id, version_id, images)


def _take_in(intake: _Intake, message: ChildMessage) -> None:
    match message:
        case LayoutFound() if intake.task is None:
            intake.task = message.task
            intake.samples = message.samples
            intake.ignored = message.ignored
            intake.refused += message.refused
            intake.files = intake.samples + len(intake.refused)
        case ImageBegun():
            intake.reading = message.path
            if message.sha256 is not None:
                intake.stored.add(message.sha256)
        case ImageRejected():
            intake.refused.append(Refused(message.path, message.reason))
            intake.reading = None
        case ImageAccepted():
            row = Row(message.path, message.sha256, message.labels, message.target, message.group, message.split)
            intake.accepted.append(IngestedImage(row, message.facts, message.size_bytes))
            intake.reading = None


def _merge(intake: _Intake, parent: _Parent | None) -> list[IngestedImage]:
    """Return the images that are new, after refusing those that contradict each other or the version before.

    Raises DatasetRefused if the two do not say the same kind of thing about their images.
    """
    old = {row.path: row for row in parent.rows} if parent else {}
    if parent and (parent.task is Task.REGRESSION) != (intake.task is Task.REGRESSION):
        raise DatasetRefused(
            f"Expected images for {parent.task.value}, as in the version before. Received images for "
            f"{intake.task.value if intake.task else 'nothing'}."
        )
    said: dict[Digest, set[str]] = defaultdict(set)
    for row in (*old.values(), *(image.row for image in intake.accepted)):
        said[row.sha256].add(_said_of(row))
    new = []
    for image in intake.accepted:
        row, before = image.row, old.get(image.row.path)
        if len(said[row.sha256]) > 1:
            both = " and ".join(sorted(said[row.sha256]))
            intake.refused.append(Refused(row.path, f"the same file stands under two labels: {both}"))
        elif before is not None and before.sha256 != row.sha256:
            intake.refused.append(Refused(row.path, "another image has this path in the version before"))
        elif before is None:
            new.append(image)
    return new


def _said_of(row: Row) -> str:
    return "|".join(row.labels) if row.target is None else repr(row.target)


def _task(intake: _Intake, parent: _Parent | None, rows: Sequence[Row]) -> Task:
    tasks = {intake.task, parent.task if parent else None}
    if Task.REGRESSION in tasks:
        return Task.REGRESSION
    if Task.MULTILABEL in tasks:
        return Task.MULTILABEL
    return Task.BINARY if len({label for row in rows for label in row.labels}) == 2 else Task.MULTICLASS


def _target(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what is known of a regression's numbers, and how many groups of images can be folded."""
    targets = [row.target for row in rows if row.target is not None]
    groups = group_rows(rows)
    split = splits_of(rows, groups)
    foldable = {group for group, part in zip(groups, split, strict=True) if part is Split.TRAIN}
    mean = sum(targets) / len(targets)
    return {"min": min(targets), "max": max(targets), "mean": mean, "groups": len(foldable)}


def _class_counts(rows: Sequence[Row]) -> list[ClassCount]:
    """Count images and foldable groups of each class; sorted names are the order of the outputs from here on."""
    groups = group_rows(rows)
    split = splits_of(rows, groups)
    images: Counter[str] = Counter()
    foldable: dict[str, set[int]] = defaultdict(set)
    for row, group, part in zip(rows, groups, split, strict=True):
        images.update(row.labels)
        if part is Split.TRAIN:
            for label in row.labels:
                foldable[label].add(group)
    return [ClassCount(label, images[label], len(foldable[label])) for label in sorted(images)]
