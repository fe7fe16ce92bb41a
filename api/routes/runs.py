"""Routes of runs and backbones: start, show, cancel and retry runs, and list backbones. Workers train the runs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from sqlalchemy.orm import Session

from api import problems
from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.files import StoredFile, file_answers, stored_file
from api.filters import DatasetQuery, NameQuery, filtered_versions
from api.idempotency import IdempotencyDep
from api.paging import CursorQuery, LimitQuery, next_cursor, page_of, page_request
from api.presentation import model_ref
from api.recipes import fill_recipe
from api.schemas import (
    BackboneOut,
    CutOut,
    Extraction,
    FileOut,
    FoldOut,
    MlflowRefusal,
    Page,
    RunOut,
    RunProgress,
    RunRequest,
    WeightsOut,
)
from artifacts.run_files import RunFile
from errors import NotFound
from models import comparison as comparisons
from models import dataset as datasets
from models import outbox, registry, run_jobs, run_queue
from models import run as runs
from models.dataset import DatasetVersion
from models.run import Run, RunState
from models.run_queue import QueuePlace
from recipes.catalogue import ALL, CATALOGUE, Backbone
from recipes.recipe import IMAGENET, RANDOM

router = APIRouter(prefix="/api/v1", tags=["runs"], route_class=JsonRoute)


@router.post("/runs", status_code=202)
def start_run(
    response: Response, services: ServicesDep, principal: PrincipalDep, body: RunRequest, idempotency: IdempotencyDep
) -> RunOut:
    """Start a run, which trains a model on a data set and adds a version to the model."""
    earlier = idempotency.find_answer(RunOut, body, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        dataset = datasets.get_dataset(session, principal, body.dataset, for_change=True)
        version = datasets.ready_version(session, dataset, body.version)
        recipe = fill_recipe(session, body.recipe, version, "recipe")
        run = runs.create_run(session, principal, version.id, body.name, recipe)
        run_jobs.queue_training(session, run)
        shown = _whole_run_out(session, services, run)
        location = response.headers["Location"] = f"/api/v1/runs/{run.id}"
        idempotency.keep_answer(session, shown, location)
    services.dispatcher.request()
    return shown


@router.get("/runs")
def list_runs(
    services: ServicesDep,
    principal: PrincipalDep,
    limit: LimitQuery = 50,
    cursor: CursorQuery = None,
    state: Annotated[RunState | None, Query()] = None,
    dataset: DatasetQuery = None,
    name: NameQuery = None,
) -> Page[RunOut]:
    """List runs, the newest first: all, or those of a state, a data set or a name.

    Metrics leave out `confusion` and `per_class`, which each run by itself has.
    """
    with services.database.reading() as session:
        versions = filtered_versions(session, principal, dataset)
        page = runs.list_runs(session, principal, page_request(limit, cursor), state, name, versions)
        metrics = runs.get_brief_metrics(session, [run.id for run in page.rows])
        places = run_queue.find_places(session, page.rows, services.settings.live_s)
        items = [_run_out(session, services, run, metrics[run.id], places.get(run.id)) for run in page.rows]
        return Page(items=items, next_cursor=next_cursor(page.next_after))


@router.get("/runs/{run_id}")
def get_run(services: ServicesDep, principal: PrincipalDep, run_id: str) -> RunOut:
    """Show a run with its progress, results and files."""
    with services.database.reading() as session:
        return _whole_run_out(session, services, runs.get_run(session, principal, run_id))


@router.post("/runs/{run_id}/cancel", status_code=202)
def cancel_run(services: ServicesDep, principal: PrincipalDep, run_id: str) -> RunOut:
    """Cancel a run. If the run has already ended or was cancelled before, nothing changes."""
    with services.database.writing() as session:
        run = runs.get_run(session, principal, run_id)
        due = None
        if run_jobs.request_cancel(session, run_id):
            due = comparisons.on_run_ended(session, run_id)
        shown = _whole_run_out(session, services, run)
    if due is not None:
        services.dispatcher.request()
    return shown


@router.post("/runs/{run_id}/retry", status_code=202)
def retry_run(
    response: Response, services: ServicesDep, principal: PrincipalDep, run_id: str, idempotency: IdempotencyDep
) -> RunOut:
    """Train a failed run again. Within a week of the failure, it resumes where it stopped; later, it starts over."""
    earlier = idempotency.find_answer(RunOut, None, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        run = runs.get_run(session, principal, run_id)
        run_jobs.retry(session, run)
        comparisons.on_run_retried(session, run_id)
        shown = _whole_run_out(session, services, run)
        idempotency.keep_answer(session, shown, None)
    services.dispatcher.request()
    return shown


@router.get("/runs/{run_id}/files/{name}", response_class=StoredFile, responses=file_answers("*/*"))
def get_file(
    services: ServicesDep, principal: PrincipalDep, run_id: str, name: Annotated[str, Path(max_length=128)]
) -> StoredFile:
    """Return a file that a run produced, such as its report, a picture or its out-of-fold logits."""
    with services.database.reading() as session:
        runs.get_run(session, principal, run_id)
        file = next((file for file in runs.get_artifacts(session, run_id) if file.name == name), None)
    if file is None:
        raise NotFound(f"Run {run_id} has no file {name!r}.")
    return stored_file(services.store, file.sha256, file.media_type)


@router.get("/runs/{run_id}/augmentations", response_class=StoredFile, responses=file_answers("image/png"))
def get_augmentations(services: ServicesDep, principal: PrincipalDep, run_id: str) -> StoredFile:
    """Return a picture of a run's data augmentation. Each row shows an image, then random variations of the image."""
    return get_file(services, principal, run_id, RunFile.AUGMENTATIONS)


