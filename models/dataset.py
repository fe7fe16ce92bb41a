"""Data sets, their versions, and the images of each version. Reads no file.

A version never changes once it is ready. Adding images makes a new version, which contains the old images too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    ScalarSelect,
    String,
    UniqueConstraint,
    delete,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, defer, mapped_column

from artifacts.images import ImageFacts
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import Digest
from errors import NameTaken, NotFound, NotReady, Refused
from models import job as jobs
from models.base import Base, Json, new_id, now, text_enum
from models.job import JobKind, Queue
from models.paging import PageRequest, RowPage, fetch_page, fetch_records
from models.project import Principal, owner, scope
from recipes.defaults import ClassCount
from recipes.recipe import Task

REFUSED_SHOWN = 1000
ARCHIVE_KEPT = timedelta(days=1)
"""How long the archive of a version is kept that was rejected for its names or its refused files."""

_ALIVE = text("deleted_at IS NULL")


class DatasetState(StrEnum):
    """State of a data set version, from upload to ready or rejected."""

    UPLOADED = "uploaded"
    INGESTING = "ingesting"
    READY = "ready"
    REJECTED = "rejected"


class Dataset(Base):
    """A data set: a name and a series of versions.

    A deleted data set keeps its row, because runs refer to it, but another data set can take its name. A data set whose
    versions were all rejected is deleted when another one takes its name.
    """

    __tablename__ = "dataset"
    __table_args__ = (
        Index(
            "uq_dataset_project_id_name",
            "project_id",
            "name",
            unique=True,
            sqlite_where=_ALIVE,
            postgresql_where=_ALIVE,
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("ds"))
    project_id: Mapped[str] = owner()
    name: Mapped[str] = mapped_column(String(63))
    created_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]


class DatasetVersion(Base):
    """One state of a data set, which never changes. Counts, classes and manifest are set when its ingest ends.

    Attributes:
        warnings: what the owner of the images should know.
        bit_depth: number of bits from which 16-bit images are scaled: the smallest of 10, 12, 14 and 16 that holds
            their largest value. None without such images; 16 for versions that were ingested before this was recorded.
        code_page: the encoding of names in the archive that are not in UTF-8; None if it must be found out.
        allow_refused: whether the version becomes ready whatever share of its files is refused.
        archive_until: when the archive of a rejected version is removed. Until then another version can be made of it.
    """

    __tablename__ = "dataset_version"
    __table_args__ = (UniqueConstraint("dataset_id", "number"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: new_id("dsv"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"))
    number: Mapped[int]
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("dataset_version.id"))
    state: Mapped[DatasetState] = mapped_column(text_enum(DatasetState), default=DatasetState.UPLOADED)
    archive_sha256: Mapped[str | None] = mapped_column(String(64))
    manifest_sha256: Mapped[str | None] = mapped_column(String(64))
    task: Mapped[Task | None] = mapped_column(text_enum(Task))
    images: Mapped[int] = mapped_column(default=0)
    duplicates: Mapped[int] = mapped_column(default=0)
    ignored: Mapped[int] = mapped_column(default=0)
    classes: Mapped[list[Any]] = mapped_column(Json, default=list)
    target: Mapped[dict[str, Any] | None]
    refused: Mapped[list[Any]] = mapped_column(Json, default=list)
    refused_total: Mapped[int] = mapped_column(default=0)
    warnings: Mapped[list[Any]] = mapped_column(Json, default=list)
    bit_depth: Mapped[int | None]
    code_page: Mapped[str | None] = mapped_column(String(32))
    allow_refused: Mapped[bool] = mapped_column(default=False)
    archive_until: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    ready_at: Mapped[datetime | None]

    @property
    def class_counts(self) -> list[ClassCount]:
        """The classes in the order of their outputs."""
        return [ClassCount(**count) for count in self.classes]

    @property
    def groups(self) -> int:
        """Number of groups of a regression data set, for splitting into folds. Other tasks count groups per class."""
        return int((self.target or {}).get("groups", self.images))


class Image(Base):
    """One image file, identified by the digest of its content and shared by all versions that contain it.

    `width` and `height` are in pixels, after EXIF rotation.
    """

    __tablename__ = "image"
    __table_args__ = (UniqueConstraint("project_id", "sha256"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    project_id: Mapped[str] = owner()
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int]
    height: Mapped[int]
    format: Mapped[str] = mapped_column(String(16))


class Membership(Base):
    """One image of a data set version, with its label or target, group and split. `|` joins several labels."""

    __tablename__ = "membership"
    __table_args__ = (Index(None, "version_id", "label", "path"),)

    version_id: Mapped[str] = mapped_column(ForeignKey("dataset_version.id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(1024), primary_key=True)
    image_id: Mapped[int] = mapped_column(ForeignKey("image.id"), index=True)
    label: Mapped[str | None] = mapped_column(String(1024))
    target: Mapped[float | None]
    group: Mapped[str | None] = mapped_column(String(1024))
    split: Mapped[Split] = mapped_column(text_enum(Split))


@dataclass(frozen=True)
class IngestedImage:
    """An image that ingest accepted: its row in the manifest, its width, height and format, and its file size."""

    row: Row
    facts: ImageFacts
    size_bytes: int


# --- finding -------------------------------------------------------------------------------------------------------


def get_dataset(session: Session, principal: Principal, dataset_id: str, *, for_change: bool = False) -> Dataset:
    """Return a data set. Raises NotFound if it does not exist or was deleted.

    With `for_change`, its row is locked until the transaction ends. Then two transactions cannot add a version, start a
    run or delete the data set at the same time.
    """
    query = select(Dataset).where(
        Dataset.id == dataset_id, Dataset.deleted_at.is_(None), scope(Dataset.project_id, principal)
    )
    dataset = session.scalar(query.with_for_update() if for_change else query)
    if dataset is None:
        raise NotFound(f"No data set has the id {dataset_id!r}.")
    return dataset


def list_datasets(
    session: Session,
    principal: Principal,
    page: PageRequest,
    state: DatasetState | None = None,
    name: str | None = None,
) -> RowPage[Dataset]:
    """Return one page of the data sets that are not deleted, the newest first: all, or those of a state or a name.

    The state of a data set is that of its `current_version`.
    """
    query = select(Dataset).where(Dataset.deleted_at.is_(None), scope(Dataset.project_id, principal))
    if state is not None:
        query = query.where(_current_state() == state)
    if name is not None:
        query = query.where(Dataset.name == name)
    return fetch_records(session, query, Dataset.id, page)


def _current_state() -> ScalarSelect[DatasetState]:
    """Return the SQL expression for the state of a data set's `current_version`."""
    is_ready = DatasetVersion.state == DatasetState.READY
    query = select(DatasetVersion.state).where(DatasetVersion.dataset_id == Dataset.id)
    return query.order_by(is_ready.desc(), DatasetVersion.number.desc()).limit(1).correlate(Dataset).scalar_subquery()


