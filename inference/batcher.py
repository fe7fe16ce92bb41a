"""Batches images for one backbone: those that arrive while the engine is busy form the next batch. Knows no heads.

There is no timer. Two threads alternate: while the engine computes the batch of one, the other prepares the next batch
from the waiting images; when the engine is free, it adds images that arrived since and runs. Every request ends with an
answer or an error, even if a thread dies: the caller holds only its future.
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

# One batch in the engine, one prepared.
_IN_FLIGHT = 2
# Weight of the newest batch in the moving average of the engine's slowdown.
_NEWEST = 0.2
LARGEST_BATCH = 64
# A larger batch must raise the rate by this factor, and take at most so long: otherwise it only adds waiting time.
LEAST_GAIN = 1.03
LONGEST_BATCH_S = 0.5
# Number of measurements of a pair of sizes, and a limit in seconds after at least two.
_TIMED = 7
_TIMED_S = 1.0
# Stop after so many sizes in a row without gain: too small a batch costs more than one more trial.
_IN_VAIN = 2

_ENDING = "The network was unloaded, or the service is shutting down. Try again in a moment."


@dataclass(frozen=True)
class BackboneOutput:
    """Output of the backbone for the images of a request, and the time it took.

    Attributes:
        features: float32 [n, D].
        maps: float32 [n, h, w, D], or None if the request did not ask for them.
        backbone_ms: time from the start of the batch of the first image to the end of that of the last one.
        batch: number of images in the batch of the last image.
    """

    features: Features
    maps: Maps | None
    backbone_ms: float
    batch: int


class FeatureFuture(Future[BackboneOutput]):
    """The future of a request's output; it always ends with a result, an error or a cancellation."""

    is_abandoned = False

    def abandon(self) -> None:
        """Declare that no caller waits any more: images that have not reached the engine are dropped."""
        self.is_abandoned = True
        self.cancel()


@dataclass
class _Request:
    """Images that wait or are in the engine, with the outputs so far by index; changed only under the lock."""

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
    """One image of a request."""

    request: _Request
    index: int


class _WaitEstimator:
    """Estimates how long batches take: measured seconds by size, times the current slowdown of the engine.

    The seconds by size come from idle measurements, because a full batch takes less time per image than a small one and
    recent batches may all have been small. The slowdown is a moving average over recent batches of any size.
    """

    def __init__(self, timed: Mapping[int, float], limit: int) -> None:
        """Start from measured seconds by batch size up to `limit`; without any, the first batch sets them."""
        self._limit = limit
        self._slowness = 1.0
        self._alone_s = _seconds_by_size(timed, limit) if timed else []

    def update(self, images: int, seconds: float) -> None:
        """Update the slowdown with a batch of `images` that took `seconds`."""
        if not self._alone_s:
            self._alone_s = _seconds_by_size({images: seconds}, self._limit)
        self._slowness = (1 - _NEWEST) * self._slowness + _NEWEST * seconds / self._alone_s[images]

    def seconds(self, images: int) -> float:
        """Return the estimated seconds for so many images, in full batches and a rest; 0 without measurements."""
        if not self._alone_s:
            return 0.0
        full, rest = divmod(images, self._limit)
        return self._slowness * (full * self._alone_s[self._limit] + self._alone_s[rest])


def _seconds_by_size(timed: Mapping[int, float], limit: int) -> list[float]:
    """Return the seconds of a batch by size from 0: interpolated between measured sizes, proportional outside."""
    sizes = np.arange(1, limit + 1)
    known = sorted(timed)
    nearest = np.clip(sizes, known[0], known[-1])
    return [0.0, *(np.interp(nearest, known, [timed[size] for size in known]) * sizes / nearest).tolist()]


