"""Predictions in one process: admission, model loading, decoding, the engine and deadlines. Knows no HTTP.

A prediction holds its admission from before its body is read until it is answered. It waits at most until its
deadline, and it takes no thread of other routes. One that is cancelled costs the engine nothing more.
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

# Bodies of the largest size that may be in memory at once.
_LARGEST_BODIES = 4
# Their images wait for memory one by one (`DecodeMemory`).
_DECODING_THREADS = 8
_LOOKUP_THREADS = 4
_EXPLAINING_THREADS = 2
_LOADING_THREADS = 4
# The shelf may evict a backbone just when it is asked. The prediction then loads it again, at most this often: more
# evictions mean that the shelf is too small.
_LOAD_ATTEMPTS = 3


class Admission:
    """Limits how many images and bytes are in the process at a time, and rejects the rest at once.

    Belongs to one event loop.
    """

    def __init__(self, limit_images: int, limit_bytes: int) -> None:
        self._limit_images = limit_images
        self._limit_bytes = limit_bytes
        self._images = 0
        self._bytes = 0

    @contextmanager
    def admit(self, size_bytes: int) -> Iterator[Callable[[int], None]]:
        """Admit one image in a body of `size_bytes`, and yield a function that admits more images of the same body.

        Both raise Overloaded if a limit would be exceeded. An idle process admits any request.
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
                f"Expected at most {self._limit_images} images waiting. Received {more_images} more while "
                f"{self._images} are waiting. Try again soon."
            )
        if self._bytes + size_bytes > self._limit_bytes:
            raise Overloaded(
                f"Expected at most {self._limit_bytes} bytes of images waiting. Received {size_bytes} more while "
                f"{self._bytes} are waiting. Try again soon."
            )


@dataclass(frozen=True)
class ExplanationRequest:
    """The kind of explanation that a client asks for, and the label to explain; None explains the answer itself."""

    kind: Explanation
    label: str | None


@dataclass(frozen=True)
class PredictionResult:
    """One prediction for each image, one explanation for each if asked for, and where the time went."""

    predictions: list[Prediction]
    explanations: list[ExplanationImage] | None
    timings: Timings


class PredictionQueue:
    """Takes predictions through loading, decoding, the engine and the head, each with its own threads.

    Belongs to one event loop.
    """

    def __init__(self, settings: Settings, shelf: Shelf, decode_memory: DecodeMemory) -> None:
        self.admission = Admission(settings.predict_waiting, _LARGEST_BODIES * settings.predict_bytes)
        self._settings = settings
        self._shelf = shelf
        self._decode_memory = decode_memory
        self._decoders = ThreadPoolExecutor(min(_DECODING_THREADS, settings.engine_threads + 1), "decode")
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, "look-up")
        self._explainers = ThreadPoolExecutor(_EXPLAINING_THREADS, "explain")  # they may read files of the store
        self._loaders = ThreadPoolExecutor(_LOADING_THREADS, "load")  # separate, since a load takes long
        self._loading: dict[Digest, asyncio.Future[Predictor]] = {}

    def close(self) -> None:
        """Cancel what has not begun, and accept nothing new."""
        for pool in (self._decoders, self._lookups, self._explainers, self._loaders):
            pool.shutdown(wait=False, cancel_futures=True)

    def run_lookup(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Run a function that reads the database on a thread kept for that."""
        return asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)

    def check_wait(self, bundle: Digest, images: int) -> None:
        """Raise Overloaded if the engine would not finish so many images within the deadline.

        The error carries `retry_after_s`. A model that is not loaded passes, as does an idle engine.
        """
        predictor = self._shelf.find(bundle)
        wait_s = predictor.wait_s(images) if predictor else 0.0
        if wait_s > self._settings.predict_deadline_s and predictor and predictor.wait_s(0):
            raise Overloaded(
                f"Expected an answer within {self._settings.predict_deadline_s:g} s. It would take {wait_s:.1f} s, "
                "because too many images wait for the same network. Try again after the time in Retry-After.",
                retry_after_s=round(wait_s - self._settings.predict_deadline_s, 3),
            )

    async def predict(
        self, bundle: Digest, files: list[bytes], deadline: Deadline, explanation: ExplanationRequest | None = None
    ) -> PredictionResult:
        """Predict image files, and explain the predictions if asked to.

        Args:
            bundle: the model version's bundle; it is loaded if it is not in memory.
            files: encoded images, one or more.
            deadline: of the whole request; every stage counts.
            explanation: what to explain, if anything.

        Raises:
            DeadlineExceeded: the answer is not ready in time; it names the stage that took the time.
            Overloaded: the engine cannot finish the images within the deadline.
            ImageRefused: a file cannot be decoded.
            Unavailable: the shelf evicts the network again and again.
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
            if pending is None:  # evicted meanwhile
                continue
            try:
                computed = await deadline.wait(Stage.ENGINE, asyncio.wrap_future(pending))
            finally:
                pending.abandon()  # has no effect on one that has ended
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
            # The rest of the time was spent waiting for the model and for the engine.
            queue_ms = max(0.0, 1000 * (computed_at - arrived_at - decoded_s) - computed.backbone_ms)
            timings = Timings(queue_ms, 1000 * decoded_s, computed.backbone_ms, head_ms)
            return PredictionResult(predictions, explanations, timings)
        raise Unavailable(
            "Clients ask for more networks at once than fit into ESPALIER_SHELF_BYTES. Try again, or raise the setting."
        )

    async def _decode(self, predictor: Predictor, files: list[bytes], deadline: Deadline, scale: int = 1) -> Pixels:
        """Return the pixels of all files, uint8 [n, H, W, 3]; the first error cancels what has not begun.

        With a `scale`, height and width are so many times those of the network's input.

        At the deadline the request gives its decoders up: an image that is being decoded ends without it.
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
        """Return the predictor of a bundle. All requests wait for one load, which goes on when they give up."""
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
    """Retrieve the exception of an abandoned future, which asyncio would otherwise report in the log."""
    if not future.cancelled():
        future.exception()