def find_versions(session: Session, principal: Principal, dataset_id: str) -> Sequence[str]:
    """Return the ids of all versions of a data set, also of a deleted one; an empty list for an unknown id."""
    query = select(DatasetVersion.id).join(Dataset, Dataset.id == DatasetVersion.dataset_id)
    return session.scalars(query.where(Dataset.id == dataset_id, scope(Dataset.project_id, principal))).all()


def list_images(
    session: Session, version_id: str, label: str | None, page: PageRequest
) -> RowPage[tuple[Membership, Image]]:
    """Return one page of a version's images in the order of its manifest; with a `label`, only images with it.

    The label may be in any Unicode form, and so may the stored ones: only newer versions have all of them in NFC.
    """
    query = (
        select(Membership, Image)
        .join(Image, Image.id == Membership.image_id)
        .where(Membership.version_id == version_id)
    )
    if label:
        position = func.instr if session.get_bind().dialect.name == "sqlite" else func.strpos
        joined = literal("|") + Membership.label + literal("|")
        forms = {unicodedata.normalize(form, label) for form in ("NFC", "NFD")}
        query = query.where(
            or_(*(or_(Membership.label == form, position(joined, f"|{form}|") > 0) for form in sorted(forms)))
        )
    key = path_order(session)
    found = fetch_page(session, query, key, lambda row: str(row.Membership.path), page, ascending=True)
    return RowPage([(row.Membership, row.Image) for row in found.rows], found.next_after)


