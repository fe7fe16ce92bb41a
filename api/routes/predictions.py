"""The prediction route: which version answers, and in what shape. Decoding and arithmetic are in `inference`.

A prediction holds its places from before its body is read until it is answered, waits at most its deadline, and
takes no thread of other routes. One whose client left costs the engine no more.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from api import bodies
from api.dependencies import PrincipalDep, ServicesDep
from api.schemas import ExplanationOut, NeighbourOut, Number, PredictionsOut, PredictRequest, TimingsOut
from artifacts.images import Pixels
from artifacts.store import Digest
from errors import DeadlineExceeded, Overloaded, RequestInvalid, Unavailable
from inference.batcher import BackboneOutput
from inference.explain import Explanation
from inference.predictor import ExplanationImage, Prediction, Predictor, Timings
from inference.shelf import Shelf
from models.registry import CHAMPION
from recipes.recipe import NAME_PATTERN
from settings import Settings

Result = TypeVar("Result")

# Bodies of the largest size that may be in memory at once.
_LARGEST_BODIES = 4
# An image of 40 megapixels takes some 250 MB until it is scaled down.
_DECODED_AT_ONCE = 8
# Names that are looked up side by side, and networks that are loaded.
_LOOKED_UP_AT_ONCE = 4
_EXPLAINED_AT_ONCE = 2
_LOADED_AT_ONCE = 4
# A backbone that is put away just when it is asked is loaded again; a shelf this much too small is an error.
_LOADED_AGAIN = 3

# As long as a part of a path, which labels may be.
LONGEST_LABEL = 255

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
    """Lets so many images and bytes in at a time; the rest is turned away at once. Belongs to one event loop."""

    def __init__(self, limit_images: int, limit_bytes: int) -> None:
        self._limit_images = limit_images
        self._limit_bytes = limit_bytes
        self._images = 0
        self._bytes = 0

    @contextmanager
    def admit(self, size_bytes: int) -> Iterator[Callable[[int], None]]:
        """Hold the place of one image in a body of `size_bytes`, and yield a function that takes places for more.

        Raises Overloaded, as does the function, if there are none; an idle service always has them.
        """
        self._check(0, 1, size_bytes)
        images = 1
        self._images += 1
        self._bytes += size_bytes

        def take(more: int) -> None:
            nonlocal images
            self._check(images, more, 0)
            images += more
            self._images += more

        try:
            yield take
        finally:
            self._images -= images
            self._bytes -= size_bytes

    def _check(self, held: int, more: int, size_bytes: int) -> None:
        if self._images == held:
            return
        if self._images + more > self._limit_images:
            raise Overloaded(
                f"Expected at most {self._limit_images} images waiting. Received {more} while {self._images} are. "
                "Try again soon."
            )
        if self._bytes + size_bytes > self._limit_bytes:
            raise Overloaded(
                f"Expected at most {self._limit_bytes} bytes of images waiting. Received {size_bytes} while "
                f"{self._bytes} are. Try again soon."
            )


@dataclass(frozen=True)
class Wanted:
    """Which explanation is wanted, and of which label: by default of the answer."""

    kind: Explanation
    label: str | None


@dataclass(frozen=True)
class Answer:
    """What a request is answered."""

    predictions: list[Prediction]
    explained: list[ExplanationImage] | None
    timings: Timings


class Desk:
    """Where predictions wait: for admission, for their model, for their images. Belongs to one event loop."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        self.admission = Admission(settings.predict_waiting, _LARGEST_BODIES * settings.predict_bytes)
        self._settings = settings
        self._shelf = shelf
        self._decoders = ThreadPoolExecutor(min(_DECODED_AT_ONCE, settings.engine_threads + 1), "decode")
        self._look_ups = ThreadPoolExecutor(_LOOKED_UP_AT_ONCE, "look-up")
        self._explainers = ThreadPoolExecutor(_EXPLAINED_AT_ONCE, "explain")  # which may read files of the store
        self._loads = ThreadPoolExecutor(_LOADED_AT_ONCE, "load")  # of their own: they take long
        self._loading: dict[Digest, asyncio.Future[Predictor]] = {}

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self._decoders, self._look_ups, self._explainers, self._loads):
            pool.shutdown(wait=False, cancel_futures=True)

    def look_up(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Call a function that asks the database."""
        return asyncio.get_running_loop().run_in_executor(self._look_ups, function, *arguments)

    def refuse_if_hopeless(self, bundle: Digest, images: int) -> None:
        """Raise Overloaded if so many images would not be through the engine within the deadline."""
        predictor = self._shelf.find(bundle)
        wait_s = predictor.wait_s(images) if predictor else 0.0
        if wait_s > self._settings.predict_deadline_s and predictor and predictor.wait_s(0):
            raise Overloaded(
                f"Expected an answer within {self._settings.predict_deadline_s:g} s. It would take {wait_s:.1f} s: "
                "too many images wait for the same network. Try again then.",
                retry_after_s=round(wait_s - self._settings.predict_deadline_s, 3),
            )

    async def predict(self, bundle: Digest, files: list[bytes], arrived: float, wanted: Wanted | None = None) -> Answer:
        """Answer for image files that arrived at a moment of `perf_counter`, with pictures if they are wanted.

        Raises DeadlineExceeded, Overloaded, ImageRefused, and what explaining and loading a model raise.
        """
        deadline_s = self._settings.predict_deadline_s
        until = arrived + deadline_s
        decoded_s = 0.0
        pixels: Pixels | None = None
        for _ in range(_LOADED_AGAIN):
            predictor = await in_time(self._predictor(bundle), until, deadline_s)
            self.refuse_if_hopeless(bundle, len(files))
            if wanted is not None:
                predictor.check_explains(wanted.kind)
            if pixels is None:
                began = time.perf_counter()
                pixels = await self._decode(predictor, files, until)
                decoded_s = time.perf_counter() - began
            asked = predictor.submit(pixels, until, wants_maps=wanted is not None and wanted.kind.needs_maps)
            if asked is None:
                continue
            try:
                computed = await in_time(asyncio.wrap_future(asked), until, deadline_s)
            finally:
                asked.abandon()  # does nothing to one that has ended
            computed_at = time.perf_counter()
            predictions = predictor.answer(computed.features)
            head_ms = 1000 * (time.perf_counter() - computed_at)
            explained = None
            if wanted is not None:
                explaining = self._explain(predictor, wanted, pixels, computed, predictions)
                explained = await in_time(explaining, until, deadline_s)
            # All that was none of these was waiting, for the model and for the engine.
            queue_ms = max(0.0, 1000 * (computed_at - arrived - decoded_s) - computed.backbone_ms)
            timings = Timings(queue_ms, 1000 * decoded_s, computed.backbone_ms, head_ms)
            return Answer(predictions, explained, timings)
        raise Unavailable(
            "More networks are asked for at once than fit into ESPALIER_SHELF_BYTES. Try again, or raise it."
        )

    async def _decode(self, predictor: Predictor, files: list[bytes], until: float) -> Pixels:
        """Return the pixels of all files, uint8 [n, H, W, 3]; with the first error the rest is not begun."""
        loop = asyncio.get_running_loop()
        limits = self._settings.image_limits
        decoding = [
            loop.run_in_executor(self._decoders, predictor.decode, position, file, limits, until)
            for position, file in enumerate(files)
        ]
        try:
            return np.stack([await one for one in decoding])
        finally:
            for one in decoding:
                one.cancel()
                one.add_done_callback(_seen)

    async def _explain(
        self,
        predictor: Predictor,
        wanted: Wanted,
        pixels: Pixels,
        computed: BackboneOutput,
        predictions: list[Prediction],
    ) -> list[ExplanationImage]:
        given = (wanted.kind, wanted.label, pixels, computed, predictions, self._settings.image_limits)
        return await asyncio.get_running_loop().run_in_executor(self._explainers, predictor.explain, *given)

    async def _predictor(self, bundle: Digest) -> Predictor:
        """Return the model of a bundle. All wait for one load, and it goes on for the next when they give up."""
        found = self._shelf.find(bundle)
        if found is not None:
            return found
        loading = self._loading.get(bundle)
        if loading is None:
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._loads, self._shelf.predictor, bundle)
            self._loading[bundle] = loading
            loading.add_done_callback(lambda done: self._loaded(bundle, done))
        return await asyncio.shield(loading)

    def _loaded(self, bundle: Digest, loading: asyncio.Future[Predictor]) -> None:
        del self._loading[bundle]
        _seen(loading)


def _seen(future: asyncio.Future[Result]) -> None:
    """Look at an error that nobody was left to see; asyncio would complain of it."""
    if not future.cancelled():
        future.exception()


async def in_time(wanted: Awaitable[Result], until: float, deadline_s: float) -> Result:
    """Return what is awaited. Raises DeadlineExceeded if it is not there at a moment of `perf_counter`."""
    try:
        async with asyncio.timeout(until - time.perf_counter()):
            return await wanted
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"Expected an answer within {deadline_s:g} s. Received none: the model is still being loaded, or others "
            "are answered first. Try again in a moment."
        ) from error


async def while_there(request: Request, wanted: Awaitable[Result]) -> Result:
    """Return what is awaited, or give it up when the client, whose body has been read, leaves.

    Raises ClientDisconnect.
    """
    working = asyncio.ensure_future(wanted)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and leaving.result()["type"] == "http.disconnect":
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
            task.add_done_callback(_seen)


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers, or a picture.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
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
    given: ServicesDep,
    principal: PrincipalDep,
    name: str,
    version: Annotated[Number | None, Query()] = None,
    alias: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    explain: Annotated[Explanation | None, Query()] = None,
    label: Annotated[str | None, Query(max_length=LONGEST_LABEL)] = None,
) -> PredictionsOut | Response:
    """Predict images: one as the raw body, several as multipart fields `images` or as base64 in JSON.

    Answers with the `champion`, unless a version or an alias is asked for. `explain=heatmap` shows which places of an
    image speak for the answer, or for a `label`; `explain=activations` shows the network's strongest channels, and
    `explain=neighbours` the three training images that look most like it to the network, if the run was told to keep
    them. The pictures come with the answers, or one alone to who asks with `Accept: image/png`.
    """
    if version is not None and alias is not None:
        raise RequestInvalid("Expected a version or an alias. Received both.", field="alias")
    if label is not None and explain is not Explanation.HEATMAP:
        raise RequestInvalid("Expected a label together with explain=heatmap. Received it without.", field="label")
    settings = given.settings
    deadline_s = settings.predict_deadline_s
    desk: Desk = request.app.state.desk
    size_bytes = bodies.declared_bytes(request)
    most = settings.predict_bytes
    wanted = Wanted(explain, label) if explain else None
    with desk.admission.admit(most if size_bytes is None else min(size_bytes, most)) as take:
        asked = (principal, name, version, alias or CHAMPION)
        served = given.switchboard.known(*asked)
        if served is None:
            looking = desk.look_up(given.switchboard.find, *asked)
            served = await in_time(looking, time.perf_counter() + deadline_s, deadline_s)
        desk.refuse_if_hopeless(served.bundle, 1)
        images = await bodies.receive_images(
            request, settings.predict_images, most, settings.image_bytes, stall_s=deadline_s
        )
        take(len(images) - 1)
        answering = desk.predict(served.bundle, images, time.perf_counter(), wanted)
        answer = await while_there(request, answering)
    spent = {stage: round(value, 3) for stage, value in asdict(answer.timings).items()}
    timing = {"Server-Timing": ", ".join(f"{stage};dur={value}" for stage, value in spent.items())}
    given.metrics.saw_prediction(name, len(images), spent)
    if answer.explained and len(images) == 1 and "image/png" in request.headers.get("accept", ""):
        return Response(answer.explained[0].png, media_type="image/png", headers=timing)
    response.headers.update(timing)
    return PredictionsOut(
        model=name,
        version=served.version,
        predictions=[asdict(prediction) for prediction in answer.predictions],
        explanations=[_explanation(one) for one in answer.explained] if answer.explained else None,
        timings_ms=TimingsOut(**spent),
    )


def _explanation(explained: ExplanationImage) -> ExplanationOut:
    found = explained.neighbours
    return ExplanationOut(
        label=explained.label,
        png=base64.b64encode(explained.png).decode(),
        neighbours=[NeighbourOut(similarity=one.similarity, **asdict(one.known)) for one in found] if found else None,
    )
