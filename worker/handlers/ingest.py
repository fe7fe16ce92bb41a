"""Handles the jobs `ingest` and `purge`: turns an uploaded archive into a data set version, and deletes data sets.

Only a child process (`worker.child.ingest`) opens the archive and decodes images.
"""

from __future__ import annotations

import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from artifacts import manifest
from artifacts.archive import ArchiveLimits
from artifacts.bit_depths import FULL_DEPTH
from artifacts.images import ImageLimits
from artifacts.layout import Split, check_class_names
from artifacts.manifest import Row, group_rows, splits_of
from artifacts.store import Digest, Store
from errors import DatasetRefused, EspalierError, ImageRefused, Refused, Unavailable
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

DEATHS = 50
"""How many images of an archive may kill the process that decodes them."""
_REASONS_SHOWN = 3
_NAMES_SHOWN = 5
_ROWS_PER_WRITE = 200
_NAME_BYTES, _PATH_BYTES = ArchiveLimits().part_bytes, ArchiveLimits().path_bytes
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class IngestLimits:
    """Limits on a data set, and on the time and memory that reading one may use.

    Attributes:
        classes: the largest number of classes.
        decode_cpu_s: the most processor seconds for one image.
        memory_bytes: the most memory for the child process.
        refused_share: the largest share of files that may be refused, from 0 to 1.
    """

    archive: ArchiveLimits
    image: ImageLimits
    classes: int
    decode_cpu_s: int
    memory_bytes: int
    refused_share: float = 0.2


@dataclass
class _Intake:
    """The result of reading an archive, as far as it has been read.

    Attributes:
        ignored: number of files that are neither images nor labels.
        stored: digests of image files that were copied from the lent store into the store.
        files: number of images and of files that were refused before any image was read.
        classes: number of images of each class in the archive.
        warnings: what the owner of the images should know.
        reading: path of the image that the child is decoding, or None.
    """

    task: Task | None = None
    ignored: int = 0
    accepted: list[IngestedImage] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    stored: set[Digest] = field(default_factory=set)
    files: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reading: str | None = None

    @property
    def done(self) -> int:
        """Number of files that have been read or refused."""
        return len(self.accepted) + len(self.refused)

    def done_paths(self) -> tuple[str, ...]:
        """Return the paths that have been read, which a new child process can skip."""
        return (*(image.row.path for image in self.accepted), *(file.path for file in self.refused))


@dataclass(frozen=True)
class _Parent:
    """The earlier version of the data set, to which an upload adds images."""

    version_id: str
    task: Task
    rows: list[Row]
    bit_depth: int | None


