"""Routes of data sets: upload, show and delete them. Workers open the uploaded archives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import bodies, problems
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.idempotency import IdempotencyDep, IdempotentRequest
from api.paging import CursorQuery, LimitQuery, next_cursor, page_request
from api.schemas import (
    ClassImages,
    DatasetCreated,
    DatasetOut,
    DatasetVersionOut,
    ImageOut,
    IngestProgress,
    Name,
    Number,
    Page,
    RefusedFile,
    TargetRange,
)
from artifacts import images
from artifacts.store import Digest
from errors import InUse, NotFound, Unavailable
from models import comparison as comparisons
from models import dataset as datasets
from models import job as jobs
from models import run as runs
from models import view as views
from models.dataset import Dataset, DatasetVersion, Image, Membership
from models.file_references import lock_files, try_delete_unreferenced
from models.job import JobKind, Queue

THUMBNAIL_SIDE = 160

router = APIRouter(prefix="/api/v1/datasets", tags=["data sets"])

_BINARY = {"type": "string", "format": "binary"}
_ARCHIVE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["archive"], "properties": {"archive": _BINARY}}
            },
        },
    }
}


@router.post("", status_code=202, openapi_extra=_ARCHIVE_BODY)
async def upload(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    name: Annotated[Name, Query()],
    idempotency: IdempotencyDep,
) -> DatasetCreated:
    """Upload a new data set: a zip, tar or tar.gz archive of images with one folder per class, or with a labels.csv."""
    return await _receive_version(
        request,
        response,
        services,
        idempotency,
        check=lambda session: datasets.check_name(session, principal, name),
        find=lambda session: datasets.create_dataset(session, principal, name),
    )


@router.post("/{dataset_id}/versions", status_code=202, openapi_extra=_ARCHIVE_BODY)
async def add_images(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    dataset_id: str,
    idempotency: IdempotencyDep,
) -> DatasetCreated:
    """Upload an archive with more images for a data set. Its new version contains these and all earlier images."""
    return await _receive_version(
        request,
        response,
        services,
        idempotency,
        check=lambda session: datasets.check_idle(session, datasets.get_dataset(session, principal, dataset_id)),
        find=lambda session: datasets.get_dataset(session, principal, dataset_id, for_change=True),
    )


async def _receive_version(
    request: Request,
    response: Response,
    services: Services,
    idempotency: IdempotentRequest,
    *,
    check: Callable[[Session], None],
    find: Callable[[Session], Dataset],
) -> DatasetCreated:
    """Receive an archive, add a version for it to the data set that `find` returns, and queue the ingest.

    `check` raises an error if the upload will be refused whatever the archive contains.
    """

    def check_first() -> None:  # before the client uploads gigabytes in vain
        with services.database.reading() as session:
            # With a known Idempotency-Key, this may be a repeated upload, which must get the first answer. Whether it
            # is one is only known when the whole archive has arrived.
            if not idempotency.is_known(session):
                check(session)

    await run_in_threadpool(check_first)
    settings = services.settings
    archive = await bodies.receive_archive(request, services.store, settings.archive_bytes, settings.free_disk_bytes)
    return await run_in_threadpool(_record, response, services, idempotency, archive, find)


def _record(
    response: Response,
    services: Services,
    idempotency: IdempotentRequest,
    archive: Digest,
    find: Callable[[Session], Dataset],
) -> DatasetCreated:
    """Add a version for a stored archive, and its ingest job.

    Deletes the archive if the version cannot be added or the request is a repetition, unless a row references the file.
    """
    is_needed = False
    try:
        earlier = idempotency.find_answer(DatasetCreated, archive, response)
        if earlier is not None:
            return earlier
        with services.database.writing() as session:
            # Lock first: another request may be refused now, and would then delete its archive, perhaps the same file.
            lock_files(session)
            dataset = find(session)
            if not services.store.has(archive):
                raise Unavailable("The archive was deleted just after it arrived. Send it again.")
            version = datasets.add_version(session, dataset, archive)
            jobs.add_job(session, dataset.project_id, JobKind.INGEST, Queue.INGEST, version.id)
            created = DatasetCreated(id=dataset.id, name=dataset.name, state=version.state, version=version.number)
            location = response.headers["Location"] = f"/api/v1/datasets/{created.id}"
            idempotency.keep_answer(session, created, location)
        is_needed = True
    finally:
        if not is_needed:
            with services.database.writing() as session:
                try_delete_unreferenced(session, services.store, [archive])
    services.dispatcher.request()
    return created


@router.get("")
def list_datasets(
    services: ServicesDep, principal: PrincipalDep, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[DatasetOut]:
    """List data sets, the newest first."""
    with services.database.reading() as session:
        page = datasets.list_datasets(session, principal, page_request(limit, cursor))
        items = [_dataset_out(session, dataset) for dataset in page.rows]
        return Page(items=items, next_cursor=next_cursor(page.next_after))


@router.get("/{dataset_id}")
def get_dataset(services: ServicesDep, principal: PrincipalDep, dataset_id: str) -> DatasetOut:
    """Show a data set with all versions. The main fields describe its newest version that is ready."""
    with services.database.reading() as session:
        return _dataset_out(session, datasets.get_dataset(session, principal, dataset_id))


@router.get("/{dataset_id}/images")
def list_images(
    services: ServicesDep,
    principal: PrincipalDep,
    dataset_id: str,
    label: str | None = None,
    version: Annotated[Number | None, Query()] = None,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
) -> Page[ImageOut]:
    """List the images of a version in the order of their paths. With `label`, list only images that have this label."""
    with services.database.reading() as session:
        dataset = datasets.get_dataset(session, principal, dataset_id)
        chosen = datasets.ready_version(session, dataset, version)
        page = datasets.list_images(session, chosen.id, label, page_request(limit, cursor))
        items = [_image_out(dataset.id, membership, image) for membership, image in page.rows]
        return Page(items=items, next_cursor=next_cursor(page.next_after))


@router.get("/{dataset_id}/images/{image}/thumbnail", response_class=Response)
def get_thumbnail(services: ServicesDep, principal: PrincipalDep, dataset_id: str, image: str) -> Response:
    """Return a thumbnail of an image in WEBP format: rotated as EXIF says, and without metadata."""
    with services.database.reading() as session:
        dataset = datasets.get_dataset(session, principal, dataset_id)
        digest = datasets.find_image(session, dataset.id, image)
    if digest is None:
        raise NotFound(f"Data set {dataset.name!r} has no image {image!r}.")
    data = images.thumbnail(services.store.read(digest), THUMBNAIL_SIDE, services.settings.image_limits)
    return Response(data, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400, immutable"})


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(services: ServicesDep, principal: PrincipalDep, dataset_id: str) -> None:
    """Delete a data set and its images. Runs and models that were trained on it stay."""
    with services.database.writing() as session:
        dataset = datasets.get_dataset(session, principal, dataset_id, for_change=True)
        versions = [version.id for version in datasets.get_versions(session, dataset.id)]
        if runs.is_any_active(session, versions):
            raise InUse(
                f"A run on data set {dataset.name!r} has not ended. Cancel the run first, or wait until it has ended."
            )
        if comparisons.is_any_active(session, versions):
            raise InUse(
                f"A comparison on data set {dataset.name!r} has not ended. Cancel the comparison first, or wait until "
                "it has ended."
            )
        for version_id in versions:
            if jobs.request_cancel(session, version_id, JobKind.INGEST):
                datasets.cancel_ingest(session, version_id)
        views.request_cancel(session, versions)
        datasets.delete_dataset(dataset)
        jobs.add_job(session, dataset.project_id, JobKind.PURGE, Queue.INGEST, dataset.id)
    services.dispatcher.request()


def _dataset_out(session: Session, dataset: Dataset) -> DatasetOut:
    versions = datasets.get_versions(session, dataset.id)
    shown = datasets.current_version(versions)
    return DatasetOut(
        id=dataset.id,
        name=dataset.name,
        state=shown.state,
        task=shown.task,
        images=shown.images,
        classes=[ClassImages(name=count.name, images=count.images) for count in shown.class_counts],
        target=TargetRange(**shown.target) if shown.target else None,
        duplicates=shown.duplicates,
        ignored=shown.ignored,
        refused=_refused_out(shown),
        refused_total=shown.refused_total,
        version=shown.number,
        versions=_versions_out(versions),
        progress=_progress_out(shown.progress),
        created_at=dataset.created_at,
        error=problems.stored_problem(shown.error),
    )


def _versions_out(versions: Sequence[DatasetVersion]) -> list[DatasetVersionOut]:
    return [
        DatasetVersionOut(
            version=version.number,
            state=version.state,
            images=version.images,
            ignored=version.ignored,
            refused=_refused_out(version),
            refused_total=version.refused_total,
            progress=_progress_out(version.progress),
            error=problems.stored_problem(version.error),
            created_at=version.created_at,
        )
        for version in versions
    ]


def _refused_out(version: DatasetVersion) -> list[RefusedFile]:
    return [RefusedFile(**file) for file in version.refused]


def _progress_out(progress: dict[str, Any] | None) -> IngestProgress | None:
    return IngestProgress(**progress) if progress else None


def _image_out(dataset_id: str, membership: Membership, image: Image) -> ImageOut:
    return ImageOut(
        image=image.sha256,
        path=membership.path,
        label=membership.label,
        labels=membership.label.split("|") if membership.label else [],
        target=membership.target,
        group=membership.group,
        split=membership.split,
        width=image.width,
        height=image.height,
        format=image.format,
        size_bytes=image.size_bytes,
        thumbnail=f"/api/v1/datasets/{dataset_id}/images/{image.sha256}/thumbnail",
    )
