"""Admission of images to the memory that decoding takes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from threading import Event

import pytest

from artifacts.decode_memory import DecodeMemory
from errors import DeadlineExceeded


def test_images_are_admitted_while_their_bytes_fit() -> None:
    memory = DecodeMemory(100)
    too_late = pytest.raises(DeadlineExceeded, match="Expected memory to decode the image in time")
    with memory.reserve(60), memory.reserve(40), too_late, memory.reserve(1, until=0):
        pass
    with memory.reserve(100, until=0):
        pass


def test_an_image_that_needs_more_than_all_is_admitted_alone() -> None:
    memory = DecodeMemory(100)
    with memory.reserve(1000, until=0), pytest.raises(DeadlineExceeded), memory.reserve(1, until=0):
        pass
    with memory.reserve(1), pytest.raises(DeadlineExceeded), memory.reserve(1000, until=0):
        pass


def test_what_fails_gives_its_memory_back() -> None:
    memory = DecodeMemory(100)
    with pytest.raises(ValueError, match="broken"), memory.reserve(100):
        raise ValueError("broken")
    with memory.reserve(100, until=0):
        pass


def test_a_large_image_is_not_overtaken_by_small_ones_that_came_later() -> None:
    memory = DecodeMemory(100)
    order: list[str] = []
    waits = Event()

    def decode(name: str, size_bytes: int) -> None:
        if name == "large":
            waits.set()
        with memory.reserve(size_bytes):
            order.append(name)

    with ThreadPoolExecutor(4) as pool:
        with ExitStack() as held:
            held.enter_context(memory.reserve(60))
            large = pool.submit(decode, "large", 90)
            assert waits.wait(60)
            while memory.waiting == 0:
                time.sleep(0)
            small = [pool.submit(decode, "small", 10) for _ in range(3)]
            while memory.waiting < 3:
                time.sleep(0)
        wait([large, *small])
    assert order == ["large", "small", "small", "small"]


def test_one_that_gives_up_lets_the_next_one_in() -> None:
    memory = DecodeMemory(100)
    with ThreadPoolExecutor(1) as pool, memory.reserve(60):
        large = pool.submit(lambda: memory.reserve(90, time.perf_counter() + 0.05).__enter__())
        while memory.waiting == 0 and not large.done():
            time.sleep(0)
        with memory.reserve(40):
            assert isinstance(large.exception(60), DeadlineExceeded)
