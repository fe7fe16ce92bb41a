from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from artifacts.features import Features
from artifacts.images import Pixels
from errors import DeadlineExceeded, OutOfMemory, Unavailable
from inference.batcher import BackboneOutput, Batcher, FeatureFuture, best_batch, time_batches
from inference.engine import FlatEngine

LATER = 1e9


def images(*values: int) -> Pixels:
    """Return one grey image for each value, uint8 [n, 8, 8, 3]."""
    return np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])


@dataclass
class Gated(FlatEngine):
    """An engine that waits for its gate, notes its batches, and breaks if it is told to."""

    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)
    breaks: dict[int, BaseException] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        seen = [int(image[0, 0, 0]) for image in images]
        self.batches.append(seen)
        assert self.gate.wait(120)
        for value in seen:
            if value in self.breaks:
                raise self.breaks[value]
        return super().run(images, wants_maps=wants_maps)


@pytest.fixture
def engine() -> Gated:
    return Gated()


class Advanced:
    """A clock that can be put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.ahead_s


@pytest.fixture
def clock() -> Advanced:
    """The clock of `batcher`."""
    return Advanced()


@pytest.fixture
def batcher(engine: Gated, clock: Advanced) -> Iterator[Batcher]:
    batcher = Batcher(engine, limit=4, now=clock)
    yield batcher
    engine.gate.set()
    batcher.close()


def fill(batcher: Batcher, engine: Gated) -> list[FeatureFuture]:
    """Have one image in the engine and one ready; what comes after them waits."""
    first = batcher.submit(images(1), LATER)
    until(lambda: engine.batches)
    second = batcher.submit(images(2), LATER)
    until(lambda: batcher.queued() == 0)
    return [first, second]


def seen(engine: Gated) -> list[int]:
    """Return the images that came into the engine."""
    return [image for batch in engine.batches for image in batch]


def value(computed: BackboneOutput) -> list[int]:
    """Return the grey values that features tell of."""
    return [int(row[0]) for row in computed.features]


def test_what_comes_while_the_engine_works_is_in_the_next_batch(batcher: Batcher, engine: Gated) -> None:
    first, second = fill(batcher, engine)
    rest = [batcher.submit(images(number), LATER) for number in (3, 4, 5, 6, 7)]
    time.sleep(0.1)
    assert engine.batches == [[1]] and batcher.queued() == 5
    engine.gate.set()
    assert [value(future.result(120)) for future in (first, second, *rest)] == [[1], [2], [3], [4], [5], [6], [7]]
    assert engine.batches == [[1], [2, 3, 4, 5], [6, 7]]
    assert rest[0].result().batch == 4


def test_a_batch_that_stands_ready_loses_those_who_left_and_keeps_its_order(
    batcher: Batcher, engine: Gated, clock: Advanced
) -> None:
    first = batcher.submit(images(1), LATER)
    until(lambda: engine.batches)
    with batcher._changed:  # the thread that waits for them takes all at once
        ready = [batcher.submit(images(number), LATER) for number in (2, 3, 4)]
        late = batcher.submit(images(5), clock() + 3600)
    until(lambda: batcher.queued() == 0)
    came = [batcher.submit(images(*numbers), LATER) for numbers in ((6, 7), (8,))]
    ready[1].abandon()
    clock.ahead_s = 7200
    engine.gate.set()
    assert [value(future.result(120)) for future in (first, ready[0], ready[2], *came)] == [[1], [2], [4], [6, 7], [8]]
    assert engine.batches == [[1], [2, 4, 6, 7], [8]]
    assert isinstance(late.exception(120), DeadlineExceeded) and ready[1].exception(120) is not None


def test_a_batch_that_stands_ready_may_be_left_by_all(batcher: Batcher, engine: Gated) -> None:
    first, second = fill(batcher, engine)
    second.abandon()
    engine.gate.set()
    assert value(first.result(120)) == [1] and second.exception(120) is not None
    until(lambda: batcher.wait_s() == 0.0)
    assert value(batcher.submit(images(3), LATER).result(120)) == [3] and engine.batches == [[1], [3]]


def test_a_request_larger_than_a_batch_is_answered_in_its_order(batcher: Batcher, engine: Gated) -> None:
    engine.gate.set()
    future = batcher.submit(images(*range(11)), LATER, wants_maps=True)
    computed = future.result(120)
    assert value(computed) == list(range(11))
    assert computed.maps is not None and computed.maps.shape == (11, 1, 1, 48)
    assert sorted(seen(engine)) == list(range(11)) and max(map(len, engine.batches)) == 4


def test_only_who_asks_for_maps_gets_them(batcher: Batcher, engine: Gated) -> None:
    blocker = batcher.submit(images(0), LATER)
    plain, mapped = batcher.submit(images(1), LATER), batcher.submit(images(2), LATER, wants_maps=True)
    engine.gate.set()
    assert blocker.result(120).maps is plain.result(120).maps is None
    assert mapped.result(120).maps is not None


def test_a_request_whose_asker_left_costs_the_engine_nothing(batcher: Batcher, engine: Gated) -> None:
    taken = fill(batcher, engine)
    gone, stays = batcher.submit(images(3), LATER), batcher.submit(images(4), LATER)
    assert gone.cancel()
    engine.gate.set()
    assert value(stays.result(120)) == [4]
    assert 3 not in seen(engine)
    assert all(future.result(120) for future in taken)


def test_a_request_whose_time_is_over_is_told_and_costs_the_engine_nothing(
    batcher: Batcher, engine: Gated, clock: Advanced
) -> None:
    fill(batcher, engine)
    late = batcher.submit(images(3), clock() + 3600)
    clock.ahead_s = 7200
    engine.gate.set()
    with pytest.raises(DeadlineExceeded, match="still busy"):
        late.result(120)
    assert 3 not in seen(engine)


def test_a_batch_that_breaks_fails_those_in_it_and_no_others(batcher: Batcher, engine: Gated) -> None:
    blocker = batcher.submit(images(1), LATER)
    until(lambda: engine.batches)
    other = batcher.submit(images(2, 2, 2, 2), LATER)
    engine.breaks[4] = RuntimeError("no such layer")
    broken = [batcher.submit(images(number), LATER) for number in (3, 4)]
    engine.gate.set()
    assert value(blocker.result(120)) == [1] and value(other.result(120)) == [2] * 4
    for future in broken:
        with pytest.raises(RuntimeError, match="no such layer"):
            future.result(120)
    assert value(batcher.submit(images(5), LATER).result(120)) == [5], "it goes on"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batcher_whose_threads_die_fails_everybody(batcher: Batcher, engine: Gated) -> None:
    engine.breaks = {1: SystemExit(), 2: SystemExit()}
    doomed = fill(batcher, engine)
    waiting = batcher.submit(images(3), LATER)
    engine.gate.set()
    for future in (*doomed, waiting):
        assert future.exception(120) is not None
    with pytest.raises(Unavailable):
        batcher.submit(images(4), LATER).result(120)


def test_closing_answers_what_waits_and_takes_no_more(batcher: Batcher, engine: Gated) -> None:
    waiting = [batcher.submit(images(number), LATER) for number in range(6)]
    threading.Timer(0.1, engine.gate.set).start()
    batcher.close()
    assert [value(future.result(0)) for future in waiting] == [[number] for number in range(6)]
    with pytest.raises(Unavailable, match="shutting down"):
        batcher.submit(images(9), LATER).result(0)


def test_what_cannot_be_answered_in_time_at_the_end_is_told(engine: Gated) -> None:
    batcher = Batcher(engine, limit=1)
    futures = [batcher.submit(images(number), LATER) for number in range(4)]
    until(lambda: batcher.queued() == 2)
    batcher.close(within_s=0.1)
    assert all(isinstance(future.exception(0), Unavailable) for future in futures[2:])
    engine.gate.set()
    assert [value(future.result(120)) for future in futures[:2]] == [[0], [1]]


def test_the_wait_is_foretold_from_what_was_measured(batcher: Batcher, engine: Gated, clock: Advanced) -> None:
    assert batcher.wait_s(10) == 0.0
    blocked = batcher.submit(images(1), LATER)
    until(lambda: engine.batches)
    clock.ahead_s = 0.3
    engine.gate.set()
    blocked.result(120)
    until(lambda: batcher.wait_s() == 0.0)
    assert batcher.wait_s(10) == pytest.approx(10 * batcher.busy_s, rel=1e-6) and batcher.busy_s >= 0.3


@dataclass
class Clocked(FlatEngine):
    """An engine on a clock of its own: a batch takes 80 ms and 20 ms more an image, times `slowness`."""

    slowness: float = 1.0
    clock: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        self.clock += self.slowness * self.seconds(len(images))
        return super().run(images, wants_maps=wants_maps)

    @staticmethod
    def seconds(images: int) -> float:
        return 0.08 + 0.02 * images


def ask_alone(batcher: Batcher, times: int) -> None:
    """Send requests of one image, each after the last one's answer."""
    for _ in range(times):
        batcher.submit(images(1), LATER).result(120)
        until(lambda: batcher.wait_s() == 0.0)