def find_image(session: Session, dataset_id: str, sha256: str) -> Digest | None:
    """Return the digest of an image if any version of the data set contains the image, else None."""
    query = (
        select(Image.sha256)
        .join(Membership, Membership.image_id == Image.id)
        .join(DatasetVersion, DatasetVersion.id == Membership.version_id)
        .where(DatasetVersion.dataset_id == dataset_id, Image.sha256 == sha256)
    )
    found = session.scalar(query.limit(1))
    return None if found is None else Digest(found)


def find_version_image(session: Session, version_id: str, sha256: str) -> Digest | None:
    """Return the digest of an image if the data set version contains the image, else None."""
    query = (
        select(Image.sha256)
        .join(Membership, Membership.image_id == Image.id)
        .where(Membership.version_id == version_id, Image.sha256 == sha256)
    )
    found = session.scalar(query.limit(1))
    return None if found is None else Digest(found)


def get_versions(session: Session, dataset_id: str, *, with_refused: bool = True) -> Sequence[DatasetVersion]:
    """Return every version of a data set, the newest first; optionally without the lists of refused files."""
    query = select(DatasetVersion).where(DatasetVersion.dataset_id == dataset_id)
    if not with_refused:
        query = query.options(defer(DatasetVersion.refused))
    return session.scalars(query.order_by(DatasetVersion.number.desc())).all()


def current_version(versions: Sequence[DatasetVersion]) -> DatasetVersion:
    """Return the newest version that is ready, or the newest version if none is ready."""
    return next((version for version in versions if version.state is DatasetState.READY), versions[0])


def path_order(session: Session) -> ColumnElement[str]:
    """Return the SQL expression that sorts memberships by path in the order of the manifest.

    The manifest is sorted by code points, as Python sorts. SQLite does so by default. PostgreSQL needs the collation
    "C", because by default it sorts by the rules of a language.
    """
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    return Membership.path.collate("C") if is_postgresql else Membership.path.expression


def ready_version(session: Session, dataset: Dataset, number: int | None) -> DatasetVersion:
    """Return the version that a run trains on: version `number`, or the newest ready version if it is None.

    Raises NotFound if there is no such version, NotReady if it is not ready.
    """
    versions = get_versions(session, dataset.id)
    matching = [version for version in versions if number in (None, version.number)]
    if not matching:
        raise NotFound(f"Data set {dataset.name!r} has no version {number}.")
    version = current_version(matching)
    if version.state is DatasetState.REJECTED:
        reason = (version.error or {}).get("detail", "")
        raise NotReady(f"Data set {dataset.name!r} was rejected and cannot be trained on: {reason}")
    if version.state is not DatasetState.READY:
        raise NotReady(f"Data set {dataset.name!r} is {version.state.value}. Wait until its state is ready.")
    return version


# --- changing ------------------------------------------------------------------------------------------------------


def check_name(session: Session, principal: Principal, name: str) -> None:
    """Check that a new data set can have this name. Raises NameTaken if another has it that was not rejected."""
    _find_rejected(session, principal, name)


