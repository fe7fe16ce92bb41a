"""The prediction route: which version answers, and in what shape. Decoding and arithmetic are in `inference`.

A prediction holds its places from before its body is read until it is answered, waits at most its deadline, and
takes no thread of other routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request

from api import bodies
from api.deps import PrincipalDep, Services, ServicesDep
from api.schemas import Number, PredictionsOut, PredictRequest, TimingsOut
from artifacts.recipe import NAME_PATTERN
from artifacts.store import Digest
from errors import DeadlineExceeded, Overloaded, RequestInvalid
from inference.predictor import Predictor
from inference.shelf import Shelf
from models import registry
from models.project import Principal
from models.registry import CHAMPION
from settings import Settings

Result = TypeVar("Result")

# Bodies of the largest size that may be in memory at once.
_LARGEST_BODIES = 4
# One has the engine while others decode; an image of 40 megapixels takes some 250 MB until it is scaled down.
_AT_ONCE = 8

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


class Desk:
    """Where predictions wait: for admission, for their model, for their turn. Belongs to one event loop."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        self.admission = Admission(settings.predict_waiting, _LARGEST_BODIES * settings.predict_bytes)
        self._shelf = shelf
        self._threads = ThreadPoolExecutor(settings.predict_waiting + _AT_ONCE, "predict")
        self._turns = asyncio.Semaphore(min(_AT_ONCE, settings.engine_threads + 1))
        self._loading: dict[Digest, asyncio.Future[Predictor]] = {}

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def call(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Call a function on a thread of the desk."""
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @asynccontextmanager
    async def turn(self, bundle: Digest, deadline_s: float) -> AsyncIterator[Predictor]:
        """Hold one of the turns to decode and predict, with the model of a bundle. Raises DeadlineExceeded."""
        async with _in_time(deadline_s):
            predictor = await self._predictor(bundle)
            await self._turns.acquire()
        try:
            yield predictor
        finally:
            self._turns.release()

    async def _predictor(self, bundle: Digest) -> Predictor:
        """Return the model of a bundle. All wait for one load, and it goes on for the next when they give up."""
        loading = self._loading.get(bundle)
        if loading is None:
            loading = self._loading[bundle] = self.call(self._shelf.predictor, bundle)
            loading.add_done_callback(lambda done: self._loaded(bundle, done))
        return await asyncio.shield(loading)

    def _loaded(self, bundle: Digest, loading: asyncio.Future[Predictor]) -> None:
        del self._loading[bundle]
        if not loading.cancelled():
            loading.exception()  # asyncio complains of one that nobody was left to see


@asynccontextmanager
async def _in_time(deadline_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"Expected an answer within {deadline_s:g} s. Received none: the model is still being loaded, or others "
            "are answered first. Try again in a moment."
        ) from error


@router.post("/{name}/predict", openapi_extra=_IMAGES_BODY)
async def predict(
    request: Request,
    given: ServicesDep,
    principal: PrincipalDep,
    name: str,
    version: Annotated[Number | None, Query()] = None,
    alias: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
) -> PredictionsOut:
    """Predict images: one as the raw body, several as multipart fields `images` or as base64 in JSON.

    Answers with the `champion`, unless a version or an alias is asked for.
    """
    if version is not None and alias is not None:
        raise RequestInvalid("Expected a version or an alias. Received both.", field="alias")
    settings = given.settings
    deadline_s = settings.predict_deadline_s
    desk: Desk = request.app.state.desk
    size_bytes = bodies.declared_bytes(request)
    most = settings.predict_bytes
    with desk.admission.admit(most if size_bytes is None else min(size_bytes, most)) as take:
        async with _in_time(deadline_s):
            number, bundle = await desk.call(_find, given, principal, name, version, alias)
        images = await bodies.receive_images(
            request, settings.predict_images, most, settings.image_bytes, stall_s=deadline_s
        )
        take(len(images) - 1)
        arrived = time.perf_counter()
        async with desk.turn(bundle, deadline_s) as predictor:
            return await desk.call(_answer, given, name, number, predictor, images, arrived)


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


def _answer(
    given: Services, name: str, version: int, predictor: Predictor, images: list[bytes], arrived: float
) -> PredictionsOut:
    """Predict, waiting for the engine at most what is left of the deadline since the `perf_counter` of `arrived`."""
    settings = given.settings
    waited_s = time.perf_counter() - arrived
    left_s = max(0.0, settings.predict_deadline_s - waited_s)
    predictions, timings = predictor.predict(images, settings.image_limits, left_s)
    timings = replace(timings, queue=timings.queue + 1000 * waited_s)
    given.metrics.saw_prediction(len(images), asdict(timings))
    return PredictionsOut(
        model=name,
        version=version,
        predictions=[asdict(prediction) for prediction in predictions],
        timings_ms=TimingsOut(**{stage: round(spent, 3) for stage, spent in asdict(timings).items()}),
    )
