"""Routes of the views of a finished run. The first request starts the computation; later ones get its result."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.files import stored_file
from api.schemas import LearningCurveOut, ViewOut, ViewProgress, VisibleLayer, VisibleLayers
from artifacts.run_files import RunFile
from artifacts.store import Digest
from errors import EspalierError, NotFound, NotReady, RequestInvalid, from_record
from models import dataset as datasets
from models import run as runs
from models import view as views
from models.dataset import Dataset, DatasetVersion
from models.project import Principal
from models.run import Run, RunState
from models.view import View, ViewKind, ViewState
from recipes.recipe import Mode

router = APIRouter(prefix="/api/v1/runs", tags=["runs"], route_class=JsonRoute)

# Seconds until a client should ask again, without an ETA and at most.
_ASK_AGAIN_S = 2
_LATEST_S = 30

_COMPUTING: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "It is being computed: ask again after the seconds of `Retry-After`.",
        "model": ViewOut,
    }
}
_PICTURE = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
_LAYERS_OR_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The layers, or a picture.", "content": _PICTURE}
}


@router.get("/{run_id}/learning-curve", response_model=LearningCurveOut, responses=_COMPUTING)
def get_learning_curve(services: ServicesDep, principal: PrincipalDep, run_id: str) -> LearningCurveOut | Response:
    """Show the score after learning from 10, 20, 40, 70 and 100 % of the images, and what twice as many would bring.

    Measured on the run's own test folds, with parts that hold each other and keep groups together. For runs with a
    frozen backbone; it takes about as long as the folds of the run did.
    """
    with services.database.reading() as session:
        run = _finished(session, principal, run_id)
    mode = Mode(run.recipe["mode"])
    if mode is not Mode.FEATURE_EXTRACTION:
        raise NotReady(
            f"A learning curve is measured with heads on features that are cached, and there are none of mode "
            f"{mode.value!r}. Expected a run of mode {Mode.FEATURE_EXTRACTION.value!r}."
        )
    view = _view(services, run, ViewKind.LEARNING_CURVE)
    if view.state is not ViewState.SUCCEEDED:
        return _computing(view)
    return LearningCurveOut(picture=f"/api/v1/runs/{run_id}/files/{RunFile.LEARNING_CURVE}", **_content(services, view))


@router.get("/{run_id}/activations", response_model=VisibleLayers, responses=_COMPUTING | _LAYERS_OR_PICTURE)
def get_activations(
    services: ServicesDep,
    principal: PrincipalDep,
    run_id: str,
    image: Annotated[str | None, Query(description="SHA-256 of an image of the run's data set version.")] = None,
    layer: Annotated[str | None, Query(description="Name of a layer; without one, all of them are listed.")] = None,
) -> VisibleLayers | Response:
    """Show what a layer of the run's network makes of an image: its strongest channels, at most 64, as a picture.

    The strongest comes first, row by row, and each is scaled by itself. Without `layer`, list those that can be asked
    for.
    """
    with services.database.reading() as session:
        run = _finished(session, principal, run_id)
        if layer is not None or image is not None:
            digest = _image(session, run, image)
    listing = _view(services, run, ViewKind.LAYERS)
    if listing.state is not ViewState.SUCCEEDED:
        return _computing(listing)
    layers = [VisibleLayer(**one) for one in _content(services, listing)]
    if layer is None:
        return VisibleLayers(layers=layers)
    names = [one.name for one in layers]
    if layer not in names:
        expected = f"Expected one of {', '.join(names)}" if names else "No layer of this network has maps to show"
        raise RequestInvalid(f"layer: {expected}. Received {layer!r}.", field="layer")
    view = _view(services, run, ViewKind.ACTIVATIONS, views.activations_key(digest, layer))
    if view.state is not ViewState.SUCCEEDED:
        return _computing(view)
    assert view.sha256 is not None
    return stored_file(services.store, view.sha256, "image/png")


def _finished(session: Session, principal: Principal, run_id: str) -> Run:
    """Return a run that has succeeded. Raises NotFound or NotReady."""
    run = runs.get_run(session, principal, run_id)
    if run.state is not RunState.SUCCEEDED:
        raise NotReady(f"Expected a run that has succeeded. Received one that is {run.state.value}.")
    return run


def _image(session: Session, run: Run, image: str | None) -> Digest:
    """Return an image of the run's data set version. Raises RequestInvalid, NotFound, or NotReady if it is deleted."""
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    if session.get_one(Dataset, version.dataset_id).deleted_at is not None:
        raise NotReady(views.DATASET_DELETED)
    listing = f"GET /api/v1/datasets/{version.dataset_id}/images?version={version.number} lists"
    if image is None:
        raise RequestInvalid(f"image: Expected one of the images that {listing}. Received none.", field="image")
    found = datasets.find_version_image(session, version.id, image)
    if found is None:
        raise NotFound(
            f"The run's data set version has no image {image!r}. {listing} the {version.images:,} that it has, each "
            "with its SHA-256 as 'image'."
        )
    return found


def _view(services: Services, run: Run, kind: ViewKind, key: str = "") -> View:
    """Return a view, requesting it if nobody has. Raises the error of a failed view once; the next call retries it."""
    with services.database.reading() as session:
        view = views.find_view(session, run.id, kind, key)
    if view is not None and view.state is ViewState.FAILED:
        with services.database.writing() as session:
            error = views.pop_failure(session, view.id)
        if error is not None:
            raise _failure(error)
        view = None
    if view is not None:
        return view
    with services.database.writing() as session:
        view, job = views.request_view(session, run, kind, key)
    if job is not None:
        services.dispatcher.request()
    return view


def _failure(error: dict[str, Any]) -> EspalierError:
    """Return the error of a view that could not be computed."""
    found = from_record(error)
    found.detail += " Ask again to retry."
    return found


def _computing(view: View) -> JSONResponse:
    """Return 202 with the progress of a view, and when to ask again."""
    progress = ViewProgress(**view.progress or {"fraction": 0.0, "eta_s": None})
    after_s = _ASK_AGAIN_S if progress.eta_s is None else min(_LATEST_S, max(1, math.ceil(progress.eta_s)))
    shown = ViewOut(state=view.state, progress=progress)
    return JSONResponse(shown.model_dump(mode="json"), 202, {"Retry-After": str(after_s)})


def _content(services: Services, view: View) -> Any:
    """Return the parsed JSON of a view that has succeeded."""
    assert view.sha256 is not None
    return json.loads(services.store.read(Digest(view.sha256)))
