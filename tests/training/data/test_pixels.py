from __future__ import annotations

import numpy as np
import pytest
import sample

from artifacts.images import ImageLimits
from artifacts.store import Digest, Store
from recipes.recipe import Resize
from training.data.pixels import ImageDecoder, LoadedPixels


@pytest.fixture
def decoder(store: Store) -> ImageDecoder:
    return ImageDecoder(store, 16, Resize.SQUASH, ImageLimits(), threads=2)


def digests(store: Store, count: int) -> list[Digest]:
    return [store.put(sample.png(number)) for number in range(count)]


def test_loaded_pixels_come_in_the_order_that_is_asked_for(store: Store, decoder: ImageDecoder) -> None:
    rows = digests(store, 20)
    pixels = np.concatenate([squares for _, squares in decoder.batches(rows)])
    wanted = rows[::-1]
    found = np.concatenate([squares for _, squares in LoadedPixels(rows, pixels).batches(wanted)])
    assert np.array_equal(found, pixels[::-1])
