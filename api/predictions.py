"""The prediction route: which version answers, and in what shape. Decoding and arithmetic are in `inference`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool

from api import bodies
from api.deps import PrincipalDep, Services, ServicesDep
from api.schemas import PredictionOut, PredictionsOut, PredictRequest, TimingsOut
from artifacts.recipe import NAME_PATTERN
from artifacts.store import Digest
from errors import Overloaded, RequestInvalid
from models import registry
from models.project import Principal
from models.registry import CHAMPION

router = APIRouter(prefix="/api/v1/models", tags=["models"])

_BINARY = {"type": "string", "format": "binary"}
_IMAGES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "items": _BINARY}},
                }
            },
            "application/json": {"schema": PredictRequest.model_json_schema()},
        },
    }
}


class Admission:
    """Lets so many images in at a time; the rest is turned away at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._lock = threading.Lock()

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold places for images. Raises Overloaded if there are none; an idle service always has them."""
        with self._lock:
            if self._inside and self._inside + images > self._limit:
                raise Overloaded(f"Expected at most {self._limit} images waiting. {self._inside} are. Try again soon.")
            self._inside += images
        try:
            yield
        finally:
            with self._lock:
                self._inside -= images


@router.post("/{name}/predict", openapi_extra=_IMAGES_BODY)
async def predict(
    request: Request,
    given: ServicesDep,
    principal: PrincipalDep,
    name: str,
    version: Annotated[int | None, Query(ge=1)] = None,
    alias: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
) -> PredictionsOut:
    """Predict images: one as the raw body, several as multipart fields `images` or as base64 in JSON.

    Answers with the `champion`, unless a version or an alias is asked for.
    """
    if version is not None and alias is not None:
        raise RequestInvalid("Expected a version or an alias. Received both.", field="alias")
    settings = given.settings
    number, bundle = await run_in_threadpool(_find, given, principal, name, version, alias)
    images = await bodies.receive_images(request, settings.predict_images, settings.predict_bytes)
    admission: Admission = request.app.state.admission
    with admission.admit(len(images)):
        return await run_in_threadpool(_answer, given, name, number, bundle, images)


def _find(
    given: Services, principal: Principal, name: str, version: int | None, alias: str | None
) -> tuple[int, Digest]:
    with given.database.reading() as session:
        model = registry.get_model(session, principal, name)
        if version is not None:
            found = registry.get_model_version(session, model, version)
        else:
            found = registry.get_alias(session, model, alias or CHAMPION)
        return found.number, Digest(found.bundle_sha256)


def _answer(given: Services, name: str, version: int, bundle: Digest, images: list[bytes]) -> PredictionsOut:
    predictor = given.shelf.predictor(bundle)
    settings = given.settings
    predictions, timings = predictor.predict(images, settings.image_limits, settings.predict_deadline_s)
    given.metrics.saw_prediction(len(images), asdict(timings))
    return PredictionsOut(
        model=name,
        version=version,
        predictions=[PredictionOut(**asdict(prediction)) for prediction in predictions],
        timings_ms=TimingsOut(**{stage: round(spent, 3) for stage, spent in asdict(timings).items()}),
    )
