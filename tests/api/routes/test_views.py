"""Routes of views without a worker, on each database."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import records
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.dependencies import Services
from models import run as runs
from models import view as views
from models.job import Job, JobKind, JobState
from models.run import Run
from models.session import Database
from models.view import View, ViewKind, ViewState

IMAGE, OTHER = records.digest("a.png"), records.digest("b.png")
LAYERS = [
    {"name": "first", "height": 8, "width": 8, "channels": 4},
    {"name": "pool", "height": 4, "width": 4, "channels": 4},
]
CURVE = {
    "metric": "accuracy",
    "greater_is_better": True,
    "points": [{"fraction": 1.0, "images": 24, "score": 0.9, "ci95": [0.8, 0.95]}],
    "law": {"floor": 0.05, "scale": 2.0, "exponent": 0.5, "misfit": 0.01},
    "twice": {"images": 48, "score": 0.95, "ci95": [0.9, 0.97], "change": 0.01, "change_ci95": [0.003, 0.02]},
    "interval": "by draws",
    "sentence": "Twice the images would bring about +1.0 points of accuracy (95 % interval 0.3 to 2.0).",
}


@pytest.fixture
def database_url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.fixture
def run(services: Services) -> str:
    """A finished run on a data set of two images."""
    with services.database.writing() as session:
        version = records.ready_version(session, images=[records.accepted("a.png"), records.accepted("b.png")])
        run = records.running_run(session, version)
        return runs.succeed_run(session, run.id, {}, 1.0).id


def curve_url(run: str) -> str:
    return f"/api/v1/runs/{run}/learning-curve"


def activations_url(run: str) -> str:
    return f"/api/v1/runs/{run}/activations"


def view_jobs(session: Session) -> Sequence[Job]:
    return session.scalars(select(Job).where(Job.kind == JobKind.VIEW).order_by(Job.id)).all()


def answer_as_a_worker(services: Services, content: bytes) -> None:
    """Finish the one queued view job with this file, as a worker would."""
    with services.database.writing() as session:
        (job,) = (job for job in view_jobs(session) if job.state is JobState.QUEUED)
        job.state = JobState.SUCCEEDED
        views.succeed_view(session, job.subject_id, services.store.put(content), len(content))


def fail_as_a_worker(services: Services) -> None:
    with services.database.writing() as session:
        (job,) = (job for job in view_jobs(session) if job.state is JobState.QUEUED)
        job.state = JobState.FAILED
        views.fail_view(
            session, job.subject_id, {"code": "training-diverged", "detail": "The loss is no longer a number."}
        )


def kind_of(answer: Any) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["type"].rsplit(":")[-1])


def test_a_curve_is_computed_once_and_then_there(
    client: TestClient, services: Services, run: str, requested: list[tuple[str, str]]
) -> None:
    for _ in range(3):
        answer = client.get(curve_url(run))
        assert answer.status_code == 202 and answer.headers["Retry-After"] == "2"
        assert answer.json() == {"state": "queued", "progress": {"fraction": 0.0, "eta_s": None}}
    assert [queue for queue, _ in requested] == ["cpu"]
    with services.database.writing() as session:
        (job,) = view_jobs(session)
        job.state = JobState.RUNNING
        views.start_view(session, job.subject_id)
        views.set_progress(session, job.subject_id, {"fraction": 0.4, "eta_s": 6.3})
    answer = client.get(curve_url(run))
    assert (answer.status_code, answer.headers["Retry-After"]) == (202, "7")
    assert answer.json() == {"state": "running", "progress": {"fraction": 0.4, "eta_s": 6.3}}
    with services.database.writing() as session:
        view_jobs(session)[0].state = JobState.QUEUED
    answer_as_a_worker(services, json.dumps(CURVE).encode())
    for _ in range(2):
        answer = client.get(curve_url(run))
        assert answer.status_code == 200
        assert answer.json() == {**CURVE, "picture": f"/api/v1/runs/{run}/files/learning-curve.png"}
    with services.database.reading() as session:
        assert len(view_jobs(session)) == 1 == len(requested)


def test_a_curve_of_too_few_images_has_no_law(client: TestClient, services: Services, run: str) -> None:
    client.get(curve_url(run))
    answer_as_a_worker(services, json.dumps({**CURVE, "law": None, "twice": None}).encode())
    found = client.get(curve_url(run)).json()
    assert (found["law"], found["twice"]) == (None, None)


def test_a_failure_is_told_once_and_whoever_asks_again_has_it_tried_anew(
    client: TestClient, services: Services, run: str
) -> None:
    client.get(curve_url(run))
    fail_as_a_worker(services)
    answer = client.get(curve_url(run))
    assert (answer.status_code, kind_of(answer)) == (422, "training-diverged")
    assert answer.json()["detail"] == "The loss is no longer a number. Repeat the request to try again."
    assert client.get(curve_url(run)).status_code == 202
    with services.database.reading() as session:
        assert [job.state for job in view_jobs(session)] == [JobState.FAILED, JobState.QUEUED]
    answer_as_a_worker(services, json.dumps(CURVE).encode())
    assert client.get(curve_url(run)).status_code == 200


def test_many_who_ask_at_once_have_it_computed_once(client: TestClient, services: Services, run: str) -> None:
    together = threading.Barrier(6)

    def get(number: int) -> int:
        together.wait()
        return client.get(curve_url(run)).status_code

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(get, range(6))) == {202}
    with services.database.reading() as session:
        assert len(view_jobs(session)) == 1


def test_layers_are_listed_and_one_of_them_drawn(
    client: TestClient, services: Services, run: str, requested: list[tuple[str, str]]
) -> None:
    assert client.get(activations_url(run)).status_code == 202
    wanted = {"image": IMAGE, "layer": "pool"}
    assert client.get(activations_url(run), params=wanted).status_code == 202, (
        "it is not known yet whether there is one"
    )
    answer_as_a_worker(services, json.dumps(LAYERS).encode())
    assert client.get(activations_url(run)).json() == {"layers": LAYERS}
    assert client.get(activations_url(run), params=wanted).status_code == 202
    answer_as_a_worker(services, b"a picture")
    for _ in range(2):
        answer = client.get(activations_url(run), params=wanted)
        assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"a picture", "image/png")
    assert client.get(activations_url(run), params={**wanted, "image": OTHER}).status_code == 202
    assert [queue for queue, _ in requested] == ["ingest"] * 3, "which does not wait for trainings"


def test_what_is_not_there_is_named_with_what_there_is(client: TestClient, services: Services, run: str) -> None:
    for image in ("f" * 64, "a.png", IMAGE[:10]):
        answer = client.get(activations_url(run), params={"image": image, "layer": "pool"})
        assert (answer.status_code, kind_of(answer)) == (404, "not-found")
        assert image in answer.json()["detail"] and "/images?version=1 lists its 2 images" in answer.json()["detail"]
    answer = client.get(activations_url(run), params={"layer": "pool"})
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    with services.database.reading() as session:
        assert not view_jobs(session), "nothing was computed for that"
    client.get(activations_url(run))
    answer_as_a_worker(services, json.dumps(LAYERS).encode())
    for layer in ("", "conv9", "../first"):
        answer = client.get(activations_url(run), params={"image": IMAGE, "layer": layer})
        assert (answer.status_code, answer.json()["field"]) == (422, "layer")
        assert f"Expected one of first, pool. Received {layer!r}" in answer.json()["detail"]
    with services.database.reading() as session:
        assert len(view_jobs(session)) == 1


def test_a_network_without_maps_says_so(client: TestClient, services: Services, run: str) -> None:
    client.get(activations_url(run))
    answer_as_a_worker(services, b"[]")
    assert client.get(activations_url(run)).json() == {"layers": []}
    answer = client.get(activations_url(run), params={"image": IMAGE, "layer": "dense_1"})
    assert answer.json()["detail"] == "layer: No layer of this network has maps to show. Received 'dense_1'."


def test_an_image_of_another_version_is_not_one_of_the_run(client: TestClient, services: Services, run: str) -> None:
    with services.database.writing() as session:
        records.ready_version(session, "others", images=[records.accepted("c.png")])
    answer = client.get(activations_url(run), params={"image": records.digest("c.png"), "layer": "pool"})
    assert answer.status_code == 404


def test_only_finished_runs_with_a_frozen_network_have_a_curve(
    client: TestClient, services: Services, run: str
) -> None:
    for url in (curve_url("run_none"), activations_url("run_none")):
        assert client.get(url).status_code == 404
    with services.database.writing() as session:
        waiting = records.queued_run(session, records.ready_version(session, "others")).id
        session.get_one(Run, run).recipe = {**session.get_one(Run, run).recipe, "mode": "fine-tuning"}
    for url in (curve_url(waiting), activations_url(waiting)):
        answer = client.get(url)
        assert (answer.status_code, kind_of(answer)) == (409, "not-ready")
        assert "This run is queued" in answer.json()["detail"]
    answer = client.get(curve_url(run))
    assert (answer.status_code, kind_of(answer)) == (409, "not-ready")
    assert "'fine-tuning'" in answer.json()["detail"] and "'feature-extraction'" in answer.json()["detail"]
    assert client.get(activations_url(run)).status_code == 202, "its layers can be looked at"


def test_deleting_the_data_set_ends_what_is_computed_from_it(client: TestClient, services: Services, run: str) -> None:
    dataset = client.get(f"/api/v1/runs/{run}").json()["dataset"]
    client.get(activations_url(run))
    answer_as_a_worker(services, json.dumps(LAYERS).encode())
    wanted = {"image": IMAGE, "layer": "pool"}
    client.get(curve_url(run))
    client.get(activations_url(run), params=wanted)
    assert client.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    with services.database.reading() as session:
        assert [job.state for job in view_jobs(session)[1:]] == [JobState.CANCELLED] * 2
        assert [view.kind for view in session.scalars(select(View))] == [ViewKind.LAYERS]
    for answer in (client.get(curve_url(run)), client.get(activations_url(run), params=wanted)):
        assert (answer.status_code, kind_of(answer)) == (409, "not-ready")
        assert "The data set of this run and its images were deleted" in answer.json()["detail"]
    assert client.get(activations_url(run)).json() == {"layers": LAYERS}


def test_a_curve_that_was_there_before_its_data_set_was_deleted_stays(
    client: TestClient, services: Services, run: str
) -> None:
    client.get(curve_url(run))
    answer_as_a_worker(services, json.dumps(CURVE).encode())
    dataset = client.get(f"/api/v1/runs/{run}").json()["dataset"]
    assert client.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    assert client.get(curve_url(run)).json()["points"] == CURVE["points"]
    with services.database.reading() as session:
        assert [view.state for view in session.scalars(select(View))] == [ViewState.SUCCEEDED]