@router.get("/backbones")
def list_backbones(services: ServicesDep, limit: LimitQuery = 50, cursor: CursorQuery = None) -> Page[BackboneOut]:
    """List the backbones that a recipe may name, with their cut points and their weights."""
    with services.database.reading() as session:
        here = registry.get_weights_digests(session)
    items = []
    for backbone in CATALOGUE.values():
        imported = {name for network, name in here if network == backbone.name}
        weights = [
            WeightsOut(name=name, here=(backbone.name, name) in here, sha256=here.get((backbone.name, name)))
            for name in sorted({IMAGENET, RANDOM} | imported)
        ]
        items.append(_backbone_out(backbone, weights))
    return page_of(items, lambda backbone: backbone.name, limit, cursor)


def _backbone_out(backbone: Backbone, weights: list[WeightsOut]) -> BackboneOut:
    return BackboneOut(
        name=backbone.name,
        title=backbone.title,
        input_size=backbone.size,
        minimum_size=backbone.minimum_size,
        features=backbone.cuts[backbone.last_cut],
        cut_points=[CutOut(name=name, width=width) for name, width in backbone.cuts.items()],
        unfreeze=[*backbone.cuts, ALL],
        weights=weights,
    )


def _whole_run_out(session: Session, services: Services, run: Run) -> RunOut:
    places = run_queue.find_places(session, [run], services.settings.live_s)
    return _run_out(session, services, run, run.metrics, places.get(run.id))


def _run_out(
    session: Session, services: Services, run: Run, metrics: dict[str, Any] | None, place: QueuePlace | None
) -> RunOut:
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    return RunOut(
        id=run.id,
        dataset=version.dataset_id,
        version=version.number,
        name=run.name,
        recipe=run.recipe,
        batch_size=run.batch_size,
        state=run.state,
        progress=RunProgress(**run.progress | (vars(place) if place else {})),
        metrics=metrics,
        folds=[
            FoldOut(
                fold=fold.number,
                epochs=fold.epochs,
                best_epoch=fold.best_epoch,
                stopped=fold.stopped,
                seconds=fold.seconds,
                metrics=fold.metrics,
            )
            for fold in runs.get_folds(session, run.id)
        ],
        extraction=Extraction(**run.extraction) if run.extraction else None,
        model=model_ref(run, registry.find_run_version(session, run.id)),
        files=[
            FileOut(
                name=file.name,
                size_bytes=file.size_bytes,
                media_type=file.media_type,
                url=f"/api/v1/runs/{run.id}/files/{file.name}",
            )
            for file in runs.get_artifacts(session, run.id)
        ],
        error=problems.stored_problem(run.error),
        mlflow_url=_mlflow_url(services, run),
        mlflow_refused=[MlflowRefusal(**row.payload) for row in outbox.get_refusals(session, run.id)],
        training_s=run.training_s,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
    )


def _mlflow_url(services: Services, run: Run) -> str | None:
    if run.mlflow_run_id is None:
        return None
    return f"{services.settings.mlflow_public}/#/experiments/{run.mlflow_experiment_id}/runs/{run.mlflow_run_id}"
