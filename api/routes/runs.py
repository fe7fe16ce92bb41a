"""Routes of runs and backbones: start, look, cancel. Trains nothing: that is a worker's job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import FileResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from api import problems
from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.idempotency import IdempotencyDep
from api.paging import CursorQuery, LimitQuery, page
from api.schemas import (
    BackboneOut,
    CutOut,
    Extraction,
    FileOut,
    FoldOut,
    ModelRef,
    Page,
    RunOut,
    RunProgress,
    RunRequest,
    WeightsOut,
)
from artifacts.run_files import RunFile
from artifacts.store import Digest
from errors import NotFound, RecipeInvalid
from models import comparison as comparisons
from models import dataset as datasets
from models import registry, run_jobs
from models import run as runs
from models.dataset import DatasetVersion
from models.project import scope
from models.registry import ModelVersion, Weights
from models.run import Run
from recipes.catalogue import ALL, CATALOGUE, Backbone, BackboneName
from recipes.defaults import fill
from recipes.filled import FilledRecipe
from recipes.recipe import IMAGENET, RANDOM, Recipe

router = APIRouter(prefix="/api/v1", tags=["runs"], route_class=JsonRoute)


@router.post("/runs", status_code=202)
def start_run(
    response: Response, services: ServicesDep, principal: PrincipalDep, wanted: RunRequest, idempotency: IdempotencyDep
) -> RunOut:
    """Train a model on a data set."""
    earlier = idempotency.find_answer(RunOut, wanted, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        dataset = datasets.get_dataset(session, principal, wanted.dataset, for_change=True)
        version = datasets.ready_version(session, dataset, wanted.version)
        recipe = filled(session, wanted.recipe, version, "recipe")
        run = runs.create_run(session, principal, version.id, wanted.name, recipe)
        run_jobs.queue_training(session, run)
        shown = _run_out(session, services, run)
        location = response.headers["Location"] = f"/api/v1/runs/{run.id}"
        idempotency.keep_answer(session, shown, location)
    services.dispatcher.request()
    return shown


@router.get("/runs")
def list_runs(
    services: ServicesDep, principal: PrincipalDep, limit: LimitQuery = 50, cursor: CursorQuery = None
) -> Page[RunOut]:
    """List runs, the newest first."""
    with services.database.reading() as session:
        query = select(Run).where(scope(Run.project_id, principal))
        rows, next_cursor = page(session, query, Run.id, lambda row: row.Run.id, limit, cursor)
        return Page(items=[_run_out(session, services, row.Run) for row in rows], next_cursor=next_cursor)


@router.get("/runs/{run_id}")
def get_run(services: ServicesDep, principal: PrincipalDep, run_id: str) -> RunOut:
    """Show a run."""
    with services.database.reading() as session:
        return _run_out(session, services, runs.get_run(session, principal, run_id))


@router.post("/runs/{run_id}/cancel", status_code=202)
def cancel_run(services: ServicesDep, principal: PrincipalDep, run_id: str) -> RunOut:
    """End a run; asking twice, or too late, changes nothing."""
    with services.database.writing() as session:
        run = runs.get_run(session, principal, run_id)
        due = None
        if run_jobs.request_cancel(session, run_id):
            due = comparisons.on_run_ended(session, run_id)
        shown = _run_out(session, services, run)
    if due is not None:
        services.dispatcher.request()
    return shown


@router.post("/runs/{run_id}/retry", status_code=202)
def retry_run(
    response: Response, services: ServicesDep, principal: PrincipalDep, run_id: str, idempotency: IdempotencyDep
) -> RunOut:
    """Train a failed run once more; for a week it goes on from the folds and epochs it has, then it begins anew."""
    earlier = idempotency.find_answer(RunOut, None, response)
    if earlier is not None:
        return earlier
    with services.database.writing() as session:
        run = runs.get_run(session, principal, run_id)
        run_jobs.retry(session, run)
        comparisons.on_run_retried(session, run_id)
        shown = _run_out(session, services, run)
        idempotency.keep_answer(session, shown, None)
    services.dispatcher.request()
    return shown


@router.get("/runs/{run_id}/files/{name}", response_class=FileResponse)
def get_file(
    services: ServicesDep, principal: PrincipalDep, run_id: str, name: Annotated[str, Path(max_length=128)]
) -> FileResponse:
    """Return a file that a run made: its report, pictures, folds with out-of-fold logits."""
    with services.database.reading() as session:
        runs.get_run(session, principal, run_id)
        file = next((file for file in runs.get_artifacts(session, run_id) if file.name == name), None)
    if file is None:
        raise NotFound(f"Run {run_id} has no file {name!r}.")
    return stored_file(services, file.sha256, file.media_type)


@router.get("/runs/{run_id}/augmentations", response_class=FileResponse)
def get_augmentations(services: ServicesDep, principal: PrincipalDep, run_id: str) -> FileResponse:
    """Return a picture of what fine-tuning sees: each row one image as it is, then varied, each time anew."""
    return get_file(services, principal, run_id, RunFile.AUGMENTATIONS)


@router.get("/backbones")
def list_backbones(services: ServicesDep) -> Page[BackboneOut]:
    """List the backbones that a recipe may name, with their cut points and the weights that are here."""
    with services.database.reading() as session:
        here = {(row.network, row.name): row.sha256 for row in session.scalars(select(Weights))}
    items = []
    for backbone in CATALOGUE.values():
        imported = {name for network, name in here if network == backbone.name}
        weights = [
            WeightsOut(name=name, here=(backbone.name, name) in here, sha256=here.get((backbone.name, name)))
            for name in sorted({IMAGENET, RANDOM} | imported)
        ]
        items.append(_backbone_out(backbone, weights))
    return Page(items=items, next_cursor=None)


def filled(session: Session, recipe: Recipe, version: DatasetVersion, path: str) -> FilledRecipe:
    """Return the recipe as it will be trained on a version that is ready.

    Raises RecipeInvalid, naming the field by its path in the request; `path` is that of the recipe.
    """
    assert version.task is not None
    try:
        _check_weights(session, recipe)
        return fill(recipe, version.task, version.class_counts, version.groups)
    except RecipeInvalid as error:
        field = error.field if error.field == "dataset" else f"{path}.{error.field}"
        raise RecipeInvalid(field, f"{field}: {error.detail}") from error


def _check_weights(session: Session, recipe: Recipe) -> None:
    """See that the weights exist or can be had. Raises RecipeInvalid."""
    if recipe.backbone is None or recipe.weights is None:  # `fill` refuses what must not be null
        return
    if not isinstance(recipe.backbone, BackboneName):
        if not registry.find_weights_by_name(session, recipe.weights):
            raise RecipeInvalid(
                "weights",
                f"Expected weights that are here for one backbone at least, to choose among. Received "
                f"{recipe.weights!r}, which no backbone has yet: train on one of them first, or import weights.",
            )
        return
    if recipe.weights in (IMAGENET, RANDOM):
        return
    backbone = recipe.backbone
    if registry.find_weights(session, backbone, recipe.weights):
        return
    raise RecipeInvalid(
        "weights",
        f"Expected 'imagenet', 'random', or weights imported for {backbone.value}. Received "
        f"{recipe.weights!r}. Import them with 'make weights BACKBONE={backbone.value} NAME={recipe.weights} "
        "FILE=…'.",
    )


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


def stored_file(services: Services, sha256: str, media_type: str) -> FileResponse:
    """Return a stored file as an answer. Raises NotFound or Corrupt."""
    path = services.store.verified_path(Digest(sha256))
    return FileResponse(path, media_type=media_type, headers={"ETag": f'"{sha256}"'})


def model_of(run: Run, made: ModelVersion | None) -> ModelRef | None:
    """Return the model version that a run made as it is shown, or None."""
    return ModelRef(name=run.name, version=made.number) if made else None


def _run_out(session: Session, services: Services, run: Run) -> RunOut:
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    return RunOut(
        id=run.id,
        dataset=version.dataset_id,
        version=version.number,
        name=run.name,
        recipe=run.recipe,
        batch_size=run.batch_size,
        state=run.state,
        progress=RunProgress(**run.progress),
        metrics=run.metrics,
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
        model=model_of(run, registry.find_run_version(session, run.id)),
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
        training_s=run.training_s,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
    )


def _mlflow_url(services: Services, run: Run) -> str | None:
    if run.mlflow_run_id is None:
        return None
    return f"{services.settings.mlflow_public}/#/experiments/{run.mlflow_experiment_id}/runs/{run.mlflow_run_id}"