def test_the_wait_for_full_batches_is_right_after_images_came_alone() -> None:
    engine = Clocked()
    timed = {size: engine.seconds(size) for size in (1, 2, 4, 8)}
    batcher = Batcher(engine, 8, timed, now=lambda: engine.clock)
    assert batcher.wait_s() == 0.0 and batcher.wait_s(1) == pytest.approx(0.1), "known before anybody came"
    ask_alone(batcher, 30)
    assert batcher.wait_s(32) == pytest.approx(4 * engine.seconds(8))
    assert batcher.wait_s(35) == pytest.approx(4 * engine.seconds(8) + engine.seconds(3))
    batcher.close()


def test_the_wait_follows_a_machine_that_became_slower() -> None:
    engine = Clocked(slowness=3.0)
    timed = {size: engine.seconds(size) for size in (1, 2, 4, 8)}
    batcher = Batcher(engine, 8, timed, now=lambda: engine.clock)
    ask_alone(batcher, 30)
    assert batcher.wait_s(32) == pytest.approx(3 * 4 * engine.seconds(8), rel=0.01)
    batcher.close()


class Flaky(FlatEngine):
    """An engine that breaks on images of one value and dawdles on those of another."""

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        seen = images[:, 0, 0, 0]
        if (seen == 200).any():
            raise RuntimeError("broken")
        if (seen == 100).any():
            time.sleep(0.002)
        return super().run(images, wants_maps=wants_maps)