def create_dataset(session: Session, principal: Principal, name: str) -> Dataset:
    """Add a data set without versions. A rejected data set with this name is deleted. Raises NameTaken."""
    rejected = _find_rejected(session, principal, name, for_change=True)
    if rejected is not None:
        delete_dataset(rejected)
        jobs.add_job(session, rejected.project_id, JobKind.PURGE, Queue.INGEST, rejected.id)
    dataset = Dataset(project_id=principal.project_id, name=name)
    try:
        with session.begin_nested():
            session.add(dataset)
    except IntegrityError:  # another request took the name after the check above
        check_name(session, principal, name)
        raise
    return dataset


def _find_rejected(session: Session, principal: Principal, name: str, *, for_change: bool = False) -> Dataset | None:
    """Return the data set that has a name, if all its versions were rejected; None if no data set has the name.

    With `for_change`, its row is locked until the transaction ends. Raises NameTaken if it has any other version.
    """
    query = select(Dataset).where(
        Dataset.name == name, Dataset.deleted_at.is_(None), scope(Dataset.project_id, principal)
    )
    dataset = session.scalar(query.with_for_update() if for_change else query)
    if dataset is None:
        return None
    versions = get_versions(session, dataset.id)
    if versions and all(version.state is DatasetState.REJECTED for version in versions):
        return dataset
    raise NameTaken(
        f"A data set named {name!r} exists ({dataset.id}). Add images to it with POST "
        f"/api/v1/datasets/{dataset.id}/versions, delete it, or choose another name.",
        dataset=dataset.id,
    )


def check_idle(session: Session, dataset: Dataset) -> None:
    """Check that no version of a data set is being ingested. Raises NotReady.

    A new version contains the images of the version before, so that version must be ready first.
    """
    waiting = (DatasetState.UPLOADED, DatasetState.INGESTING)
    if any(version.state in waiting for version in get_versions(session, dataset.id)):
        raise NotReady(f"Data set {dataset.name!r} is still ingesting other images. Wait until its state is ready.")


def add_version(
    session: Session, dataset: Dataset, archive: Digest, code_page: str | None = None, *, allow_refused: bool = False
) -> DatasetVersion:
    """Add a version for an uploaded archive that waits for ingest. Raises NotReady while another is being ingested."""
    check_idle(session, dataset)
    versions = get_versions(session, dataset.id)
    ready = [version for version in versions if version.state is DatasetState.READY]
    version = DatasetVersion(
        dataset_id=dataset.id,
        number=versions[0].number + 1 if versions else 1,
        parent_id=ready[0].id if ready else None,
        archive_sha256=archive,
        code_page=code_page,
        allow_refused=allow_refused,
    )
    session.add(version)
    session.flush()
    return version


def _keeps_archive(version: DatasetVersion) -> bool:
    """Say whether a rejected version still has its archive, so that a request can ingest it without a new upload."""
    is_kept = version.archive_until is not None and version.archive_until > now()
    return version.state is DatasetState.REJECTED and is_kept and version.archive_sha256 is not None


def add_version_again(
    session: Session, dataset: Dataset, number: int, code_page: str | None, *, allow_refused: bool
) -> DatasetVersion:
    """Add a version with the archive of a rejected one, which that one no longer references.

    Raises NotFound if there is no such version, and NotReady if its archive was dropped or was not the reason.
    """
    versions = get_versions(session, dataset.id)
    rejected = next((version for version in versions if version.number == number), None)
    if rejected is None:
        raise NotFound(f"Data set {dataset.name!r} has no version {number}.")
    kept = [version for version in versions if _keeps_archive(version)]
    if rejected not in kept or rejected.archive_sha256 is None:
        numbers = " and ".join(str(version.number) for version in kept)
        raise NotReady(
            f"The archive of version {number} of data set {dataset.name!r} is not kept: only one that was rejected for "
            "its names or its refused files is, for a day. "
            + (f"Version {numbers} of this data set still has its archive." if kept else "Upload it again.")
        )
    archive, rejected.archive_sha256 = Digest(rejected.archive_sha256), None
    return add_version(
        session,
        dataset,
        archive,
        code_page or rejected.code_page,
        allow_refused=allow_refused or rejected.allow_refused,
    )


