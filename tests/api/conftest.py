"""An API in this process, without a worker, for tests that need none.

Its database is SQLite; a module that asks PostgreSQL too has a `database_url` of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from api.app import create_app
from api.dependencies import Services
from models.job import Job, JobState
from models.session import Database
from settings import Settings


@pytest.fixture
def database_url(tmp_path: Path, migrated_file: Path) -> str:
    """Address of a migrated database."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path / 'test.db')}"


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    limits = {"free_disk_bytes": 0, "archive_bytes": 1_000_000, "predict_bytes": 200_000, "image_bytes": 50_000}
    return Settings(var=tmp_path / "var", DATABASE_URL=database_url, predict_deadline_s=30, **limits)


class RecordingDispatcher:
    """Records the queue and the id of each job that was queued when a dispatch was requested."""

    def __init__(self, database: Database, requested: list[tuple[str, str]]) -> None:
        self._database = database
        self._requested = requested

    def request(self) -> None:
        query = select(Job.queue, Job.id).where(Job.state == JobState.QUEUED).order_by(Job.id)
        with self._database.reading() as session:
            found = [(queue.value, job_id) for queue, job_id in session.execute(query)]
        self._requested += [job for job in found if job not in self._requested]


@pytest.fixture
def requested() -> list[tuple[str, str]]:
    """Queue and id of each job that a dispatch was requested for."""
    return []


@pytest.fixture
def client(settings: Settings, requested: list[tuple[str, str]]) -> Iterator[TestClient]:
    app = create_app(settings, RecordingDispatcher(Database(settings.database), requested))
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def services(client: TestClient) -> Services:
    found: Services = client.app.state.services  # type: ignore[attr-defined]
    return found