class Batcher:
    """Runs one engine for many callers."""

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
        # The holder of the first lock prepares a batch, that of the second runs the engine: batches stay in order.
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
        """Queue images, uint8 [n, H, W, 3], and return a future of their features that always ends.

        A future that is cancelled before the engine takes its images costs nothing. `until` is a time on this
        batcher's clock: images that the engine has not taken by then end with DeadlineExceeded. Other errors are
        Unavailable after `close`, and whatever the engine raises.
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
        """Return the estimated seconds until so many more images would be computed; 0 before any measurement."""
        with self._changed:
            return self._pace.seconds(sum(map(_is_awaited, self._waiting)) + self._in_engine + images)

    def oldest_s(self) -> float:
        """Return the seconds that the longest waiting image has waited, 0 if none waits."""
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
        """Refuse new requests, answer the waiting ones and stop; unanswered ones fail after `within_s`."""
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
        """Run one batch through the engine; return False when closed and empty."""
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
        except BaseException as error:  # whatever it is, no caller may wait for ever
            _fail([slot.request for slot in slots], error)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                self._in_engine -= len(slots)
        return True

    def _end(self) -> None:
        """Close, and fail all waiting requests, since a thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            left, self._waiting = self._waiting, deque()
        _fail([slot.request for slot in left], Unavailable(_ENDING))

    def _wait_for_images(self, slots: list[_QueuedImage]) -> None:
        """Wait for images that are still wanted and take up to `limit`; take none when closed."""
        with self._changed:
            while not self._add_waiting(slots) and not self._is_closed:
                self._changed.wait()

    def _refill(self, slots: list[_QueuedImage], pixels: Pixels) -> None:
        """Drop abandoned images, and add images that arrived while the engine was busy.

        Most pixels were copied before; copying one image of 299 pixels takes about 30 µs.
        """
        with self._changed:
            kept = [place for place, slot in enumerate(slots) if self._is_wanted(slot.request)]
            self._in_engine -= len(slots) - len(kept)
            if len(kept) < len(slots):
                slots[:] = [slots[place] for place in kept]
                pixels[: len(kept)] = pixels[kept]
            self._add_waiting(slots)
        _copy_pixels(slots, pixels, len(kept))

    def _add_waiting(self, slots: list[_QueuedImage]) -> bool:
        """Move waiting images that are still wanted to `slots`, up to `limit`; the caller holds the lock."""
        before = len(slots)
        while self._waiting and len(slots) < self.limit:
            slot = self._waiting.popleft()
            if self._is_wanted(slot.request):
                slots.append(slot)
        self._in_engine += len(slots) - before
        return len(slots) > before

    def _is_wanted(self, request: _Request) -> bool:
        """Return whether the engine should compute an image; fail its request if the deadline is over."""
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
                    f"The engine was still busy after {now - request.arrived:.1f} s. Try again, or send fewer images "
                    "at once."
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
            for place, slot in enumerate(slots):
                request = slot.request
                request.features[slot.index] = features[place]
                if request.wants_maps and maps is not None:
                    request.maps[slot.index] = maps[place]
                if len(request.features) == len(request.pixels):
                    complete.append(request)
        for request in complete:
            with contextlib.suppress(InvalidStateError):  # it failed with another of its images
                request.future.set_result(_backbone_output(request, ended, len(slots)))


def _copy_pixels(slots: Sequence[_QueuedImage], pixels: Pixels, begin: int = 0) -> None:
    """Copy the pixels of images from index `begin` on into the batch array."""
    for place in range(begin, len(slots)):
        pixels[place] = slots[place].request.pixels[slots[place].index]


def _is_awaited(slot: _QueuedImage) -> bool:
    return not (slot.request.future.is_abandoned or slot.request.future.done())


def _fail(requests: Iterable[_Request], error: BaseException) -> None:
    for request in requests:
        with contextlib.suppress(InvalidStateError):  # it was answered, cancelled or failed already
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
    """Return the minimum seconds of a batch by size: 1, 2, 4 and so on until two sizes in a row gain nothing.

    Each size is timed alternately with its half, and the minima are compared: a short disturbance only lengthens single
    times, and a long one affects both sizes.

    Args:
        seconds: measures a batch of so many images; the first call with a size warms up and does not count.
        largest: the largest size to try; trying ends at a size that raises OutOfMemory.
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
    """Return the smallest batch size with a rate within 3 % of the best; `timed` has seconds by size."""
    best = max(size / seconds for size, seconds in timed.items())
    return min(size for size, seconds in timed.items() if LEAST_GAIN * size / seconds > best)
