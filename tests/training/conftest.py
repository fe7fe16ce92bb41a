"""What the tests of training share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import keras
import pytest


@pytest.fixture(autouse=True)
def _networks_go() -> Iterator[None]:
    """Drop a test's networks: they hold each other, and gigabytes of them wait for a collection otherwise."""
    gc.freeze()  # what was there before stays; looking through it after each test takes most of a second
    yield
    keras.utils.clear_session()
    gc.collect()
