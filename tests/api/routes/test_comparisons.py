"""Routes of comparisons without a worker, on each database."""

from __future__ import annotations

from typing import Any

import pytest
import records
from database_marks import ON_SQLITE
from fastapi.testclient import TestClient

from api.dependencies import Services
from models import comparison as comparisons
from models import run as runs
from models.base import now
from models.comparison import Comparison
from models.dataset import DatasetVersion
from models.job import JobState
from models.run import Run
from models.session import Database
from recipes.recipe import Task

TWO = [{"epochs": 1}, {"epochs": 2}]


@pytest.fixture
def database_url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.fixture
def dataset(client: TestClient, services: Services) -> str:
    """A data set of two classes with 10 images each."""
    with services.database.writing() as session:
        return records.ready_version(session).dataset_id


def start(client: TestClient, dataset: str, recipes: list[dict[str, Any]], **more: Any) -> Any:
    return client.post("/api/v1/comparisons", json={"dataset": dataset, "name": "m", "recipes": recipes, **more})


def test_a_comparison_is_a_queued_run_for_each_recipe(
    client: TestClient, dataset: str, requested: list[tuple[str, str]]
) -> None:
    answer = start(client, dataset, [{"backbone": "vgg16"}, {"backbone": "vgg16", "features_from": "block3"}])
    assert answer.status_code == 202, answer.text
    found = answer.json()
    assert (found["state"], found["dataset"], found["version"], found["name"]) == ("queued", dataset, 1, "m")
    assert [(row["position"], row["state"], row["title"]) for row in found["rows"]] == [
        (0, "queued", "features_from=block5"),
        (1, "queued", "features_from=block3"),
    ]
    expected = {"stage": "queued", "fraction": 0.0, "ended": 0, "runs": 2, "position": 1, "eta_s": None}
    assert found["progress"] == expected
    assert (found["best"], found["verdict"], found["rows"][0]["difference"]) == (None, None, None)
    made = [client.get(f"/api/v1/runs/{row['run']}").json() for row in found["rows"]]
    assert [(run["name"], run["recipe"]["features_from"]) for run in made] == [("m", "block5"), ("m", "block3")]
    assert [run["progress"]["position"] for run in made] == [1, 2]
    assert [queue for queue, _ in requested] == ["cpu", "cpu"]
    assert client.get(answer.headers["location"]).json() == found
    assert client.get("/api/v1/comparisons").json()["items"] == [found]


@pytest.mark.parametrize(
    ("recipes", "field"),
    [
        ([{}], "recipes"),
        ([{"epochs": number} for number in range(1, 22)], "recipes"),
        ([{"epochs": 1}, {"epochs": 2, "folds": {"k": 3}}], "recipes[1].folds.k"),
        ([{"epochs": 1}, {"epochs": 2}, {"epochs": 3, "folds": {"repeats": 2}}], "recipes[2].folds.repeats"),
        ([{"epochs": 1}, {"epochs": 2, "seed": 1}], "recipes[1].seed"),
        ([{"epochs": 1}, {"epochs": 2, "task": "multiclass"}], "recipes[1].task"),
        ([{}, {"epochs": 2}, {"epochs": 100}], "recipes[2]"),
        ([{}, {"folds": {"k": 11}}], "recipes[1].folds.k"),
        ([{}, {"backbone": "vgg16", "features_from": "block6"}], "recipes[1].features_from"),
        ([{"epochs": 1}, {"epochs": 0}], "recipes[1].epochs"),
        ([{"epochs": 1}, {"head": {"dropout": 1.0}}], "recipes[1].head.dropout"),
        ([{"weights": "mine"}, {}], "recipes[0].weights"),
    ],
)
@ON_SQLITE
def test_what_cannot_be_compared_is_refused_naming_the_field_and_nothing_is_made(
    client: TestClient, services: Services, dataset: str, recipes: list[dict[str, Any]], field: str
) -> None:
    answer = start(client, dataset, recipes)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith(":recipe-invalid")
    assert answer.json()["field"] == field
    assert answer.json()["detail"].startswith(f"{field}: ")
    with services.database.reading() as session:
        assert (records.count(session, Comparison), records.count(session, Run)) == (0, 0)


