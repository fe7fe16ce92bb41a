"""Thumbnails wait for the memory that all decoders of the process share."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from PIL import Image
from sample import png

from api import thumbnails
from api.thumbnails import ThumbnailMaker
from artifacts.decode_memory import DecodeMemory
from artifacts.images import ImageLimits
from artifacts.store import Store
from errors import DeadlineExceeded


def test_a_thumbnail_waits_for_the_memory_that_predictions_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, memory = Store(tmp_path), DecodeMemory(10**9)
    image = store.put(png(1, side=400))
    maker = ThumbnailMaker(store, ImageLimits(), memory)

    async def make_side_by_side() -> list[bytes]:
        with memory.reserve(10**9):
            waiting = [asyncio.create_task(maker.make(image)) for _ in range(5)]
            while memory.waiting < 2:
                await asyncio.sleep(0)
        return await asyncio.gather(*waiting)

    for made in asyncio.run(make_side_by_side()):
        with Image.open(io.BytesIO(made)) as small:
            assert small.size == (160, 160)
    monkeypatch.setattr(thumbnails, "_WAIT_S", 1.0)
    with memory.reserve(10**9), pytest.raises(DeadlineExceeded, match="Expected memory"):
        asyncio.run(maker.make(image))
    monkeypatch.setattr(thumbnails, "_WAIT_S", 0.0)
    with pytest.raises(DeadlineExceeded, match="Expected a free thread"):
        asyncio.run(maker.make(image))
    maker.close()
