"""Routes without a worker: lists, refusals, documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sample
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from api.deps import Services
from artifacts.catalogue import CATALOGUE, BackboneName
from artifacts.manifest import dump
from artifacts.recipe import ClassCount, Task
from models import dataset as datasets
from models import registry
from models.dataset import DatasetVersion
from models.registry import Weights
from settings import Settings

SNAPSHOT = Path(__file__).parent / "openapi.json"
ARCHIVE = sample.zipped(sample.coloured(per_class=2))


def ready(client: TestClient, services: Services, counts: list[ClassCount], name: str = "ready") -> str:
    """Make a data set ready without a worker: what a run is checked against is all in its row."""
    dataset = str(client.post(f"/api/v1/datasets?name={name}", content=ARCHIVE).json()["id"])
    with services.database.writing() as session:
        version = datasets.get_versions(session, dataset)[0]
        datasets.start_ingest(session, version.id)
        datasets.mark_ready(
            session,
            version.id,
            manifest=services.store.put(dump([])),
            task=Task.BINARY if len(counts) == 2 else Task.MULTICLASS,
            images=sum(count.images for count in counts),
            duplicates=0,
            ignored=0,
            classes=counts,
            target=None,
            refused=[],
        )
    return dataset


def start(client: TestClient, dataset: str, **recipe: Any) -> Any:
    return client.post("/api/v1/runs", json={"dataset": dataset, "name": "m", "recipe": recipe})


@pytest.fixture
def dataset(client: TestClient, services: Services) -> str:
    return ready(client, services, [ClassCount("a", 30, 30), ClassCount("b", 4, 4), ClassCount("c", 40, 20)])


def test_the_documented_surface_is_the_reviewed_one(client: TestClient) -> None:
    """After a change that is meant: python tests/api/snapshot.py, then review the difference."""
    found = client.get("/openapi.json").json()
    assert found == json.loads(SNAPSHOT.read_text())


def test_values_that_do_not_work_yet_are_not_offered(client: TestClient) -> None:
    parts = client.get("/openapi.json").json()["components"]["schemas"]
    assert parts["Mode"]["enum" if "enum" in parts["Mode"] else "const"] in (
        ["feature-extraction"],
        "feature-extraction",
    )
    assert "unfreeze" not in parts["Recipe"]["properties"]


def test_a_run_is_queued_with_every_default_filled_in(
    client: TestClient, dataset: str, rung: list[tuple[str, str]]
) -> None:
    answer = start(client, dataset)
    assert answer.status_code == 202, answer.text
    run = answer.json()
    assert run["state"] == "queued" and run["dataset"] == dataset and run["version"] == 1
    assert run["recipe"] == {
        "mode": "feature-extraction",
        "backbone": "xception",
        "weights": "imagenet",
        "features_from": "block14",
        "image_size": 299,
        "resize": "squash",
        "task": "multiclass",
        "head": {"hidden": [], "activation": "relu", "dropout": 0.0, "l2": 0.0001},
        "optimizer": {"name": "adam", "learning_rate": 0.001},
        "batch_size": 32,
        "epochs": 100,
        "early_stopping": {"monitor": "val_loss", "patience": 5, "min_delta": 0.0, "target": None},
        "folds": {"k": 4, "repeats": 1, "validation_fraction": 0.15},
        "augmentation": None,
        "class_weights": "none",
        "precision": "float32",
        "seed": 0,
    }
    assert rung[-1][0] == "cpu"
    assert client.get(answer.headers["location"]).json() == run


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"folds": {"k": 5}}, "folds.k"),
        ({"folds": {"k": 1}}, "recipe.folds.k"),
        ({"backbone": "xception", "image_size": 32}, "image_size"),
        ({"backbone": "vgg16", "features_from": "block6"}, "features_from"),
        ({"backbone": "resnet51"}, "recipe.backbone"),
        ({"weights": "mine"}, "weights"),
        ({"weights": "../x"}, "recipe.weights"),
        ({"mode": "fine-tuning"}, "recipe.mode"),
        ({"mode": "from-scratch"}, "recipe.mode"),
        ({"precision": "int8"}, "recipe.precision"),
        ({"augmentation": {"flip": True}}, "recipe.augmentation"),
        ({"task": "binary"}, "task"),
        ({"task": "regression"}, "recipe.task"),
        ({"unfreeze": "block5"}, "recipe.unfreeze"),
        ({"epochs": 0}, "recipe.epochs"),
        ({"optimizer": {"name": "lion"}}, "recipe.optimizer.name"),
        ({"optimizer": {"learning_rate": 0}}, "recipe.optimizer.learning_rate"),
        ({"head": {"dropout": 1.0}}, "recipe.head.dropout"),
        ({"early_stopping": {"patience": -1}}, "recipe.early_stopping.patience"),
        ({"early_stopping": {"target": {"metric": "val_f1", "value": 1}}}, "recipe.early_stopping.target.metric"),
        ({"batchsize": 8}, "recipe.batchsize"),
        ({"seed": -1}, "recipe.seed"),
    ],
)
def test_an_impossible_recipe_is_refused_at_once_naming_the_field(
    client: TestClient, dataset: str, recipe: dict[str, Any], field: str
) -> None:
    answer = start(client, dataset, **recipe)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith(":recipe-invalid")
    assert answer.json()["field"] == field
    assert client.get("/api/v1/runs").json()["items"] == []


def test_a_k_that_is_too_large_says_which_class_is_too_small(client: TestClient, dataset: str) -> None:
    assert "'b'" in start(client, dataset, folds={"k": 5}).json()["detail"]


def test_a_class_that_belongs_together_as_a_whole_cannot_be_folded(client: TestClient, services: Services) -> None:
    alone = ready(client, services, [ClassCount("a", 30, 30), ClassCount("b", 10, 1)], name="alone")
    answer = start(client, alone)
    assert answer.status_code == 422
    assert "'b' has 1" in answer.json()["detail"]


def test_a_run_needs_a_data_set_that_is_ready(client: TestClient, services: Services) -> None:
    assert start(client, "ds_none").status_code == 404
    waiting = client.post("/api/v1/datasets?name=waiting", content=ARCHIVE).json()["id"]
    assert start(client, waiting).status_code == 409
    with services.database.writing() as session:
        version = datasets.get_versions(session, waiting)[0]
        datasets.mark_rejected(session, version.id, {"code": "dataset-refused", "detail": "One class."})
    rejected = start(client, waiting)
    assert rejected.status_code == 409
    assert "One class." in rejected.json()["detail"]
    shown = client.get(f"/api/v1/datasets/{waiting}").json()
    assert shown["state"] == "rejected"
    assert shown["error"]["type"].endswith(":dataset-refused")


@pytest.mark.parametrize("version", [2, 0])
def test_a_run_needs_a_version_that_exists(client: TestClient, dataset: str, version: int) -> None:
    answer = client.post("/api/v1/runs", json={"dataset": dataset, "name": "m", "version": version})
    assert answer.status_code == (404 if version else 422)


def test_a_body_that_is_no_json_is_told(client: TestClient) -> None:
    answer = client.post("/api/v1/runs", content=b"{not json")
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_json_body_above_a_mebibyte_is_refused(client: TestClient) -> None:
    answer = client.post("/api/v1/runs", json={"dataset": "x" * 2**20, "name": "m"})
    assert answer.status_code == 413
    assert answer.json()["type"].endswith(":too-large")


def test_a_queued_run_is_cancelled_at_once_and_asking_twice_changes_nothing(client: TestClient, dataset: str) -> None:
    run = start(client, dataset).json()["id"]
    for _ in range(2):
        answer = client.post(f"/api/v1/runs/{run}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert client.post("/api/v1/runs/run_none/cancel").status_code == 404


def test_a_data_set_with_an_active_run_is_kept(client: TestClient, dataset: str) -> None:
    run = start(client, dataset).json()["id"]
    answer = client.delete(f"/api/v1/datasets/{dataset}")
    assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) == (409, "in-use")
    client.post(f"/api/v1/runs/{run}/cancel")
    assert client.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    shown = client.get(f"/api/v1/runs/{run}").json()
    assert shown["dataset"] == dataset, "a run outlives its data set"


def test_lists_are_paged_newest_first_without_gaps(client: TestClient, dataset: str) -> None:
    made = [start(client, dataset).json()["id"] for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get("/api/v1/runs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [run["id"] for run in page["items"]]
        start(client, dataset)  # a newer one never shifts the pages
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "cursor=%F0%9F", "cursor=!!!"])
def test_a_wrong_page_is_told(client: TestClient, query: str) -> None:
    answer = client.get(f"/api/v1/runs?{query}")
    assert answer.status_code == 422
    assert answer.json()["field"] == query.split("=")[0]


def test_events_are_streamed_and_resumed(client: TestClient, dataset: str) -> None:
    run = start(client, dataset).json()["id"]
    client.post(f"/api/v1/runs/{run}/cancel")
    text = client.get(f"/api/v1/runs/{run}/events").text
    events = [block.split("\n") for block in text.strip().split("\n\n")]
    assert [lines[0] for lines in events] == ["event: state", "event: state"]
    assert [json.loads(lines[1].removeprefix("data: "))["state"] for lines in events] == ["queued", "cancelled"]
    rest = client.get(f"/api/v1/runs/{run}/events", headers={"Last-Event-ID": "1"}).text
    assert rest.count("event: ") == 1 and "cancelled" in rest
    assert client.get(f"/api/v1/runs/{run}/events", headers={"Last-Event-ID": "x"}).status_code == 422
    assert client.get("/api/v1/runs/run_none/events").status_code == 404


def test_backbones_are_listed_with_their_cut_points_and_imported_weights(
    client: TestClient, services: Services
) -> None:
    with services.database.writing() as session:
        digest = services.store.put(b"weights")
        mine = Weights(network=BackboneName.VGG16, name="mine", sha256=digest, source={})
        registry.set_weights(session, mine)
    found = {item["name"]: item for item in client.get("/api/v1/backbones").json()["items"]}
    assert found.keys() == {name.value for name in CATALOGUE}
    vgg16 = found["vgg16"]
    assert (vgg16["input_size"], vgg16["minimum_size"], vgg16["features"]) == (224, 32, 512)
    assert vgg16["cut_points"][2] == {"name": "block3", "width": 256}
    assert [(item["name"], item["here"]) for item in vgg16["weights"]] == [
        ("imagenet", False),
        ("mine", True),
        ("random", False),
    ]


def test_what_is_not_there_is_named(client: TestClient, dataset: str) -> None:
    for path in (
        "/api/v1/datasets/ds_none",
        "/api/v1/datasets/ds_none/images",
        f"/api/v1/datasets/{dataset}/images/{'0' * 64}/thumbnail",
        "/api/v1/runs/run_none",
        "/api/v1/runs/run_none/files/report.md",
        "/api/v1/models/none",
        "/api/v1/models/none/versions/1",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["type"].endswith(":not-found"), path
    answer = client.put("/api/v1/models/none/aliases/prod", json={"version": 1})
    assert answer.status_code == 404


def test_readiness_names_each_part(client: TestClient) -> None:
    answer = client.get("/readyz")
    checks = answer.json()["checks"]
    assert answer.status_code == 200
    assert checks.keys() == {"database", "schema", "disk", "engine", "broker", "workers"}
    assert {name for name, check in checks.items() if check["ok"]} == {"database", "schema", "disk", "engine"}


def test_an_old_schema_is_not_ready(client: TestClient, services: Services) -> None:
    from ops.migrate import downgrade

    downgrade(services.database)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "run the migrations" in answer.json()["checks"]["schema"]["detail"]


def test_metrics_count_requests_and_jobs(client: TestClient, dataset: str) -> None:
    start(client, dataset)
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    jobs = {(s.labels["queue"], s.labels["state"]): s.value for s in families["espalier_jobs"].samples}
    assert jobs["cpu", "queued"] == 1.0
    requests = [s for s in families["espalier_http_requests"].samples if s.labels["route"] == "/api/v1/runs"]
    assert [(s.labels["method"], s.labels["status"], s.value) for s in requests] == [("POST", "202", 1.0)]


def test_the_documentation_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "https://" not in page
    script = page.split('src="')[1].split('"')[0]
    assert client.get(script).status_code == 200


def test_settings_refuse_lengths_that_would_lose_jobs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ESPALIER_LEASE_S"):
        Settings(var=tmp_path, lease_s=5, let_go_s=45)


def test_a_version_record_is_never_shown_half(client: TestClient, services: Services) -> None:
    created = client.post("/api/v1/datasets?name=x", content=ARCHIVE).json()
    with services.database.writing() as session:
        version = session.get_one(DatasetVersion, datasets.get_versions(session, created["id"])[0].id)
        datasets.start_ingest(session, version.id)
        datasets.set_progress(session, version.id, {"stage": "reading", "fraction": 0.5, "eta_s": 3.0})
    shown = client.get(f"/api/v1/datasets/{created['id']}").json()
    assert (shown["state"], shown["progress"]["fraction"], shown["images"]) == ("ingesting", 0.5, 0)
