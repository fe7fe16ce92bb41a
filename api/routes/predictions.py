"""The prediction route: reads the images, finds the model version that answers, and builds the response."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from api import bodies
from api.deadline import Deadline, Stage
from api.dependencies import PrincipalDep, ServicesDep
from api.prediction_queue import ExplanationRequest, retrieve_exception
from api.schemas import ExplanationOut, NeighbourOut, Number, PredictionsOut, PredictRequest, TimingsOut
from errors import RequestInvalid
from inference.explain import Explanation
from inference.predictor import ExplanationImage
from models.registry import CHAMPION
from recipes.recipe import NAME_PATTERN

Result = TypeVar("Result")

# A label of a labels.csv has at most 1024 bytes in NFC; a client may send more characters in NFD.
LONGEST_LABEL = 2048

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


async def unless_disconnected(request: Request, awaitable: Awaitable[Result]) -> Result:
    """Return the result of an awaitable. If the client disconnects before, cancel it and raise ClientDisconnect.

    The body of the request must have been read before.
    """
    working = asyncio.ensure_future(awaitable)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and leaving.result()["type"] == "http.disconnect":
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
            task.add_done_callback(retrieve_exception)


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The predictions, or a picture that explains one prediction.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    },
    409: {
        "description": "The model has no `champion`: none of its versions is better than a constant answer. `version` "
        "is the newest; `PUT /api/v1/models/{name}/aliases/champion` with it uses it all the same."
    },
}


@router.post(
    "/{name}/predict",
    openapi_extra=_IMAGES_BODY,
    response_model=PredictionsOut,
    response_model_exclude_none=True,
    responses=_ANSWERS,
)
async def predict(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    name: str,
    version: Annotated[Number | None, Query()] = None,
    alias: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    explain: Annotated[Explanation | None, Query()] = None,
    label: Annotated[str | None, Query(max_length=LONGEST_LABEL)] = None,
) -> PredictionsOut | Response:
    """Predict images: one image as the raw body, or several as multipart fields `images` or as base64 text in JSON.

    The alias `champion` answers, unless the request names a `version` or another `alias`. A version that is no better
    than a constant answer does not become `champion` by itself. With `explain`, the response also has a picture for
    each image:

    - `heatmap` shows which parts of the image speak for the predicted label, or for `label`.
    - `activations` shows the strongest channels of the network.
    - `neighbours` shows the three training images with the most similar features, if the run has kept them.

    For a single image, `Accept: image/png` returns only the picture.
    """
    if version is not None and alias is not None:
        raise RequestInvalid("Expected a version or an alias. Received both.", field="alias")
    if label is not None and explain is not Explanation.HEATMAP:
        raise RequestInvalid("'label' is only allowed together with explain=heatmap.", field="label")
    settings, queue = services.settings, services.prediction_queue
    deadline, limit_bytes = Deadline(settings.predict_deadline_s), settings.predict_bytes
    declared = bodies.declared_bytes(request)
    explanation = ExplanationRequest(explain, label) if explain else None
    with queue.admission.admit(limit_bytes if declared is None else min(declared, limit_bytes)) as admit_more:
        name_of_version = (principal, name, version, alias or CHAMPION)
        served = services.version_resolver.find_cached(*name_of_version)
        if served is None:
            resolving = queue.run_lookup(services.version_resolver.resolve, *name_of_version)
            served = await deadline.wait(Stage.LOOKUP, resolving)
        queue.check_wait(served.bundle, 1)
        receiving = bodies.receive_images(request, settings.predict_images, limit_bytes, settings.image_bytes)
        images = await deadline.wait(Stage.BODY, receiving)
        admit_more(len(images) - 1)
        predicting = queue.predict(served.bundle, images, deadline, explanation)
        result = await unless_disconnected(request, predicting)
    timings = {stage: round(value, 3) for stage, value in asdict(result.timings).items()}
    headers = {"Server-Timing": ", ".join(f"{stage};dur={value}" for stage, value in timings.items())}
    services.metrics.count_prediction(name, len(images), timings)
    if result.explanations and len(images) == 1 and "image/png" in request.headers.get("accept", ""):
        return Response(result.explanations[0].png, media_type="image/png", headers=headers)
    response.headers.update(headers)
    return PredictionsOut(
        model=name,
        version=served.version,
        predictions=[asdict(prediction) for prediction in result.predictions],
        explanations=[_explanation_out(one) for one in result.explanations] if result.explanations else None,
        timings_ms=TimingsOut(**timings),
    )


def _explanation_out(explained: ExplanationImage) -> ExplanationOut:
    found = explained.neighbours
    return ExplanationOut(
        label=explained.label,
        png=base64.b64encode(explained.png).decode(),
        neighbours=[NeighbourOut(similarity=one.similarity, **asdict(one.training_image)) for one in found]
        if found
        else None,
    )
