"""Routes of the views of a finished run. The first request for a view starts its computation; later ones get it."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from api.bodies import JsonRoute
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.files import file_answers, stored_file
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

# `Retry-After` in seconds while a view is being computed: if there is no ETA, and the maximum otherwise.
_ASK_AGAIN_S = 2
_LATEST_S = 30

_COMPUTING: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "The view is being computed. Repeat the request after the seconds in `Retry-After`.",
        "model": ViewOut,
    }
}
_LAYERS_OR_PICTURE = file_answers("image/png", "The list of layers, or the picture of one layer.")


@router.get("/{run_id}/learning-curve", response_model=LearningCurveOut, responses=_COMPUTING)
def get_learning_curve(services: ServicesDep, principal: PrincipalDep, run_id: str) -> LearningCurveOut | Response:
    """Show how the score depends on the number of training images: the learning curve of a run.

    The scores are measured after training on 10, 20, 40, 70 and 100 % of each fold's training images, and always on the
    test images of the run's folds. Each part contains the smaller parts, and groups stay together. The response also
    estimates the score with twice as many images. Only available for runs with a frozen backbone. The computation takes
    about as long as the run's folds.
    """
    with services.database.reading() as session:
        run = _finished(session, principal, run_id)
    mode = Mode(run.recipe["mode"])
    if mode is not Mode.FEATURE_EXTRACTION:
        raise NotReady(
            f"This run has mode {mode.value!r}. A learning curve needs cached features, so it is only available for "
            f"runs with mode {Mode.FEATURE_EXTRACTION.value!r}."
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
    layer: Annotated[str | None, Query(description="Name of a layer. Without it, the layers are listed.")] = None,
) -> VisibleLayers | Response:
    """Return a picture of the activations of one layer of a run's network for an image.

    The picture shows the strongest channels of the layer, at most 64, row by row with the strongest first. Each channel
    is scaled to its own range. Without `layer`, the response lists the layers that can be shown.
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
    """Return a run. Raises NotFound, or NotReady if the run has not succeeded."""
    run = runs.get_run(session, principal, run_id)
    if run.state is not RunState.SUCCEEDED:
        raise NotReady(f"This run is {run.state.value}. Views are only available for a run that has succeeded.")
    return run


def _image(session: Session, run: Run, image: str | None) -> Digest:
    """Return the digest of an image in the run's data set version.

    Raises RequestInvalid without an `image`, NotFound if the version does not contain it, and NotReady if the data set
    was deleted.
    """
    version = session.get_one(DatasetVersion, run.dataset_version_id)
    if session.get_one(Dataset, version.dataset_id).deleted_at is not None:
        raise NotReady(views.DATASET_DELETED)
    listing = f"GET /api/v1/datasets/{version.dataset_id}/images?version={version.number}"
    if image is None:
        raise RequestInvalid(
            f"image: Expected the SHA-256 of an image. Received none. {listing} lists them.", field="image"
        )
    found = datasets.find_version_image(session, version.id, image)
    if found is None:
        raise NotFound(
            f"The run's data set version has no image {image!r}. {listing} lists its {version.images:,} images; the "
            "field 'image' is the SHA-256."
        )
    return found


def _view(services: Services, run: Run, kind: ViewKind, key: str = "") -> View:
    """Return a view of a run, and queue its computation if this is the first request for it.

    If the computation has failed, raises its error once. The next request starts the computation again.
    """
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
    """Return the error to raise for a view whose computation has failed."""
    found = from_record(error)
    found.detail += " Repeat the request to try again."
    return found


def _computing(view: View) -> JSONResponse:
    """Return the response for a view that is still being computed: status 202, its progress, and `Retry-After`."""
    progress = ViewProgress(**view.progress or {"fraction": 0.0, "eta_s": None})
    after_s = _ASK_AGAIN_S if progress.eta_s is None else min(_LATEST_S, max(1, math.ceil(progress.eta_s)))
    shown = ViewOut(state=view.state, progress=progress)
    return JSONResponse(shown.model_dump(mode="json"), 202, {"Retry-After": str(after_s)})


def _content(services: Services, view: View) -> Any:
    """Return the parsed JSON file of a view that has succeeded."""
    assert view.sha256 is not None
    return json.loads(services.store.read(Digest(view.sha256)))