class Ingest(Handler):
    """Reads the archive of a new data set version, and makes the version ready or rejects it."""

    def __init__(self, store: Store, limits: IngestLimits) -> None:
        self._store = store
        self._limits = limits

    def run(self, work: Work) -> Complete:
        """Read the archive; return the function that makes the version ready or rejects it."""
        version = work.write(lambda session: datasets.start_ingest(session, work.subject_id))
        assert version.archive_sha256 is not None
        archive = Digest(version.archive_sha256)
        drop_images(work, self._store, [version.id])  # rows that an interrupted attempt left
        intake = _Intake()
        try:
            with self._store.lend_store(archive) as lent:
                self._read(work, lent, archive, version.code_page, intake)
                parent = self._parent(work, version.parent_id)
                new = _merge(intake, parent)
                rows = (parent.rows if parent else []) + [image.row for image in new]
                self._check(intake, parent, new, rows, allow_refused=version.allow_refused)
                self._write(work, lent, parent, new, intake)
        except EspalierError as error:
            if not (error.is_transient or error.is_parked):
                return self._rejection(work, version, intake, error)
            self._forget(work, intake)
            raise
        except Stopped as stopped:
            if stopped.reason in (Reason.CANCELLED, Reason.STALLED):  # no further attempt will need these files
                self._forget(work, intake)
            raise
        return self._readiness(work, intake, _task(intake, parent, rows), rows, _bit_depth(parent, new))

    def requeued(self, session: Session, job: Job, error: EspalierError | None) -> None:
        datasets.requeue_ingest(session, job.subject_id)

    def failed(self, session: Session, job: Job, error: EspalierError) -> None:
        datasets.mark_rejected(session, job.subject_id, error.record())
        delete_unreferenced_after_commit(session, self._store, datasets.drop_archive(session, job.subject_id))
        # The images of the attempts are deleted by a job of their own: there may be too many for this transaction.
        jobs.add_job(session, job.project_id, JobKind.PURGE, Queue.INGEST, job.subject_id)

    def cancelled(self, session: Session, job: Job) -> None:
        error = DatasetRefused("The data set was deleted while its archive was being read.")
        # The archive is deleted by the purge job, which waits for the end of this ingest.
        datasets.mark_rejected(session, job.subject_id, error.record())

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, work: Work, lent: Store, archive: Digest, code_page: str | None, intake: _Intake) -> None:
        """Read the whole archive. When an image kills the child process, refuse the image and start another child.

        The children read and write only `lent`, a temporary store with the archive.
        """
        deaths = 0
        while True:
            try:
                with Child(self._order(lent, archive, code_page, intake)) as child:
                    try:
                        self._listen(work, child, intake)
                    except Stopped:
                        for message in child.stop():
                            _take_in(intake, message)
                        raise
                return
            except ChildDied as death:
                deaths += 1
                if intake.reading is None or deaths > DEATHS:
                    raise death.as_failure() from death
                intake.refused.append(Refused(intake.reading, f"the decoder crashed on it: {death.detail}"))
                intake.reading = None

    def _order(self, lent: Store, archive: Digest, code_page: str | None, intake: _Intake) -> IngestOrder:
        return IngestOrder(
            store=str(lent.root),
            archive=archive,
            code_page=code_page,
            archive_limits=self._limits.archive,
            image_limits=self._limits.image,
            decode_cpu_s=self._limits.decode_cpu_s,
            memory_bytes=self._limits.memory_bytes,
            done=intake.done_paths(),
        )

    def _listen(self, work: Work, child: Child, intake: _Intake) -> None:
        progress = _ProgressReporter(work, "reading", intake.done)
        for message in messages(child, work):
            _take_in(intake, message)
            progress.report(intake.done, intake.files)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _check(
        self,
        intake: _Intake,
        parent: _Parent | None,
        new: Sequence[IngestedImage],
        rows: Sequence[Row],
        *,
        allow_refused: bool,
    ) -> None:
        """Check that the images and labels make up a valid data set, and add warnings.

        Raises DatasetRefused or LayoutUnknown.
        """
        refused = len(intake.refused)
        reasons = _reasons(intake.refused)
        if not rows:
            raise DatasetRefused(f"The archive has no usable image among {intake.files:,} files: {reasons}.")
        if parent is not None and not new:
            present = intake.files - refused
            raise DatasetRefused(
                f"Expected images to add to the earlier version. Received none: {present} are in it already, and "
                f"{refused} were refused{f' ({reasons})' if refused else ''}."
            )
        names = {label for row in rows for label in row.labels}
        vanished = sorted(set(intake.classes) - names)
        if not allow_refused:
            self._check_refused(intake, reasons, vanished)
        if refused:
            intake.warnings.append(
                f"{refused} of {intake.files} files were refused and are not in the data set ({reasons}); 'refused' "
                "lists them."
            )
        intake.warnings += [
            f"No image of class {name!r} could be used; the data set does not have it." for name in vanished
        ]
        intake.warnings += self._losses(intake)
        intake.warnings += _remarks(parent, new)
        if intake.task is Task.REGRESSION:
            return
        if not 2 <= len(names) <= self._limits.classes:
            only = f", {next(iter(names))!r}" if len(names) == 1 else ""
            advice = " Put the images of each class into a folder of its own, or add a labels.csv." if only else ""
            raise DatasetRefused(
                f"A data set needs 2 to {self._limits.classes:,} classes with usable images. "
                f"Received {len(names)}{only}.{advice} {' '.join(intake.warnings)}".strip()
            )
        check_class_names(names)

    def _check_refused(self, intake: _Intake, reasons: str, vanished: Sequence[str]) -> None:
        """Check that not too many files were refused. Raises DatasetRefused."""
        refused = len(intake.refused)
        if refused > self._limits.refused_share * intake.files:
            raise DatasetRefused(
                f"{refused:,} of {intake.files:,} files cannot be used ({reasons}); at most "
                f"{self._limits.refused_share:.0%} may be unusable. The field 'refused' lists them with their reasons.",
                retry="allow_refused",
            )
        if vanished:
            raise DatasetRefused(
                f"Expected images of each class that can be used. Received none of {_listed(vanished)} ({reasons}).",
                retry="allow_refused",
            )

    def _losses(self, intake: _Intake) -> list[str]:
        """Return a warning for each class that lost more than the allowed share of its images, but not all."""
        refused = {file.path for file in intake.refused}
        usable = Counter(
            label for image in intake.accepted if image.row.path not in refused for label in image.row.labels
        )
        return [
            f"Class {name!r} lost {count - usable[name]} of its {count} images, which were refused."
            for name, count in sorted(intake.classes.items())
            if 0 < usable[name] < (1 - self._limits.refused_share) * count
        ]

    # --- writing ---------------------------------------------------------------------------------------------------

    def _parent(self, work: Work, parent_id: str | None) -> _Parent | None:
        if parent_id is None:
            return None
        with work.database.reading() as session:
            version = session.get_one(DatasetVersion, parent_id)
        assert version.manifest_sha256 is not None and version.task is not None
        rows = manifest.load(self._store.read(Digest(version.manifest_sha256)))
        return _Parent(parent_id, version.task, rows, version.bit_depth)

    def _write(
        self, work: Work, lent: Store, parent: _Parent | None, new: Sequence[IngestedImage], intake: _Intake
    ) -> None:
        """Copy the image files into the store, and write the rows of the version.

        Rows are written in many short transactions, so that no other process waits long for the database.
        """
        version_id = work.subject_id
        after: str | None = "" if parent is not None else None
        while parent is not None and after is not None:
            copy = partial(datasets.copy_memberships, to_version=version_id, after_path=after, limit=_ROWS_PER_WRITE)
            after = work.write(partial(copy, from_version=parent.version_id))
        progress = _ProgressReporter(work, "storing")
        for start, piece in _pieces(new):
            files = [image.row.sha256 for image in piece]
            intake.stored.update(files)
            for done, _ in enumerate(self._store.import_files(lent, files), start):
                work.report_progress()
                progress.report(done, len(new))
            work.write(partial(_add_images, project_id=work.job.project_id, version_id=version_id, images=piece))
        for _, piece in _pieces(new):
            if any(self._store.missing(image.row.sha256 for image in piece)):
                raise Unavailable(
                    "An image file of this data set was deleted together with another data set. The ingest is repeated."
                )
            work.report_progress()

    def _readiness(
        self, work: Work, intake: _Intake, task: Task, rows: Sequence[Row], bit_depth: int | None
    ) -> Complete:
        lines = manifest.dump(rows)
        digest = self._store.put(lines)

        def complete(session: Session) -> None:
            lock_files(session)
            if not self._store.has(digest):  # the purge of an identical data set has deleted the file meanwhile
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
                warnings=intake.warnings,
                bit_depth=bit_depth,
            )

        work.afterwards(partial(self._forget_archive, work))
        return complete

    def _rejection(self, work: Work, version: DatasetVersion, intake: _Intake, error: EspalierError) -> Complete:
        drop_images(work, self._store, [work.subject_id])
        self._forget(work, intake)
        record = error.record()
        choices = _choices(error)
        if choices:
            address = f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/ingest"
            others = f" (or {' or '.join(choices[1:])})" if choices[1:] else ""
            record["detail"] += (
                f" The archive is kept for a day, so that you need not upload it again. POST "
                f"{address}?{choices[0]}{others} ingests it."
            )

        def complete(session: Session) -> None:
            refused = sorted(intake.refused, key=lambda file: file.path)
            datasets.mark_rejected(
                session,
                work.subject_id,
                record,
                refused,
                intake.ignored,
                intake.warnings,
                keep_archive=bool(choices),
            )

        if not choices:
            work.afterwards(partial(self._forget_archive, work))
        return complete

    def _forget_archive(self, work: Work) -> None:
        """Delete the archive. Call this only after the end of the job is committed: then no attempt needs it."""
        with work.database.writing() as session:
            try_delete_unreferenced(session, self._store, datasets.drop_archive(session, work.subject_id))

    def _forget(self, work: Work, intake: _Intake) -> None:
        """Delete the image files of this attempt that no row names.

        This is safe even without the lease, because files that a row names stay.
        """
        for _, files in _pieces(sorted(intake.stored)):
            with work.database.writing() as session:
                is_removed = try_delete_unreferenced(session, self._store, files)
            work.report_progress()
            if not is_removed:
                return


