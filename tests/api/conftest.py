"""An API in this process without a worker, for what needs none.

Its database is SQLite; a module that asks PostgreSQL too has a `database_url` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.deps import Services
from bell import EagerBell
from models.session import Database
from ops.migrate import upgrade
from settings import Settings


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """Address of a migrated database."""
    url = f"sqlite:///{tmp_path / 'test.db'}"
    database = Database(url)
    upgrade(database)
    database.close()
    return url


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    limits = {"free_disk_bytes": 0, "archive_bytes": 1_000_000, "predict_bytes": 200_000, "image_bytes": 50_000}
    return Settings(var=tmp_path / "var", DATABASE_URL=database_url, **limits)


@pytest.fixture
def rung() -> list[tuple[str, str]]:
    """The bells that were rung."""
    return []


@pytest.fixture
def client(settings: Settings, rung: list[tuple[str, str]]) -> Iterator[TestClient]:
    bell = EagerBell(lambda queue, job_id: rung.append((queue, job_id)))
    app = create_app(settings, bell)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def services(client: TestClient) -> Services:
    found: Services = client.app.state.services  # type: ignore[attr-defined]
    return found
