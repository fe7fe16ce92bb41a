"""Batches for one backbone: what waits while the engine works goes through it together. Knows no heads, HTTP or files.

There is no timer. Two threads take turns: while the engine computes the batch of one, the other has taken what waits
and stands ready, so that the engine never idles. A request ends with an answer or an error, whatever dies: its future
is the only thing that its asker holds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from artifacts.features import Features
from artifacts.images import Pixels
from errors import DeadlineExceeded, Unavailable
from inference.engine import Engine

Maps = npt.NDArray[np.float32]

# One batch in the engine, and one ready.
_IN_FLIGHT = 2
# How much the newest batch counts in the measured rate.
_NEWEST = 0.2
LARGEST_BATCH = 64
# A larger batch that gains less than this only makes everybody wait longer, as does one that takes longer than that.
LEAST_GAIN = 1.03
LONGEST_BATCH_S = 0.5

_ENDING = "The network was put away, or the service is ending. Ask again in a moment."


@dataclass(frozen=True)
class Computed:
    """What the engine made of a request's images, and where the time went.

    Attributes:
        features: float32 [n, D].
        maps: float32 [n, h, w, D], if the request asked for them.
        backbone_ms: from when the engine took its first image until its last one was done.
        batch: how many images were in the batch of its last image.
    """

    features: Features
    maps: Maps | None
    backbone_ms: float
    batch: int


class Asked(Future[Computed]):
    """The answer to a request, once it is there; it always ends."""

    has_left = False

    def leave(self) -> None:
        """Say that nobody waits any more: the engine sees none of its images that it has not begun with."""
        self.has_left = True
        self.cancel()


@dataclass
class _Request:
    """Images that wait or are in the engine, and what is known of each by its place; changed under a lock."""

    pixels: Pixels
    wants_maps: bool
    until: float
    future: Asked
    arrived: float
    is_taken: bool = False
    started: float | None = None
    features: dict[int, Features] = field(default_factory=dict)
    maps: dict[int, Maps] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slot:
    """One image of a request."""

    request: _Request
    index: int


class Batcher:
    """Runs one engine for many askers."""

    def __init__(self, engine: Engine, limit: int, now: Callable[[], float] = time.perf_counter) -> None:
        """Begin to wait for requests; `limit` is the most images of a batch, from 1."""
        self._engine = engine
        self._now = now
        self.engine = engine.name
        self.limit = limit
        self._waiting: deque[_Slot] = deque()
        self._changed = threading.Condition()
        # Whoever holds the first has a batch ready, whoever holds the second is in the engine: batches keep order.
        self._turnstile, self._engine_free = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._in_engine = 0
        self._seconds_per_image: float | None = None
        self.busy_s = 0.0
        self.batches = self.images = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"batcher-{number}", daemon=True) for number in range(_IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, pixels: Pixels, until: float, *, wants_maps: bool = False) -> Asked:
        """Ask for the features of images, uint8 [n, H, W, 3]; return a future that always ends.

        A future that is cancelled before the engine takes its images costs nothing. `until` is the moment, on this
        batcher's clock, after which nobody wants the answer: then the future ends with DeadlineExceeded. Other errors
        are Unavailable once this is closed, and whatever the engine raises.
        """
        future = Asked()
        request = _Request(pixels, wants_maps, until, future, self._now())
        with self._changed:
            if self._is_closed:
                future.set_exception(Unavailable(_ENDING))
                return future
            self._waiting.extend(_Slot(request, index) for index in range(len(pixels)))
            self._changed.notify()
        return future

    def wait_s(self, images: int = 0) -> float:
        """Return how long it should take until this many more images have been computed; 0 until that was measured."""
        per_image = self._seconds_per_image
        if per_image is None:
            return 0.0
        with self._changed:
            return per_image * (sum(map(_is_awaited, self._waiting)) + self._in_engine + images)

    def oldest_s(self) -> float:
        """Return how long the image that waits longest has waited."""
        with self._changed:
            oldest = next((slot for slot in self._waiting if _is_awaited(slot)), None)
            return self._now() - oldest.request.arrived if oldest else 0.0

    def queued(self) -> int:
        """Return how many images wait."""
        with self._changed:
            return sum(map(_is_awaited, self._waiting))

    @property
    def is_closed(self) -> bool:
        """Whether every further request is turned away."""
        return self._is_closed

    def close(self, within_s: float = 30.0) -> None:
        """Take no more requests, answer those that wait, and end; what is not answered in time ends with an error."""
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
            while self._one_batch():
                pass
        finally:
            self._end()

    def _one_batch(self) -> bool:
        """See one batch through the engine; return False at the end."""
        slots: list[_Slot] | None = None
        try:
            with self._turnstile:
                slots = self._take()
                if slots is None:
                    return False
                pixels = np.stack([slot.request.pixels[slot.index] for slot in slots])
                self._engine_free.acquire()
            self._compute(slots, pixels)
        except BaseException as error:  # whatever it is, nobody waits for ever
            _fail([slot.request for slot in slots or ()], error)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                self._in_engine -= len(slots or ())
        return True

    def _end(self) -> None:
        """Let nobody wait for threads that are gone, however they went."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            left, self._waiting = self._waiting, deque()
        _fail([slot.request for slot in left], Unavailable(_ENDING))

    def _take(self) -> list[_Slot] | None:
        """Wait for images; return up to `limit` of those that are still wanted, or None at the end."""
        with self._changed:
            while True:
                slots: list[_Slot] = []
                while self._waiting and len(slots) < self.limit:
                    slot = self._waiting.popleft()
                    if self._is_wanted(slot.request):
                        slots.append(slot)
                if slots:
                    self._in_engine += len(slots)
                    return slots
                if self._is_closed:
                    return None
                self._changed.wait()

    def _is_wanted(self, request: _Request) -> bool:
        """Say whether the engine should see an image of a request; one whose time is over ends here."""
        future = request.future
        if future.done():  # cancelled, or failed with an earlier image
            return False
        if not request.is_taken and not future.set_running_or_notify_cancel():
            return False
        request.is_taken = True
        now = self._now()
        if future.has_left or now > request.until:
            _fail(
                [request],
                DeadlineExceeded(
                    f"The engine was still busy after {now - request.arrived:.1f} s. Try again, or send fewer images "
                    "at once."
                ),
            )
            return False
        return True

    def _compute(self, slots: Sequence[_Slot], pixels: Pixels) -> None:
        try:
            started = self._now()
            for slot in slots:
                slot.request.started = slot.request.started or started
            wants_maps = any(slot.request.wants_maps for slot in slots)
            features, maps = self._engine.run(pixels, wants_maps=wants_maps)
            ended = self._now()
        finally:
            self._engine_free.release()
        complete = []
        with self._changed:
            self._measure(len(slots), ended - started)
            for place, slot in enumerate(slots):
                request = slot.request
                request.features[slot.index] = features[place]
                if request.wants_maps and maps is not None:
                    request.maps[slot.index] = maps[place]
                if len(request.features) == len(request.pixels):
                    complete.append(request)
        for request in complete:
            with contextlib.suppress(InvalidStateError):  # it failed with another of its images
                request.future.set_result(_computed(request, ended, len(slots)))

    def _measure(self, images: int, seconds: float) -> None:
        self.batches += 1
        self.images += images
        self.busy_s += seconds
        newest = seconds / images
        before = self._seconds_per_image
        self._seconds_per_image = newest if before is None else (1 - _NEWEST) * before + _NEWEST * newest


def _is_awaited(slot: _Slot) -> bool:
    return not (slot.request.future.has_left or slot.request.future.done())


def _fail(requests: Iterable[_Request], error: BaseException) -> None:
    for request in requests:
        with contextlib.suppress(InvalidStateError):  # it was answered, cancelled or failed already
            request.future.set_exception(error)


def _computed(request: _Request, ended: float, batch: int) -> Computed:
    assert request.started is not None
    order = range(len(request.pixels))
    return Computed(
        features=np.stack([request.features[index] for index in order]),
        maps=np.stack([request.maps[index] for index in order]) if request.wants_maps else None,
        backbone_ms=1000 * (ended - request.started),
        batch=batch,
    )


def best_batch(seconds: Callable[[int], float], largest: int = LARGEST_BATCH) -> int:
    """Return the smallest batch whose rate is within 3 % of the best, doubling it for as long as that gains.

    Args:
        seconds: measures how long a batch of so many images takes.
        largest: the most that is tried.
    """
    size, best = 1, 1 / seconds(1)
    while 2 * size <= largest and 2 * size / best <= LONGEST_BATCH_S:
        gained = 2 * size / seconds(2 * size)
        if gained < LEAST_GAIN * best:
            break
        size, best = 2 * size, gained
    return size