class Purge(Handler):
    """Deletes the images and files of a deleted data set, or of a single version whose ingest failed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def run(self, work: Work) -> Complete:
        """Delete the images and the pictures made from them; return the function that deletes archives and manifests.

        Raises Unavailable, so that the job is tried again, while an ingest of the data set is running or queued.
        """
        with work.database.reading() as session:
            given_up = session.get(DatasetVersion, work.subject_id)
            versions = datasets.get_versions(session, work.subject_id) if given_up is None else [given_up]
        if any(version.state not in (DatasetState.READY, DatasetState.REJECTED) for version in versions):
            raise Unavailable("An ingest of the deleted data set has not ended yet; the purge waits for it.")
        drop_images(work, self._store, [version.id for version in versions])
        while work.write(lambda session: self._drop_pictures(session, [version.id for version in versions])):
            pass

        def complete(session: Session) -> None:
            try_delete_unreferenced(session, self._store, datasets.drop_files(session, work.subject_id))

        return complete

    def _drop_pictures(self, session: Session, version_ids: Sequence[str]) -> bool:
        """Delete a limited number of pictures that show these images; return False if none was left."""
        dropped, files = views.drop_pictures(session, version_ids, limit=_ROWS_PER_WRITE)
        try_delete_unreferenced(session, self._store, files)
        return dropped > 0


def drop_images(work: Work, store: Store, version_ids: Sequence[str]) -> None:
    """Delete the image rows of these versions, and the image files that no other row names."""

    def change(session: Session) -> bool:
        lock_files(session)  # first, because another data set may be about to name one of these images
        dropped, orphans = datasets.drop_memberships(session, version_ids, limit=_ROWS_PER_WRITE)
        try_delete_unreferenced(session, store, orphans)
        return dropped > 0

    while work.write(change):
        pass


class _ProgressReporter:
    """Writes the progress of an ingest to the database, at most once a second.

    `done` is the number of files that were already done when this reporter was made. The speed does not count them.
    """

    def __init__(self, work: Work, stage: str, done: int = 0) -> None:
        self._work = work
        self._stage = stage
        self._before = done
        self._started = self._at = time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Write that `done` of `total` files are done, unless the last write is less than a second old.

        Raises Stopped if the job must stop.
        """
        self._work.check()
        now = time.monotonic()
        if now - self._at < _PROGRESS_EVERY_S or not total:
            return
        self._at = now
        files_per_s = (done - self._before) / (now - self._started)
        eta_s = (total - done) / files_per_s if files_per_s else None
        progress = {"stage": self._stage, "fraction": done / total, "eta_s": eta_s}
        self._work.write(partial(datasets.set_progress, version_id=self._work.subject_id, progress=progress))