ASKED = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1, 2, 3, 100, 200]), min_size=1, max_size=6),
        st.sampled_from([LATER, 0.001, -1.0]),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(asked=ASKED, limit=st.integers(1, 5), is_closed_early=st.booleans())
def test_every_future_ends_and_every_answer_is_right(
    asked: list[tuple[list[int], float, bool, bool]], limit: int, is_closed_early: bool
) -> None:
    batcher = Batcher(Flaky(), limit)
    futures: list[tuple[list[int], Future[BackboneOutput]]] = []

    def ask(one: tuple[list[int], float, bool, bool]) -> None:
        values, allowed_s, wants_maps, leaves = one
        future = batcher.submit(images(*values), time.perf_counter() + allowed_s, wants_maps=wants_maps)
        futures.append((values, future))
        if leaves:
            future.cancel()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, asked))
    if is_closed_early:
        batcher.close()
    for values, future in futures:
        error = None if future.cancelled() else future.exception(120)
        if not future.cancelled() and error is None:
            assert value(future.result()) == values and 200 not in values
    batcher.close()
    assert batcher.queued() == 0 and batcher.wait_s() == 0.0


def test_the_smallest_batch_that_is_nearly_the_fastest_is_taken() -> None:
    rates = {1: 100.0, 2: 150.0, 4: 200.0, 8: 202.0, 16: 204.0, 32: 300.0}
    timed = time_batches(lambda size: size / rates[size])
    assert list(timed) == [1, 2, 4, 8, 16] and best_batch(timed) == 4
    assert best_batch(time_batches(lambda size: size / 10)) == 1
    assert best_batch(time_batches(lambda size: 0.01, largest=32)) == 32


def test_a_batch_that_everybody_would_wait_for_too_long_is_not_tried() -> None:
    assert list(time_batches(lambda size: 0.2 + 0.01 * size)) == [1, 2, 4, 8]
    assert list(time_batches(lambda size: 0.24 + 0.02 * size)) == [1]


def test_a_size_that_there_is_no_memory_for_ends_the_trials() -> None:
    def seconds(size: int) -> float:
        if size > 4:
            raise OutOfMemory("no room")
        return 0.01

    assert list(time_batches(seconds)) == [1, 2, 4]


@settings(max_examples=50, derandomize=True)
@given(disturbed=st.sets(st.integers(0, 60), max_size=20), factor=st.floats(1.5, 20))
def test_a_moment_of_noise_does_not_settle_the_batch(disturbed: set[int], factor: float) -> None:
    """Up to one timing in three is disturbed, never two in a row."""
    calls = iter(range(10**6))

    def seconds(size: int) -> float:
        number = next(calls)
        is_noisy = number in disturbed and not {number - 1, number - 2, number - 3, number - 4} & disturbed
        return (0.008 + 0.002 * size) * (factor if is_noisy else 1.0)

    timed = time_batches(seconds, largest=16)
    assert best_batch(timed) == 16 and all(timed[size] == 0.008 + 0.002 * size for size in (2, 4, 8, 16))


def test_trials_take_no_longer_than_they_must() -> None:
    spent: list[float] = []

    def seconds(size: int) -> float:
        spent.append(0.1 * size)
        return spent[-1]

    time_batches(seconds)
    assert sum(spent) == pytest.approx(0.1 + 0.1 + 0.2 + 4 * (0.1 + 0.2) + 0.4 + 2 * (0.2 + 0.4))


def test_who_leaves_in_the_middle_costs_only_what_the_engine_has_begun(batcher: Batcher, engine: Gated) -> None:
    left = batcher.submit(images(*range(1, 21)), LATER)
    until(lambda: engine.batches and batcher.queued() == 12)
    left.abandon()
    assert batcher.queued() == 0 and batcher.oldest_s() == 0.0
    stays = batcher.submit(images(99), LATER)
    engine.gate.set()
    assert value(stays.result(120)) == [99]
    assert left.exception(120) is not None
    assert seen(engine) == [1, 2, 3, 4, 99]


def test_a_request_whose_time_is_over_in_the_middle_is_told(batcher: Batcher, engine: Gated, clock: Advanced) -> None:
    late = batcher.submit(images(*range(1, 21)), clock() + 3600)
    until(lambda: engine.batches)
    clock.ahead_s = 7200
    engine.gate.set()
    with pytest.raises(DeadlineExceeded):
        late.result(120)
    assert seen(engine) == [1, 2, 3, 4]
