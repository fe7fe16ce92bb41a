"""What the tests of training share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import keras
import pytest

gc.collect()
gc.freeze()  # what is imported stays; looking through it after each test takes most of a second


@pytest.fixture(autouse=True)
def _networks_go() -> Iterator[None]:
    """Drop a test's networks: they hold each other, and gigabytes of them wait for a collection otherwise."""
    yield
    keras.utils.clear_session()
    gc.collect()