def _choices(error: EspalierError) -> list[str]:
    """Return the query parameters with which a rejected archive can be ingested after all; none for most errors."""
    if error.extra.get("retry") == "allow_refused":
        return ["allow_refused=true"]
    if error.extra.get("retry") == "names":
        return [f"names={page}" for page in error.extra.get("readings") or ["CODE_PAGE"]]
    return []


def _reasons(refused: Sequence[Refused]) -> str:
    """Return the most frequent reasons, each with a file and the number of others, for a message."""
    counts = Counter(file.reason for file in refused)
    paths = {file.reason: file.path for file in reversed(refused)}
    shown = [
        f"{paths[reason]!r}{f' and {count - 1:,} more' if count > 1 else ''}: {reason.rstrip('.')}"
        for reason, count in counts.most_common(_REASONS_SHOWN)
    ]
    return "; ".join(shown + ["…"] * (len(counts) > _REASONS_SHOWN))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + (" and others" if len(names) > _NAMES_SHOWN else "")


def _pieces(things: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield pieces that are small enough for one transaction, each with the index of its first item."""
    for start in range(0, len(things), _ROWS_PER_WRITE):
        yield start, things[start : start + _ROWS_PER_WRITE]


def _add_images(session: Session, project_id: str, version_id: str, images: Sequence[IngestedImage]) -> None:
    lock_files(session)
    datasets.add_images(session, project_id, version_id, images)


def _take_in(intake: _Intake, message: ChildMessage) -> None:
    match message:
        case LayoutFound() if intake.task is None:
            intake.task = message.task
            intake.ignored = message.ignored
            intake.classes = message.classes
            intake.warnings += message.warnings
            intake.refused += message.refused
            intake.files = message.samples + len(intake.refused)
        case ImageBegun():
            intake.reading = message.path
        case ImageRejected():
            intake.refused.append(Refused(message.path, message.reason))
            intake.reading = None
        case ImageAccepted():
            row = Row(message.path, message.sha256, message.labels, message.target, message.group, message.split)
            intake.accepted.append(IngestedImage(row, message.facts, message.size_bytes))
            intake.reading = None


def _merge(intake: _Intake, parent: _Parent | None) -> list[IngestedImage]:
    """Return the images of the upload that are new to the data set.

    Refuse an image that has two different labels. A new image whose path belongs to another image gets another name,
    because cameras number their images from the start again. Raises DatasetRefused if one version has numbers and the
    other has labels.
    """
    before = parent.rows if parent else []
    old = {_composed(row.path): row for row in before}
    if parent and (parent.task is Task.REGRESSION) != (intake.task is Task.REGRESSION):
        raise DatasetRefused(
            f"Expected images for {parent.task.value}, as in the earlier version. Received images for "
            f"{intake.task.value if intake.task else 'no task'}."
        )
    said: dict[Digest, set[str]] = defaultdict(set)
    _spell_as_before(intake, before)
    for row in (*before, *(image.row for image in intake.accepted)):
        said[row.sha256].add(_said_of(row))
    names = _Names(old, {image.row.path for image in intake.accepted})
    new = []
    for image in intake.accepted:
        row = image.row
        if len(said[row.sha256]) > 1:
            both = " and ".join(sorted(said[row.sha256]))
            intake.refused.append(Refused(row.path, f"this image appears more than once, with two labels: {both}"))
            continue
        try:
            path = names.free_name(row)
        except ImageRefused as error:
            intake.refused.append(Refused(row.path, error.detail))
            continue
        if path is not None:
            new.append(image if path == row.path else replace(image, row=replace(row, path=path)))
    if names.renamed:
        was, became = next(iter(names.renamed.items()))
        intake.warnings.append(
            f"{len(names.renamed)} images have the names of other images in the earlier version. They were added under "
            f"names of their own, such as {became!r} for {was!r}."
        )
    return new


def _bit_depth(parent: _Parent | None, new: Sequence[IngestedImage]) -> int | None:
    """Return the bit depth of a version: the largest of its images and of the earlier version; None if none has one."""
    depths = [image.facts.bit_depth for image in new] + [parent.bit_depth if parent else None]
    return max((depth for depth in depths if depth is not None), default=None)


def _remarks(parent: _Parent | None, new: Sequence[IngestedImage]) -> list[str]:
    """Return warnings about what the new images are, and how they are read."""
    found = []
    several = [image.row.path for image in new if image.facts.has_more]
    if several:
        found.append(
            f"{len(several)} files have several pictures (pages of a TIFF or frames of an animation), such as "
            f"{several[0]!r}. Only the first of each is used. To use the others, save each as a file of its own."
        )
    bit_depth, before = _bit_depth(parent, new), parent.bit_depth if parent else None
    of_new = _bit_depth(None, new)
    if before == FULL_DEPTH and of_new is not None and of_new < FULL_DEPTH:  # less than that may be dark images
        found.append(
            f"No value of the new 16-bit images is above {2**of_new - 1:,}. They are read as images of {before} bits, "
            f"as those of the earlier version, so images of a camera with {of_new} bits are darker than they should be."
        )
    elif before is not None and bit_depth != before:
        found.append(
            f"The new 16-bit images have values of {bit_depth} bits, those of the earlier version have {before}. In "
            f"this version, all of them are scaled from {bit_depth} bits, which makes the earlier ones darker. Models "
            "of the earlier version stay as they are."
        )
    elif bit_depth is not None and bit_depth != before and bit_depth < FULL_DEPTH:
        found.append(
            f"No value of the 16-bit images is above {2**bit_depth - 1:,}. They are read as images of {bit_depth} "
            "bits: this value becomes white, in predictions too."
        )
    return found


def _spell_as_before(intake: _Intake, old: Sequence[Row]) -> None:
    """Spell labels and groups of new images as earlier rows spell them.

    New ones are in NFC, but rows of older versions may be in NFD, as macOS writes names.
    """
    known = {text for row in old for text in (*row.labels, row.group) if text and not text.isascii()}
    before = {_composed(text): text for text in known if _composed(text) != text}
    if not before:
        return
    intake.classes = {before.get(name, name): count for name, count in intake.classes.items()}
    for index, image in enumerate(intake.accepted):
        labels = tuple(sorted(before.get(label, label) for label in image.row.labels))
        group = before.get(image.row.group or "", image.row.group)
        intake.accepted[index] = replace(image, row=replace(image.row, labels=labels, group=group))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class _Names:
    """The names of images, by their NFC form, and those that were given to new images because theirs were taken."""

    def __init__(self, old: Mapping[str, Row], new: Collection[str]) -> None:
        self.renamed: dict[str, str] = {}
        self._old = old
        self._taken = {*old, *new}

    def free_name(self, row: Row) -> str | None:
        """Return the path for a new image; None if the version before has this image under its name.

        Raises ImageRefused if its name is taken and a path with another one would be too long.
        """
        path = row.path
        number = 1
        while (before := self._old.get(path)) is not None or (path != row.path and path in self._taken):
            if before is not None and before.sha256 == row.sha256:
                return None
            number += 1
            path = _numbered(row.path, number)
        if path != row.path:
            self.renamed[row.path] = path
            self._taken.add(path)
        return path


def _numbered(path: str, number: int) -> str:
    """Return a path with a number after the stem of its name, which is cut if the path would be too long."""
    old, end = PurePosixPath(path), f" ({number})"
    most = min(_NAME_BYTES, _PATH_BYTES - len(path.encode()) + len(old.name.encode()))
    room = most - len(f"{end}{old.suffix}".encode())
    stem = old.stem.encode()[: max(room, 0)].decode(errors="ignore")
    if not stem:
        raise ImageRefused("Another image of the earlier version has this path. Rename the file or its folders.")
    return str(old.with_name(f"{stem}{end}{old.suffix}"))


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
    """Return the range and mean of the target numbers, and how many groups of images can be split into folds."""
    targets = [row.target for row in rows if row.target is not None]
    groups = group_rows(rows)
    split = splits_of(rows, groups)
    foldable = {group for group, part in zip(groups, split, strict=True) if part is Split.TRAIN}
    mean = sum(targets) / len(targets)
    return {"min": min(targets), "max": max(targets), "mean": mean, "groups": len(foldable)}


def _class_counts(rows: Sequence[Row]) -> list[ClassCount]:
    """Count, for each class, the images and the groups that can be split into folds.

    The result is sorted by class name. This order is also the order of the network's outputs.
    """
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
