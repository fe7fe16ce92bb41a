"""An API in this process, with an SQLite database and no worker: for what needs none."""

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
def settings(tmp_path: Path) -> Settings:
    found = Settings(var=tmp_path / "var", free_disk_bytes=0, archive_bytes=1_000_000, predict_bytes=200_000)
    database = Database(found.database)
    upgrade(database)
    database.close()
    return found


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
