"""An API in this process without a worker, for what needs none.

Its database is SQLite; a module that asks PostgreSQL too has a `database_url` of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.dependencies import Services
from bell import EagerBell
from settings import Settings


@pytest.fixture
def database_url(tmp_path: Path, migrated_file: Path) -> str:
    """Address of a migrated database."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'test.db')}"


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    limits = {"free_disk_bytes": 0, "archive_bytes": 1_000_000, "predict_bytes": 200_000, "image_bytes": 50_000}
    return Settings(var=tmp_path / "var", DATABASE_URL=database_url, predict_deadline_s=30, **limits)


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
