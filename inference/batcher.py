"""Batches images for one backbone: images that arrive while the engine is busy form the next batch. Knows no heads.

There is no timer. Two threads alternate. While one thread runs its batch in the engine, the other copies waiting images
into the next batch. As soon as the engine is free, the other thread adds images that have arrived meanwhile, and runs.
The future of every request ends with a result or an error, even if a thread dies, because callers wait for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from artifacts.features import Features
from artifacts.images import Pixels
from errors import DeadlineExceeded, OutOfMemory, Unavailable
from inference.engine import Engine

Maps = npt.NDArray[np.float32]

# Two threads: one runs a batch in the engine, the other prepares the next batch.
_IN_FLIGHT = 2
# Weight of the newest batch in the moving average of the engine's slowdown.
_NEWEST = 0.2
LARGEST_BATCH = 64
# A larger batch size is used only if it raises the images per second by this factor and a batch takes at most so long.
LEAST_GAIN = 1.03
LONGEST_BATCH_S = 0.5
# How often a pair of batch sizes is measured. After two measurements, no more begin once they took so many seconds.
_TIMED = 7
_TIMED_S = 1.0
# Measuring ends after so many sizes in a row without a gain. One such size may be an accident, so it is not enough.
_IN_VAIN = 2

_ENDING = "The network was unloaded, or the service is shutting down. Try again in a moment."


@dataclass(frozen=True)
class BackboneOutput:
    """The backbone's output for the n images of one request, whose images may have been in several batches.

    Attributes:
        features: float32 [n, D].
        maps: float32 [n, h, w, D]; None if the request did not ask for maps.
        backbone_ms: milliseconds from the start of the request's first batch to the end of its last batch.
        batch: number of images in the request's last batch, including images of other requests.
    """

    features: Features
    maps: Maps | None
    backbone_ms: float
    batch: int


class FeatureFuture(Future[BackboneOutput]):
    """The future of a request's BackboneOutput. It always ends with a result, an error or a cancellation."""

    is_abandoned = False

    def abandon(self) -> None:
        """Give up the request: its images that have not reached the engine yet are dropped."""
        self.is_abandoned = True
        self.cancel()


@dataclass
class _Request:
    """A request whose images wait or are in the engine. Changed only by the holder of the batcher's lock.

    Attributes:
        features: the features computed so far, by index of the image.
        maps: the maps computed so far, by index of the image.
    """

    pixels: Pixels
    wants_maps: bool
    until: float
    future: FeatureFuture
    arrived: float
    is_taken: bool = False
    started: float | None = None
    features: dict[int, Features] = field(default_factory=dict)
    maps: dict[int, Maps] = field(default_factory=dict)


@dataclass(frozen=True)
class _QueuedImage:
    """One image of a request, by its index in the request."""

    request: _Request
    index: int


class _WaitEstimator:
    """Estimates how long batches take: the seconds measured on an idle engine, times the current slowdown.

    The idle measurements give the seconds for each batch size, because a full batch takes less time per image than a
    small one. The slowdown is a moving average over recent batches: their seconds divided by the idle seconds.
    """

    def __init__(self, timed: Mapping[int, float], limit: int) -> None:
        """Start from measurements.

        Args:
            timed: measured seconds of a batch, by batch size; if empty, the first batch becomes the measurement.
            limit: the largest batch size.
        """
        self._limit = limit
        self._slowness = 1.0
        self._alone_s = _seconds_by_size(timed, limit) if timed else []

    def update(self, images: int, seconds: float) -> None:
        """Update the slowdown with a batch of `images` that took `seconds`."""
        if not self._alone_s:
            self._alone_s = _seconds_by_size({images: seconds}, self._limit)
        self._slowness = (1 - _NEWEST) * self._slowness + _NEWEST * seconds / self._alone_s[images]

    def seconds(self, images: int) -> float:
        """Return the estimated seconds for so many images, in full batches and a last smaller one.

        Returns 0 without measurements.
        """
        if not self._alone_s:
            return 0.0
        full, rest = divmod(images, self._limit)
        return self._slowness * (full * self._alone_s[self._limit] + self._alone_s[rest])


def _seconds_by_size(timed: Mapping[int, float], limit: int) -> list[float]:
    """Return the seconds of a batch as a list by size, from 0 to `limit`.

    Between measured sizes they are interpolated; outside they are proportional to the nearest measured size.
    """
    sizes = np.arange(1, limit + 1)
    known = sorted(timed)
    nearest = np.clip(sizes, known[0], known[-1])
    return [0.0, *(np.interp(nearest, known, [timed[size] for size in known]) * sizes / nearest).tolist()]


