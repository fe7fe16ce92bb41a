"""One service on several machines: each has a folder of its own, and they share a database and a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sample
from buckets import Bucket
from fastapi.testclient import TestClient
from running import QUICK
from working import QUICK as TIMINGS

from api.app import create_app
from artifacts.bucket_store import open_store
from models.job import Queue
from models.session import Database
from settings import Settings
from worker.app import make_handlers
from worker.local_worker import LocalWorker

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)]


class Machines:
    """Machines that know of each other what a database and a bucket tell."""

    def __init__(self, database: Database, bucket: Bucket, folder: Path) -> None:
        self._database = database
        self._bucket = bucket
        self._folder = folder

    def settings(self, machine: str) -> Settings:
        return Settings(
            var=self._folder / machine,
            DATABASE_URL=self._database.engine.url.render_as_string(hide_password=False),
            store_url=self._bucket.address.url,
            store_endpoint=self._bucket.endpoint,
            store_region=self._bucket.address.region,
            free_disk_bytes=0,
            weights_url="http://127.0.0.1:9/nobody-listens-here",
            predict_deadline_s=30,
        )

    @contextmanager
    def api(self, machine: str) -> Iterator[TestClient]:
        with TestClient(create_app(self.settings(machine)), base_url="http://127.0.0.1:8000") as client:
            yield client

    def work(self, machine: str, queue: Queue) -> bool:
        """Do the next job of a queue on a machine; return whether there was one."""
        settings = self.settings(machine)
        handlers = make_handlers(settings, open_store(settings.store))
        return LocalWorker(self._database, queue, handlers, machine, TIMINGS).work()

    def cached(self, machine: str) -> set[str]:
        return {path.name for path in (self._folder / machine / "cache").glob("??/*")}


def test_what_one_machine_takes_in_another_trains_on_and_a_third_predicts_with(
    database: Database, bucket: Bucket, tmp_path: Path
) -> None:
    machines = Machines(database, bucket, tmp_path)
    files = sample.coloured(per_class=12)
    with machines.api("door") as door:
        ready = door.get("/readyz").json()["checks"]["store"]
        assert ready == {"ok": True, "detail": bucket.address.url}
        dataset = door.post("/api/v1/datasets?name=colours", content=sample.zipped(files)).json()["id"]
        assert machines.work("ingest", Queue.INGEST)
        found = door.get(f"/api/v1/datasets/{dataset}").json()
        assert (found["state"], found["images"]) == ("ready", 36), found
        image = door.get(f"/api/v1/datasets/{dataset}/images").json()["items"][0]
        assert door.get(image["thumbnail"]).status_code == 200
        run = door.post("/api/v1/runs", json={"dataset": dataset, "name": "colours", "recipe": QUICK}).json()["id"]
    assert machines.cached("trainer") == set()
    assert machines.work("trainer", Queue.CPU)
    with machines.api("door") as door:
        ended = door.get(f"/api/v1/runs/{run}").json()
    assert ended["state"] == "succeeded", ended

    assert machines.cached("other") == set()
    with machines.api("other") as other:
        answer = other.post("/api/v1/models/colours/predict", content=files["blue/0.png"])
        assert answer.status_code == 200, answer.text
        report = other.get(f"/api/v1/runs/{run}/files/report.md")
        assert report.status_code == 200 and "Accuracy" in report.text
    assert len(machines.cached("other")) == 3, "the bundle, its backbone, the report"
    with machines.api("door") as door:
        again = door.post("/api/v1/models/colours/predict", content=files["blue/0.png"])
    assert again.json()["predictions"] == answer.json()["predictions"]
    assert bucket.digests() >= machines.cached("other")