def start_ingest(session: Session, version_id: str) -> DatasetVersion:
    """Mark a version as being ingested. The caller must delete images that an interrupted attempt has added."""
    version = session.get_one(DatasetVersion, version_id)
    if version.state not in (DatasetState.UPLOADED, DatasetState.INGESTING):
        raise RuntimeError(f"Version {version_id} is {version.state}, not waiting for ingest. This is a bug.")
    version.state = DatasetState.INGESTING
    version.progress = None
    return version


def requeue_ingest(session: Session, version_id: str) -> None:
    """Mark a version as waiting for ingest again, if its ingest was interrupted. Any other version stays unchanged."""
    session.execute(
        update(DatasetVersion)
        .where(DatasetVersion.id == version_id, DatasetVersion.state == DatasetState.INGESTING)
        .values(state=DatasetState.UPLOADED)
    )


def add_images(session: Session, project_id: str, version_id: str, accepted: Sequence[IngestedImage]) -> None:
    """Add accepted images to a version that is being ingested. Images that were added before stay unchanged."""
    if not accepted:
        return
    files = [
        {
            "project_id": project_id,
            "sha256": image.row.sha256,
            "size_bytes": image.size_bytes,
            "width": image.facts.width,
            "height": image.facts.height,
            "format": image.facts.format,
        }
        for image in {image.row.sha256: image for image in accepted}.values()
    ]
    _add_missing(session, Image, files)
    query = select(Image.sha256, Image.id).where(
        Image.project_id == project_id, Image.sha256.in_([file["sha256"] for file in files])
    )
    ids = dict(session.execute(query).all())
    _add_missing(
        session,
        Membership,
        [
            {
                "version_id": version_id,
                "path": image.row.path,
                "image_id": ids[image.row.sha256],
                "label": None if image.row.target is not None else "|".join(image.row.labels),
                "target": image.row.target,
                "group": image.row.group,
                "split": image.row.split,
            }
            for image in accepted
        ],
    )


def copy_memberships(session: Session, from_version: str, to_version: str, after_path: str, limit: int) -> str | None:
    """Copy images from one version to another, in the order of their paths; images already there stay unchanged.

    Copies at most `limit` images whose paths come after `after_path`. Returns the last copied path, to continue after
    it, or None if no image was left.
    """
    columns = [column for column in Membership.__table__.columns if column.name != "version_id"]
    query = (
        select(*columns)
        .where(Membership.version_id == from_version, Membership.path > after_path)
        .order_by(Membership.path)
        .limit(limit)
    )
    rows = session.execute(query).all()
    if not rows:
        return None
    _add_missing(session, Membership, [{**row._mapping, "version_id": to_version} for row in rows])
    return str(rows[-1].path)


