"""Routes of data sets: upload, show and delete them. Workers open the uploaded archives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api import bodies, problems
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.filters import NameQuery
from api.idempotency import IdempotencyDep, IdempotentRequest
from api.paging import CursorQuery, LimitQuery, next_cursor, page_request
from api.schemas import (
    ClassImages,
    DatasetCreated,
    DatasetListed,
    DatasetOut,
    DatasetVersionListed,
    DatasetVersionOut,
    ImageOut,
    IngestProgress,
    Name,
    Number,
    Page,
    RefusedFile,
    TargetRange,
)
from artifacts.file_names import CODE_PAGES, code_page_named
from artifacts.store import Digest
from errors import InUse, NotFound, RequestInvalid, Unavailable
from models import comparison as comparisons
from models import dataset as datasets
from models import job as jobs
from models import run as runs
from models import view as views
from models.dataset import Dataset, DatasetState, DatasetVersion, Image, Membership
from models.file_references import lock_files, try_delete_unreferenced
from models.job import JobKind, Queue

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


@router.post("/{dataset_id}/versions/{version}/ingest", status_code=202)
def ingest_again(
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    dataset_id: str,
    version: Number,
    idempotency: IdempotencyDep,
    names: Annotated[str | None, Query(max_length=32, description="Code page of names that are not in UTF-8.")] = None,
    allow_refused: Annotated[
        bool, Query(description="Accept the archive whatever share of its files is refused.")
    ] = False,
) -> DatasetCreated:
    """Take in the archive of a rejected version after all, as a new version. Such archives are kept for a day."""
    code_page = None if names is None else code_page_named(names)
    if names is not None and code_page is None:
        raise RequestInvalid(
            f"names: expected a code page, such as {', '.join(CODE_PAGES[:5])}. Received {names!r}.", field="names"
        )
    if code_page is None and not allow_refused:
        raise RequestInvalid("Expected names=… or allow_refused=true. Received neither.", field="names")
    earlier = idempotency.find_answer(DatasetCreated, None, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        lock_files(session)  # a collector must not drop the archive meanwhile
        dataset = datasets.get_dataset(session, principal, dataset_id, for_change=True)
        added = datasets.add_version_again(session, dataset, version, code_page, allow_refused=allow_refused)
        jobs.add_job(session, dataset.project_id, JobKind.INGEST, Queue.INGEST, added.id)
        created = DatasetCreated(id=dataset.id, name=dataset.name, state=added.state, version=added.number)
        location = response.headers["Location"] = f"/api/v1/datasets/{created.id}"
        idempotency.keep_answer(session, created, location)
    services.dispatcher.request()
    return created


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
    services: ServicesDep,
    principal: PrincipalDep,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
    state: Annotated[DatasetState | None, Query()] = None,
    name: NameQuery = None,
) -> Page[DatasetListed]:
    """List data sets, the newest first: all, or those of a state or a name.

    They leave out `refused`, the list of refused files, which each data set by itself has.
    """
    with services.database.reading() as session:
        page = datasets.list_datasets(session, principal, page_request(limit, cursor), state, name)
        items = [_listed(session, dataset) for dataset in page.rows]
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


_THUMBNAIL: dict[int | str, dict[str, Any]] = {
    200: {"description": "The thumbnail.", "content": {"image/webp": {"schema": _BINARY}}}
}


@router.get("/{dataset_id}/images/{image}/thumbnail", response_class=Response, responses=_THUMBNAIL)
async def get_thumbnail(services: ServicesDep, principal: PrincipalDep, dataset_id: str, image: str) -> Response:
    """Return a thumbnail of an image in WEBP format: rotated as EXIF says, and without metadata."""

    def find() -> Digest:
        with services.database.reading() as session:
            dataset = datasets.get_dataset(session, principal, dataset_id)
            digest = datasets.find_image(session, dataset.id, image)
        if digest is None:
            raise NotFound(f"Data set {dataset.name!r} has no image {image!r}.")
        return digest

    data = await services.thumbnails.make(await run_in_threadpool(find))
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
        **_brief(dataset, shown),
        refused=_refused_out(shown),
        versions=[DatasetVersionOut(**_brief_version(version), refused=_refused_out(version)) for version in versions],
    )


def _listed(session: Session, dataset: Dataset) -> DatasetListed:
    versions = datasets.get_versions(session, dataset.id, with_refused=False)
    return DatasetListed(
        **_brief(dataset, datasets.current_version(versions)),
        versions=[DatasetVersionListed(**_brief_version(version)) for version in versions],
    )


def _brief(dataset: Dataset, shown: DatasetVersion) -> dict[str, Any]:
    """Return the fields of a data set that a list has too, except its versions."""
    return {
        "id": dataset.id,
        "name": dataset.name,
        "task": shown.task,
        "classes": [ClassImages(name=count.name, images=count.images) for count in shown.class_counts],
        "target": TargetRange(**shown.target) if shown.target else None,
        "duplicates": shown.duplicates,
        "bit_depth": shown.bit_depth,
        **_brief_version(shown),
        "created_at": dataset.created_at,
    }


def _brief_version(version: DatasetVersion) -> dict[str, Any]:
    """Return the fields of a version that a list has too."""
    return {
        "version": version.number,
        "state": version.state,
        "images": version.images,
        "ignored": version.ignored,
        "refused_total": version.refused_total,
        "warnings": version.warnings,
        "progress": IngestProgress(**version.progress) if version.progress else None,
        "error": problems.stored_problem(version.error),
        "created_at": version.created_at,
    }


def _refused_out(version: DatasetVersion) -> list[RefusedFile]:
    return [RefusedFile(**file) for file in version.refused]


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
