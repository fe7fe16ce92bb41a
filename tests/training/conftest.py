"""What the tests of training share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import keras
import psutil
import pytest
from exporting import Exports

# A look through all objects takes seconds, so it must be worth it.
_WORTH_BYTES = 500 * 1024**2

_left_bytes = 0


@pytest.fixture(autouse=True)
def _networks_go() -> Iterator[None]:
    """Drop the networks of tests: they hold each other, and gigabytes of them wait for a collection otherwise."""
    yield
    global _left_bytes
    keras.utils.clear_session(free_memory=False)
    process = psutil.Process()
    if process.memory_info().rss > _left_bytes + _WORTH_BYTES or not gc.get_freeze_count():
        gc.collect()
        gc.freeze()  # what is left stays; it is not looked through again
        _left_bytes = process.memory_info().rss


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exported backbones, the same for all processes of this test session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