def _add_missing(session: Session, record: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert the rows whose keys do not exist yet."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    session.execute(dialect.insert(record).on_conflict_do_nothing(), rows)


def mark_ready(
    session: Session,
    version_id: str,
    *,
    manifest: Digest,
    task: Task,
    images: int,
    duplicates: int,
    ignored: int,
    classes: Iterable[ClassCount],
    target: dict[str, Any] | None,
    refused: Sequence[Refused],
    warnings: Sequence[str] = (),
    bit_depth: int | None = None,
) -> None:
    """Mark an ingested version as ready. `drop_archive` may remove its archive after this transaction is committed."""
    version = session.get_one(DatasetVersion, version_id)
    version.state = DatasetState.READY
    version.manifest_sha256 = manifest
    version.task = task
    version.images = images
    version.duplicates = duplicates
    version.ignored = ignored
    version.classes = [vars(count) for count in classes]
    version.target = target
    version.warnings = list(warnings)
    version.bit_depth = bit_depth
    _set_refused(version, refused)
    version.progress = None
    version.ready_at = now()


def mark_rejected(
    session: Session,
    version_id: str,
    error: dict[str, Any],
    refused: Sequence[Refused] = (),
    ignored: int = 0,
    warnings: Sequence[str] = (),
    *,
    keep_archive: bool = False,
) -> None:
    """Mark a version as rejected and save the reason. As in `mark_ready`, it still references its archive.

    With `keep_archive` the archive is kept for a day.
    """
    version = session.get_one(DatasetVersion, version_id)
    version.state = DatasetState.REJECTED
    version.error = error
    version.ignored = ignored
    version.warnings = list(warnings)
    version.archive_until = now() + ARCHIVE_KEPT if keep_archive else None
    _set_refused(version, refused)
    version.progress = None


def cancel_ingest(session: Session, version_id: str) -> None:
    """Mark a waiting version as rejected because its data set was deleted. The purge job deletes its archive."""
    version = session.get_one(DatasetVersion, version_id)
    version.state = DatasetState.REJECTED


def delete_dataset(dataset: Dataset) -> None:
    """Mark a data set as deleted, so that another one can take its name. A purge job deletes the images later."""
    dataset.deleted_at = now()


def set_progress(session: Session, version_id: str, progress: dict[str, Any]) -> None:
    """Save the progress of a version's ingest."""
    session.get_one(DatasetVersion, version_id).progress = progress


def find_leftover_archives(session: Session) -> Sequence[str]:
    """Return the ids of ready or rejected versions whose archive can be removed.

    Such an archive has been kept long enough, or is left over because its worker died before it removed the archive.
    """
    closed = (DatasetState.READY, DatasetState.REJECTED)
    query = select(DatasetVersion.id).where(
        DatasetVersion.archive_sha256.is_not(None),
        DatasetVersion.state.in_(closed),
        or_(DatasetVersion.archive_until.is_(None), DatasetVersion.archive_until < now()),
    )
    return session.scalars(query.order_by(DatasetVersion.id)).all()


def drop_archive(session: Session, version_id: str) -> list[Digest]:
    """Remove the reference from a version to its archive; return a list with the archive, or an empty list."""
    version = session.get_one(DatasetVersion, version_id)
    archive, version.archive_sha256 = version.archive_sha256, None
    return [] if archive is None else [Digest(archive)]


def drop_files(session: Session, dataset_id: str) -> list[Digest]:
    """Remove the references from a deleted data set's versions to their manifests and archives; return the files."""
    digests = []
    for version in get_versions(session, dataset_id):
        digests += [Digest(file) for file in (version.manifest_sha256, version.archive_sha256) if file is not None]
        version.manifest_sha256 = version.archive_sha256 = None
    return digests


def _set_refused(version: DatasetVersion, refused: Sequence[Refused]) -> None:
    version.refused = [vars(file) for file in refused[:REFUSED_SHOWN]]
    version.refused_total = len(refused)


def drop_memberships(session: Session, version_ids: Sequence[str], limit: int) -> tuple[int, list[Digest]]:
    """Delete up to `limit` memberships of these versions, and images that no version contains any more.

    Returns the number of deleted memberships and the files of the deleted images.
    """
    gone = session.execute(
        select(Membership.version_id, Membership.path, Membership.image_id)
        .where(Membership.version_id.in_(version_ids))
        .limit(limit)
    ).all()
    for version_id, path, _ in gone:
        session.execute(delete(Membership).where(Membership.version_id == version_id, Membership.path == path))
    orphans = session.execute(
        select(Image.id, Image.sha256).where(
            Image.id.in_({image_id for _, _, image_id in gone}),
            ~select(Membership.path).where(Membership.image_id == Image.id).exists(),
        )
    ).all()
    session.execute(delete(Image).where(Image.id.in_([image_id for image_id, _ in orphans])))
    return len(gone), [Digest(sha256) for _, sha256 in orphans]