class Batcher:
    """Runs one engine for many callers, whose images share batches."""

    def __init__(
        self,
        engine: Engine,
        limit: int,
        timed: Mapping[int, float] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the threads.

        Args:
            engine: computes the features.
            limit: maximum images of a batch, at least 1.
            timed: measured seconds of a batch by size, for estimates before the first batch.
            now: the clock.
        """
        self._engine = engine
        self._now = now
        self.engine = engine.name
        self.limit = limit
        self._waiting: deque[_QueuedImage] = deque()
        self._changed = threading.Condition()
        # A thread holds the first lock while it prepares a batch, and the second while it runs the engine.
        self._turnstile, self._engine_free = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._in_engine = 0
        self._pace = _WaitEstimator(timed or {}, limit)
        self.busy_s = 0.0
        self.batches = self.images = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"batcher-{number}", daemon=True) for number in range(_IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, pixels: Pixels, until: float, *, wants_maps: bool = False) -> FeatureFuture:
        """Queue the images of a request, and return a future of their output.

        If the future is cancelled before the engine takes the images, they are not computed.

        Args:
            pixels: uint8 [n, H, W, 3].
            until: the deadline, as a time of this batcher's clock.
            wants_maps: whether the output shall contain the maps.

        Returns:
            a future that always ends. Its error is DeadlineExceeded if the engine has not taken the images in time,
            Unavailable if the batcher is closed, or an error of the engine.
        """
        future = FeatureFuture()
        request = _Request(pixels, wants_maps, until, future, self._now())
        with self._changed:
            if self._is_closed:
                future.set_exception(Unavailable(_ENDING))
                return future
            self._waiting.extend(_QueuedImage(request, index) for index in range(len(pixels)))
            self._changed.notify()
        return future

    def wait_s(self, images: int = 0) -> float:
        """Return the estimated seconds until all waiting images and `images` more are computed; 0 if unknown."""
        with self._changed:
            return self._pace.seconds(sum(map(_is_awaited, self._waiting)) + self._in_engine + images)

    def oldest_s(self) -> float:
        """Return how many seconds the oldest waiting image has waited; 0 if no image waits."""
        with self._changed:
            oldest = next((slot for slot in self._waiting if _is_awaited(slot)), None)
            return self._now() - oldest.request.arrived if oldest else 0.0

    def queued(self) -> int:
        """Return how many images wait."""
        with self._changed:
            return sum(map(_is_awaited, self._waiting))

    @property
    def is_closed(self) -> bool:
        """Whether further requests fail with Unavailable."""
        return self._is_closed

    def close(self, within_s: float = 30.0) -> None:
        """Refuse new requests, answer the waiting requests, and stop the threads.

        Requests that are not answered within `within_s` seconds fail with Unavailable.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._end()

    # --- the threads --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._run_batch():
                pass
        finally:
            self._end()

    def _run_batch(self) -> bool:
        """Run one batch through the engine. Return False if the batcher is closed and no images wait."""
        slots: list[_QueuedImage] = []
        try:
            with contextlib.ExitStack() as engine:
                with self._turnstile:
                    self._wait_for_images(slots)
                    if not slots:
                        return False
                    pixels = np.empty((self.limit, *slots[0].request.pixels.shape[1:]), np.uint8)
                    _copy_pixels(slots, pixels)
                    engine.enter_context(self._engine_free)
                    self._refill(slots, pixels)
                if not slots:
                    return True
                started = self._now()
                for slot in slots:
                    slot.request.started = slot.request.started or started
                wants_maps = any(slot.request.wants_maps for slot in slots)
                features, maps = self._engine.run(pixels[: len(slots)], wants_maps=wants_maps)
                ended = self._now()
            self._resolve(slots, features, maps, started, ended)
        except BaseException as error:  # any error must end the futures, because callers wait for them
            _fail([slot.request for slot in slots], error)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                self._in_engine -= len(slots)
        return True

    def _end(self) -> None:
        """Close the batcher and fail all waiting requests, because a thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            left, self._waiting = self._waiting, deque()
        _fail([slot.request for slot in left], Unavailable(_ENDING))

    def _wait_for_images(self, slots: list[_QueuedImage]) -> None:
        """Wait for images of requests that still need an answer, and move up to `limit` of them to `slots`.

        If the batcher is closed and no images wait, `slots` stays empty.
        """
        with self._changed:
            while not self._add_waiting(slots) and not self._is_closed:
                self._changed.wait()

    def _refill(self, slots: list[_QueuedImage], pixels: Pixels) -> None:
        """Update a prepared batch just before it runs: drop abandoned images, and add images that have arrived since.

        The engine waits during this call. It is short: copying an image of 299 × 299 pixels takes about 30 µs.
        """
        with self._changed:
            kept = [index for index, slot in enumerate(slots) if self._needs_answer(slot.request)]
            self._in_engine -= len(slots) - len(kept)
            if len(kept) < len(slots):
                slots[:] = [slots[index] for index in kept]
                pixels[: len(kept)] = pixels[kept]
            self._add_waiting(slots)
        _copy_pixels(slots, pixels, len(kept))

    def _add_waiting(self, slots: list[_QueuedImage]) -> bool:
        """Move waiting images to `slots`, up to `limit`; drop images whose request needs no answer any more.

        The caller holds the lock. Return whether any image was moved.
        """
        before = len(slots)
        while self._waiting and len(slots) < self.limit:
            slot = self._waiting.popleft()
            if self._needs_answer(slot.request):
                slots.append(slot)
        self._in_engine += len(slots) - before
        return len(slots) > before

    def _needs_answer(self, request: _Request) -> bool:
        """Return whether the engine should compute an image of a request. Fail the request if its deadline is over."""
        future = request.future
        if future.done():  # cancelled, or failed with an earlier image
            return False
        if not request.is_taken and not future.set_running_or_notify_cancel():
            return False
        request.is_taken = True
        now = self._now()
        if future.is_abandoned or now > request.until:
            _fail(
                [request],
                DeadlineExceeded(
                    f"The engine was still busy with earlier images after {now - request.arrived:.1f} s. Try again, or "
                    "send fewer images at once."
                ),
            )
            return False
        return True

    def _resolve(
        self, slots: Sequence[_QueuedImage], features: Features, maps: Maps | None, started: float, ended: float
    ) -> None:
        complete = []
        with self._changed:
            self.batches += 1
            self.images += len(slots)
            self.busy_s += ended - started
            self._pace.update(len(slots), ended - started)
            for row, slot in enumerate(slots):
                request = slot.request
                request.features[slot.index] = features[row]
                if request.wants_maps and maps is not None:
                    request.maps[slot.index] = maps[row]
                if len(request.features) == len(request.pixels):
                    complete.append(request)
        for request in complete:
            with contextlib.suppress(InvalidStateError):  # the request failed because of another of its images
                request.future.set_result(_backbone_output(request, ended, len(slots)))


def _copy_pixels(slots: Sequence[_QueuedImage], pixels: Pixels, begin: int = 0) -> None:
    """Copy the pixels of images into the batch array, from index `begin` on."""
    for row in range(begin, len(slots)):
        pixels[row] = slots[row].request.pixels[slots[row].index]


def _is_awaited(slot: _QueuedImage) -> bool:
    return not (slot.request.future.is_abandoned or slot.request.future.done())


def _fail(requests: Iterable[_Request], error: BaseException) -> None:
    for request in requests:
        with contextlib.suppress(InvalidStateError):  # the request was already answered, cancelled or failed
            request.future.set_exception(error)


def _backbone_output(request: _Request, ended: float, batch: int) -> BackboneOutput:
    assert request.started is not None
    order = range(len(request.pixels))
    return BackboneOutput(
        features=np.stack([request.features[index] for index in order]),
        maps=np.stack([request.maps[index] for index in order]) if request.wants_maps else None,
        backbone_ms=1000 * (ended - request.started),
        batch=batch,
    )


def time_batches(seconds: Callable[[int], float], largest: int = LARGEST_BATCH) -> dict[int, float]:
    """Measure how many seconds a batch takes, for the batch sizes 1, 2, 4 and so on.

    Measuring ends when two sizes in a row bring no gain, or a size raises OutOfMemory. Each size is measured in turns
    with its half, and the minimum of each counts. So other load on the machine does not distort the comparison: a short
    peak lengthens only single measurements, and a long one affects both sizes.

    Args:
        seconds: runs a batch of so many images and returns its seconds. The first call with a size only warms up.
        largest: the largest batch size to measure.

    Returns:
        the minimum seconds of a batch, by size.
    """
    seconds(1)
    size, timed, in_vain = 1, {1: seconds(1)}, 0
    while 2 * size <= largest and 2 * timed[size] <= LONGEST_BATCH_S and in_vain < _IN_VAIN:
        try:
            seconds(2 * size)
            times: list[tuple[float, float]] = []
            while len(times) < 2 or (len(times) < _TIMED and sum(map(sum, times)) < _TIMED_S):
                times.append((seconds(size), seconds(2 * size)))
        except OutOfMemory:
            break
        halves, wholes = zip(*times, strict=True)
        timed[size] = min(timed[size], *halves)
        best = max(images / taken for images, taken in timed.items())
        size *= 2
        timed[size] = min(wholes)
        in_vain = 0 if size / timed[size] >= LEAST_GAIN * best else in_vain + 1
    return timed


def best_batch(timed: Mapping[int, float]) -> int:
    """Return the smallest batch size that processes nearly (within 3 %) the most images per second.

    `timed` has the seconds of a batch by size, as `time_batches` returns them.
    """
    best = max(size / seconds for size, seconds in timed.items())
    return min(size for size, seconds in timed.items() if LEAST_GAIN * size / seconds > best)
