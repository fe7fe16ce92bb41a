"""What the tests of training share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import keras
import psutil
import pytest

_MUCH_BYTES = 3 * 1024**3


@pytest.fixture(autouse=True)
def _networks_go() -> Iterator[None]:
    """Drop the networks of tests: they hold each other, and gigabytes of them wait for a collection otherwise."""
    yield
    keras.utils.clear_session()
    if psutil.Process().memory_info().rss > _MUCH_BYTES:
        gc.collect()
        gc.freeze()  # what is left stays; looking through it again takes seconds
