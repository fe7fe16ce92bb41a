"""Predictions in one process: admission, model loading, decoding, the engine and deadlines. Knows no HTTP.

A prediction is admitted before its body is read, and counts against the limits until it is answered. It waits at most
until its deadline. Predictions have their own threads, so other routes never wait for them. If a prediction is
cancelled, the engine skips its images.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from api.deadline import Deadline, Stage
from artifacts.decode_memory import DecodeMemory
from artifacts.images import Pixels
from artifacts.store import Digest
from errors import Overloaded, Unavailable
from inference.batcher import BackboneOutput
from inference.explain import Explanation
from inference.predictor import ExplanationImage, Prediction, Predictor, Timings
from inference.shelf import Shelf
from settings import Settings

Result = TypeVar("Result")

# Number of bodies of the largest allowed size that may be in memory at once.
_LARGEST_BODIES = 4
# The images in them wait for memory one by one (`DecodeMemory`).
_DECODING_THREADS = 8
_LOOKUP_THREADS = 4
_EXPLAINING_THREADS = 2
_LOADING_THREADS = 4
# The shelf may evict a backbone just before a prediction uses it. The prediction then loads the backbone again, but not
# more often than this, because repeated evictions mean that the shelf is too small.
_LOAD_ATTEMPTS = 3


class Admission:
    """Limits how many images and bytes of predictions are in the process at a time. Refuses further requests at once.

    An object may only be used in one event loop.
    """

    def __init__(self, limit_images: int, limit_bytes: int) -> None:
        self._limit_images = limit_images
        self._limit_bytes = limit_bytes
        self._images = 0
        self._bytes = 0

    @contextmanager
    def admit(self, size_bytes: int) -> Iterator[Callable[[int], None]]:
        """Admit a request with one image and `size_bytes` of body, until the end of the block.

        Yields a function that admits more images of the same request, once their number is known. This method and that
        function raise Overloaded if a limit would be exceeded. An idle process admits any request.
        """
        self._check(0, 1, size_bytes)
        images = 1
        self._images += 1
        self._bytes += size_bytes

        def admit_more(count: int) -> None:
            nonlocal images
            self._check(images, count, 0)
            images += count
            self._images += count

        try:
            yield admit_more
        finally:
            self._images -= images
            self._bytes -= size_bytes

    def _check(self, held_images: int, more_images: int, size_bytes: int) -> None:
        if self._images == held_images:
            return
        if self._images + more_images > self._limit_images:
            raise Overloaded(
                f"{self._images} images are waiting, and this request has {more_images} more; the limit is "
                f"{self._limit_images}. Try again in a moment."
            )
        if self._bytes + size_bytes > self._limit_bytes:
            raise Overloaded(
                f"{self._bytes} bytes of images are waiting, and this request has {size_bytes} more; the limit is "
                f"{self._limit_bytes}. Try again in a moment."
            )


@dataclass(frozen=True)
class ExplanationRequest:
    """The kind of explanation that a client asks for, and the label to explain. None means the predicted label."""

    kind: Explanation
    label: str | None


@dataclass(frozen=True)
class PredictionResult:
    """A prediction for each image, an explanation for each image if requested, and the time of each stage."""

    predictions: list[Prediction]
    explanations: list[ExplanationImage] | None
    timings: Timings


class PredictionQueue:
    """Answers predictions: loads the model, decodes the images, and runs the engine and the head.

    Loading, decoding and explaining have separate threads. An object may only be used in one event loop.
    """

    def __init__(self, settings: Settings, shelf: Shelf, decode_memory: DecodeMemory) -> None:
        self.admission = Admission(settings.predict_waiting, _LARGEST_BODIES * settings.predict_bytes)
        self._settings = settings
        self._shelf = shelf
        self._decode_memory = decode_memory
        self._decoders = ThreadPoolExecutor(min(_DECODING_THREADS, settings.engine_threads + 1), "decode")
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, "look-up")
        self._explainers = ThreadPoolExecutor(_EXPLAINING_THREADS, "explain")  # separate, since it may read the store
        self._loaders = ThreadPoolExecutor(_LOADING_THREADS, "load")  # separate, since loading takes long
        self._loading: dict[Digest, asyncio.Future[Predictor]] = {}

    def close(self) -> None:
        """Cancel work that has not begun, and refuse new predictions."""
        for pool in (self._decoders, self._lookups, self._explainers, self._loaders):
            pool.shutdown(wait=False, cancel_futures=True)

    def run_lookup(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Run a function that reads the database, on a thread that is reserved for such functions."""
        return asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)

    def check_wait(self, bundle: Digest, images: int) -> None:
        """Raise Overloaded if the engine cannot finish this many images within the deadline.

        The error's `retry_after_s` says when to try again. Never raises if the model is not loaded yet, or if the
        engine is idle.
        """
        predictor = self._shelf.find(bundle)
        wait_s = predictor.wait_s(images) if predictor else 0.0
        if wait_s > self._settings.predict_deadline_s and predictor and predictor.wait_s(0):
            raise Overloaded(
                f"The answer would take {wait_s:.1f} s, because many images wait for the same network; the limit is "
                f"{self._settings.predict_deadline_s:g} s. Try again after the seconds in the header Retry-After.",
                retry_after_s=round(wait_s - self._settings.predict_deadline_s, 3),
            )

    async def predict(
        self, bundle: Digest, files: list[bytes], deadline: Deadline, explanation: ExplanationRequest | None = None
    ) -> PredictionResult:
        """Predict image files, and explain the predictions if requested.

        Args:
            bundle: the bundle of the model version. It is loaded if it is not in memory.
            files: one or more encoded images.
            deadline: the deadline of the whole request. Every stage counts.
            explanation: the explanation to compute, or None.

        Raises:
            DeadlineExceeded: the answer is not ready in time; it names the stage that took the time.
            Overloaded: the engine cannot finish the images within the deadline.
            ImageRefused: a file cannot be decoded.
            Unavailable: the shelf evicts the network repeatedly, because it is too small for all requested models.
            EspalierError: the model cannot be loaded or does not support the explanation.
        """
        arrived_at = time.perf_counter()
        decoded_s = 0.0
        pixels: Pixels | None = None
        for _ in range(_LOAD_ATTEMPTS):
            predictor = await deadline.wait(Stage.LOAD, self._predictor(bundle))
            self.check_wait(bundle, len(files))
            if explanation is not None:
                predictor.check_explains(explanation.kind)
            if pixels is None:
                began = time.perf_counter()
                pixels = await self._decode(predictor, files, deadline)
                decoded_s = time.perf_counter() - began
            needs_maps = explanation is not None and explanation.kind.needs_maps
            pending = predictor.submit(pixels, deadline.until, wants_maps=needs_maps)
            if pending is None:  # the shelf has evicted the backbone meanwhile
                continue
            try:
                computed = await deadline.wait(Stage.ENGINE, asyncio.wrap_future(pending))
            finally:
                pending.abandon()  # does nothing if the request has ended
            computed_at = time.perf_counter()
            predictions = predictor.answer(computed.features)
            head_ms = 1000 * (time.perf_counter() - computed_at)
            explanations = None
            if explanation is not None:
                shown = pixels
                if explanation.kind is Explanation.HEATMAP and predictor.heat_map_scale > 1:
                    shown = await self._decode(predictor, files, deadline, predictor.heat_map_scale)
                explaining = self._explain(predictor, explanation, shown, computed, predictions, deadline)
                explanations = await deadline.wait(Stage.EXPLAIN, explaining)
            # The remaining time was spent waiting for the model and for the engine.
            queue_ms = max(0.0, 1000 * (computed_at - arrived_at - decoded_s) - computed.backbone_ms)
            timings = Timings(queue_ms, 1000 * decoded_s, computed.backbone_ms, head_ms)
            return PredictionResult(predictions, explanations, timings)
        raise Unavailable(
            "Clients ask for more networks at once than fit into ESPALIER_SHELF_BYTES. Try again, or raise the setting."
        )

    async def _decode(self, predictor: Predictor, files: list[bytes], deadline: Deadline, scale: int = 1) -> Pixels:
        """Return the pixels of all files, uint8 [n, H, W, 3]. After an error, files not yet begun are not decoded.

        With a `scale`, height and width are this many times those of the network's input.

        At the deadline, the request stops waiting: an image that is being decoded then ends without it.
        """
        loop = asyncio.get_running_loop()
        limits = self._settings.image_limits
        begun = asyncio.Event()

        @contextmanager
        def reserve(size_bytes: int) -> Iterator[None]:
            with self._decode_memory.reserve(size_bytes, deadline.until):
                loop.call_soon_threadsafe(begun.set)
                yield

        def decode(position: int, file: bytes) -> Pixels:
            try:
                return predictor.decode(position, file, limits, deadline.until, scale, reserve)
            finally:  # it may be refused before it needs memory
                loop.call_soon_threadsafe(begun.set)

        decoding = [loop.run_in_executor(self._decoders, decode, position, file) for position, file in enumerate(files)]
        try:
            await deadline.wait(Stage.DECODER, begun.wait())
            return np.stack([await deadline.wait(Stage.DECODE, one) for one in decoding])
        finally:
            for one in decoding:
                one.cancel()
                one.add_done_callback(retrieve_exception)

    async def _explain(
        self,
        predictor: Predictor,
        explanation: ExplanationRequest,
        pixels: Pixels,
        computed: BackboneOutput,
        predictions: list[Prediction],
        deadline: Deadline,
    ) -> list[ExplanationImage]:
        arguments = (
            explanation.kind,
            explanation.label,
            pixels,
            computed,
            predictions,
            self._settings.image_limits,
            partial(self._decode_memory.reserve, until=deadline.until),
        )
        return await asyncio.get_running_loop().run_in_executor(self._explainers, predictor.explain, *arguments)

    async def _predictor(self, bundle: Digest) -> Predictor:
        """Return the predictor of a bundle, after loading it if necessary.

        Requests for the same bundle share one load. The load continues even if all of them give up.
        """
        found = self._shelf.find(bundle)
        if found is not None:
            return found
        loading = self._loading.get(bundle)
        if loading is None:
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._loaders, self._shelf.predictor, bundle)
            self._loading[bundle] = loading
            loading.add_done_callback(lambda done: self._loaded(bundle, done))
        return await asyncio.shield(loading)

    def _loaded(self, bundle: Digest, loading: asyncio.Future[Predictor]) -> None:
        del self._loading[bundle]
        retrieve_exception(loading)


def retrieve_exception(future: asyncio.Future[Result]) -> None:
    """Retrieve the exception of a future that nobody awaits. Otherwise asyncio would report it in the log."""
    if not future.cancelled():
        future.exception()
