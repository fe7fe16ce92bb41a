"""The service on a small disk of its own, which is really full for a while.

Mounting such a disk needs root. Every rule that is tested together here also has a test that needs no root, in
`tests/api/test_bodies.py`, `tests/artifacts/test_store.py`, `tests/models/test_session.py`,
`tests/worker/test_child_process.py`, `tests/worker/test_job_runner.py` and `tests/worker/handlers/test_ingest.py`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sample
from fastapi.testclient import TestClient
from running import QUICK
from sqlalchemy import select
from structlog.testing import capture_logs
from waiting import until
from working import QUICK as TIMINGS
from working import make_due

from api.app import create_app
from artifacts.bucket_store import open_store
from models.job import Job, JobState, Queue
from models.session import Database
from ops.migrate import upgrade
from settings import Settings
from worker.app import make_handlers
from worker.local_worker import LocalWorker

pytestmark = pytest.mark.slow

DISK_BYTES = 400 * 1024**2
FREE_BYTES = 4 * 1024**2


@dataclass
class SmallDisk:
    """A service whose files and database are on one small disk."""

    settings: Settings
    database: Database
    client: TestClient

    @property
    def _filler(self) -> Path:
        return self.settings.var / "filler"

    def fill(self, but_bytes: int = 0) -> None:
        """Leave so many bytes free."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**20))
            except OSError:
                pass
            os.truncate(self._filler, max(0, file.tell() - but_bytes))

    def free(self) -> None:
        self._filler.unlink()

    def loop(self, queue: Queue) -> LocalWorker:
        handlers = make_handlers(self.settings, open_store(self.settings.store))
        return LocalWorker(self.database, queue, handlers, "here", TIMINGS)

    def job(self, subject_id: str) -> Job:
        with self.database.reading() as session:
            return session.scalars(select(Job).where(Job.subject_id == subject_id).order_by(Job.id.desc())).first()  # type: ignore[return-value]

    def files(self) -> set[str]:
        return {path.name for path in (self.settings.var / "store").rglob("*") if path.is_file()}


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "espalier-test", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no disk could be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk") as disk:
        settings = Settings(
            var=disk / "var", free_disk_bytes=FREE_BYTES, weights_url="http://127.0.0.1:9/nobody", predict_deadline_s=30
        )
        database = Database(settings.database)
        upgrade(database)
        app = create_app(settings)
        with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
            yield SmallDisk(settings, database, client)
        database.close()


def test_an_upload_that_does_not_fit_leaves_nothing_and_fits_later(place: SmallDisk) -> None:
    archive = sample.zipped(sample.coloured(per_class=4))
    large = archive + bytes(40 * 2**20)

    def pieces() -> Iterator[bytes]:  # no length is announced, so that the disk itself must refuse
        yield archive
        for _ in range(40):
            yield bytes(2**20)

    assert place.client.get("/readyz").json()["checks"]["disk"]["ok"]
    place.fill(but_bytes=FREE_BYTES + 2**20)
    refused = place.client.post("/api/v1/datasets?name=x", content=pieces())
    assert (refused.status_code, refused.json()["type"]) == (507, "urn:espalier:problem:disk-full"), refused.text
    announced = place.client.post("/api/v1/datasets?name=x", content=large)
    assert announced.status_code == 507 and "MiB of free disk space" in announced.json()["detail"]
    place.free()

    place.fill()
    unready = place.client.get("/readyz")
    assert unready.status_code == 503 and not unready.json()["checks"]["disk"]["ok"]
    assert unready.json()["checks"]["database"]["ok"] and place.client.get("/api/v1/datasets").json()["items"] == []
    assert place.client.post("/api/v1/datasets?name=x", content=archive).status_code == 507
    assert place.files() == set()
    place.free()
    assert place.client.get("/readyz").json()["checks"]["disk"]["ok"]
    assert place.client.post("/api/v1/datasets?name=x", content=archive).status_code == 202


def test_an_ingest_and_a_run_wait_for_room_and_then_come_to_their_ends(place: SmallDisk) -> None:
    files = sample.coloured(per_class=12)
    made = place.client.post("/api/v1/datasets?name=x", content=sample.zipped(files)).json()
    url = f"/api/v1/datasets/{made['id']}"

    def parked(queue: Queue, subject_id: str) -> Job:
        """Do a job that meets a full disk; what its end needs is there, since the file that did not fit is gone."""
        assert place.loop(queue).work()
        job = place.job(subject_id)
        assert (job.state, job.attempt) == (JobState.QUEUED, 0) and job.next_attempt_at is not None
        return job

    with place.database.reading() as session:
        version_id = session.scalars(select(Job.subject_id)).one()
    place.fill(but_bytes=96 * 1024)
    waiting = parked(Queue.INGEST, version_id)
    assert place.client.get(url).json()["state"] == "uploaded"
    place.free()
    make_due(place.database, waiting.id)
    assert place.loop(Queue.INGEST).work()
    assert place.client.get(url).json()["state"] == "ready"

    order = {"dataset": made["id"], "name": "x", "recipe": QUICK}
    run_id = place.client.post("/api/v1/runs", json=order).json()["id"]
    place.fill(but_bytes=2 * 2**20)
    waiting = parked(Queue.CPU, run_id)
    shown = place.client.get(f"/api/v1/runs/{run_id}").json()
    assert (shown["state"], shown["progress"]["stage"]) == ("queued", "waiting-for-disk")
    place.free()
    make_due(place.database, waiting.id)
    assert place.loop(Queue.CPU).work()
    shown = place.client.get(f"/api/v1/runs/{run_id}").json()
    assert shown["state"] == "succeeded", shown["error"]
    assert not list((place.settings.var / "store" / "incoming").iterdir())
    answer = place.client.post("/api/v1/models/x/predict", content=files["blue/0.png"])
    assert answer.status_code == 200, answer.text


def test_a_job_whose_end_does_not_fit_into_the_database_ends_when_there_is_room(place: SmallDisk) -> None:
    made = place.client.post("/api/v1/datasets?name=x", content=sample.zipped(sample.coloured(per_class=12))).json()
    url = f"/api/v1/datasets/{made['id']}"
    loop = place.loop(Queue.INGEST)
    place.fill()
    try:
        with capture_logs() as logs:
            loop.start()
            until(lambda: [entry for entry in logs if "disk of the database is full" in entry.get("error", "")])
        assert place.client.get(url).json()["state"] == "uploaded", "what is full can be read"
    finally:
        place.free()
    until(lambda: place.client.get(url).json()["state"] == "ready", within_s=60)
    loop.drain()
    loop.join(10)
    with place.database.reading() as session:
        assert session.scalars(select(Job.attempt)).all() == [1]
    assert place.client.get(url).json()["images"] == 36