@ON_SQLITE
def test_recipes_are_compared_with_their_defaults_filled_in(client: TestClient, dataset: str) -> None:
    same = start(client, dataset, [{"task": "auto", "folds": {"k": 5}}, {"task": "binary", "image_size": 299}])
    assert same.json()["field"] == "recipes[1]" and "recipes[0]" in same.json()["detail"]


def test_a_comparison_needs_a_data_set_that_can_be_trained_on(
    client: TestClient, services: Services, dataset: str
) -> None:
    assert start(client, "ds_none", TWO).status_code == 404
    assert start(client, dataset, TWO, version=2).status_code == 404
    with services.database.writing() as session:
        waiting = records.waiting_version(session, "waiting").dataset_id
    assert start(client, waiting, TWO).status_code == 409
    assert start(client, dataset, TWO, name="Upper").json()["field"] == "name"


def test_cancelling_ends_every_run_and_asking_twice_changes_nothing(client: TestClient, dataset: str) -> None:
    url = f"/api/v1/comparisons/{start(client, dataset, TWO).json()['id']}"
    for _ in range(2):
        answer = client.post(f"{url}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
        assert [row["state"] for row in answer.json()["rows"]] == ["cancelled", "cancelled"]
    assert client.get(url).json()["progress"]["stage"] == "done"


def test_cancelling_the_last_queued_run_makes_the_table_due_and_rings(
    client: TestClient, services: Services, dataset: str, requested: list[tuple[str, str]]
) -> None:
    found = start(client, dataset, TWO).json()
    first, second = (row["run"] for row in found["rows"])
    with services.database.writing() as session:
        runs.start_run(session, first)
        runs.succeed_run(session, first, {}, 1.0)
        records.job_of(session, first).state = JobState.SUCCEEDED
        assert comparisons.on_run_ended(session, first) is None
    client.post(f"/api/v1/runs/{second}/cancel")
    assert len(requested) == 3
    progress = client.get(f"/api/v1/comparisons/{found['id']}").json()["progress"]
    assert (progress["stage"], progress["fraction"], progress["ended"]) == ("comparing", 1.0, 2)
    refused = client.delete(f"/api/v1/datasets/{dataset}")
    assert (refused.status_code, refused.json()["type"].rsplit(":")[-1]) == (409, "in-use")
    client.post(f"/api/v1/comparisons/{found['id']}/cancel")
    assert client.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    assert client.get(f"/api/v1/comparisons/{found['id']}").json()["dataset"] == dataset, "it outlives its data set"


def test_cancelling_what_is_tried_again_keeps_the_table_and_rings_for_the_last_one(
    client: TestClient, services: Services, dataset: str, requested: list[tuple[str, str]]
) -> None:
    found = start(client, dataset, TWO).json()
    url = f"/api/v1/comparisons/{found['id']}"
    first, second = (row["run"] for row in found["rows"])
    with services.database.writing() as session:
        for run_id, end in ((first, runs.succeed_run), (second, runs.fail_run)):
            runs.start_run(session, run_id)
            records.job_of(session, run_id).state = JobState.SUCCEEDED
            end(session, run_id, {"code": "crashed", "detail": "It died."}, *([1.0] if run_id == first else []))
        job = comparisons.on_run_ended(session, second)
        assert job is not None
        table = {"rows": [{"position": 0, "score": 0.9}]}
        picture, report = services.store.put(b"picture"), services.store.put(b"report")
        assert comparisons.succeed_comparison(session, found["id"], table, picture, report)
        job.state = JobState.SUCCEEDED
    assert client.post(f"/api/v1/runs/{second}/retry").status_code == 202
    shown = client.get(url).json()
    assert (shown["state"], shown["rows"][0]["score"], shown["progress"]["stage"]) == ("running", 0.9, "training")
    before = len(requested)
    shown = client.post(f"{url}/cancel").json()
    assert (shown["state"], shown["rows"][0]["score"], shown["progress"]["stage"]) == ("running", 0.9, "comparing")
    assert len(requested) == before + 1 and client.get(f"{url}/picture").content == b"picture"


def test_the_end_is_foretold_by_the_runs_that_ended_and_by_the_one_that_runs(
    client: TestClient, services: Services, dataset: str
) -> None:
    found = start(client, dataset, [*TWO, {"epochs": 3}, {"epochs": 4}]).json()
    url = f"/api/v1/comparisons/{found['id']}"
    first, second, *_ = (row["run"] for row in found["rows"])
    with services.database.writing() as session:
        runs.start_run(session, first)
        comparisons.on_run_started(session, first)
    shown = client.get(url).json()
    assert (shown["state"], shown["progress"]["eta_s"]) == ("running", None), "nobody knows how long it takes"
    with services.database.writing() as session:
        runs.set_progress(session, first, runs.progress("features", 0.5, eta_s=1000.0))
    assert client.get(url).json()["progress"]["eta_s"] is None, "that is the present stage alone"
    with services.database.writing() as session:
        runs.set_progress(session, first, runs.progress("folds", 0.5, eta_s=1000.0))
        started_at = session.get_one(Run, first).started_at
    assert started_at is not None
    before = now()
    eta_s = client.get(url).json()["progress"]["eta_s"]
    low, high = (4000 + 3 * (moment - started_at).total_seconds() for moment in (before, now()))
    assert low <= eta_s <= high, "the others will take as long"
    with services.database.writing() as session:
        runs.record_extraction(session, first, {"seconds": 1.5})
        run = runs.succeed_run(session, first, {}, 1.0)
        runs.start_run(session, second)
        runs.set_progress(session, second, runs.progress("folds", 0.5, eta_s=3.0))
    progress = client.get(url).json()["progress"]
    assert run.finished_at and run.started_at
    took = (run.finished_at - run.started_at).total_seconds()
    assert progress["fraction"] == pytest.approx(1.5 / 4)
    assert progress["eta_s"] == pytest.approx(3 + 2 * took)
    row = client.get(url).json()["rows"][0]
    assert (row["training_s"], row["extraction_s"]) == (1.0, 1.5)


@ON_SQLITE
def test_a_run_that_waits_is_foretold_by_those_of_its_own_mode_alone(
    client: TestClient, services: Services, dataset: str
) -> None:
    tuning = {"mode": "fine-tuning", "unfreeze": "block5"}
    found = start(client, dataset, [{}, tuning, {**tuning, "unfreeze": "block4"}]).json()
    url = f"/api/v1/comparisons/{found['id']}"
    first, second, _ = (row["run"] for row in found["rows"])
    with services.database.writing() as session:
        runs.start_run(session, first)
        comparisons.on_run_started(session, first)
        runs.succeed_run(session, first, {}, 1.0)
    assert client.get(url).json()["progress"]["eta_s"] is None, "a frozen network says nothing of those that learn"
    with services.database.writing() as session:
        started_at = runs.start_run(session, second).started_at
        runs.set_progress(session, second, runs.progress("folds", 0.5, eta_s=1000.0))
    assert started_at is not None
    before = now()
    eta_s = client.get(url).json()["progress"]["eta_s"]
    assert 2000 + (before - started_at).total_seconds() <= eta_s <= 2000 + (now() - started_at).total_seconds()


@ON_SQLITE
def test_a_run_that_failed_foretells_nothing_and_two_at_once_take_half_as_long(
    client: TestClient, services: Services, dataset: str
) -> None:
    found = start(client, dataset, [*TWO, {"epochs": 3}, {"epochs": 4}]).json()
    url = f"/api/v1/comparisons/{found['id']}"
    first, second, third, _ = (row["run"] for row in found["rows"])
    with services.database.writing() as session:
        runs.start_run(session, first)
        comparisons.on_run_started(session, first)
        runs.fail_run(session, first, {"code": "crashed", "detail": "It died."})
        started_at = runs.start_run(session, second).started_at
        runs.set_progress(session, second, runs.progress("folds", 0.5, eta_s=1000.0))
        runs.start_run(session, third)
        runs.set_progress(session, third, runs.progress("folds", 0.5, eta_s=1000.0))
    assert started_at is not None
    before = now()
    eta_s = client.get(url).json()["progress"]["eta_s"]
    low, high = (1500 + (moment - started_at).total_seconds() / 2 for moment in (before, now()))
    assert low - 1 <= eta_s <= high, "one waits, and both go on"


def test_a_finished_comparison_shows_its_table_its_picture_and_its_report(
    client: TestClient, services: Services, dataset: str
) -> None:
    url = f"/api/v1/comparisons/{start(client, dataset, TWO).json()['id']}"
    for name in ("picture", "report"):
        assert client.get(f"{url}/{name}").json()["type"].endswith(":not-ready")
    picture, report = services.store.put(b"picture"), services.store.put(b"report")
    difference = {"difference": -0.1, "ci95": [-0.2, -0.05], "p_value": 0.01}
    size = {"predict_ms": 1.5, "backbone_bytes": 10, "bundle_bytes": 5}
    table = {
        "metric": "accuracy",
        "greater_is_better": True,
        "best": 1,
        "verdict": "The second.",
        "interval": "i",
        "test": "t",
        "rows": [
            {"position": 1, "score": 0.9, "ci95": [0.8, 0.95], "difference": None, **size},
            {"position": 0, "score": 0.8, "ci95": [0.7, 0.85], "difference": difference, **size},
        ],
    }
    comparison_id = url.rsplit("/", 1)[-1]
    with services.database.writing() as session:
        for run in comparisons.get_runs(session, comparison_id):
            runs.start_run(session, run.id)
            runs.succeed_run(session, run.id, {}, 1.0)
        assert comparisons.succeed_comparison(session, comparison_id, table, picture, report)
    found = client.get(url).json()
    assert (found["state"], found["best"], found["verdict"]) == ("succeeded", 1, "The second.")
    assert [(row["score"], row["difference"]) for row in found["rows"]] == [(0.8, difference), (0.9, None)]
    assert client.get(f"{url}/picture").content == b"picture"
    answer = client.get(f"{url}/report")
    assert answer.content == b"report" and answer.headers["content-type"].startswith("text/markdown")


def test_comparisons_are_paged_newest_first(client: TestClient, dataset: str) -> None:
    made = [start(client, dataset, TWO).json()["id"] for _ in range(3)]
    first = client.get("/api/v1/comparisons?limit=2").json()
    second = client.get("/api/v1/comparisons", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
    assert second["next_cursor"] is None


@ON_SQLITE
def test_a_comparison_that_is_not_there_is_named(client: TestClient) -> None:
    for path in ("", "/picture", "/report"):
        answer = client.get(f"/api/v1/comparisons/cmp_none{path}")
        assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) == (404, "not-found")
    assert client.post("/api/v1/comparisons/cmp_none/cancel").status_code == 404


@ON_SQLITE
def test_a_version_for_another_task_is_refused_naming_its_recipe(
    client: TestClient, services: Services, dataset: str
) -> None:
    with services.database.writing() as session:
        version = session.query(DatasetVersion).one()
        version.task = Task.MULTICLASS
    assert start(client, dataset, [{"epochs": 1}, {"task": "regression"}]).json()["field"] == "recipes[1].task"
