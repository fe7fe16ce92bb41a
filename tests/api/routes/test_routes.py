"""Routes without a worker, on each database: lists, refusals, documentation."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import records
import sample
from database_marks import ON_SQLITE
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event

from api.dependencies import Services
from artifacts.manifest import dump
from errors import DatasetRefused, Refused
from models import comparison as comparisons
from models import dataset as datasets
from models import registry, run_jobs
from models import run as runs
from models import worker as workers
from models.base import now
from models.dataset import DatasetVersion
from models.job import JobState, Queue
from models.registry import Weights
from models.session import Database
from models.worker import Worker
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount
from recipes.recipe import Task
from settings import Settings

SNAPSHOT = Path(__file__).parent.parent / "openapi.json"
ARCHIVE = sample.zipped(sample.coloured(per_class=2))


@pytest.fixture
def database_url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def ready(client: TestClient, services: Services, counts: list[ClassCount], name: str = "ready") -> str:
    """Mark a data set as ready without a worker. Requests for runs are checked only against its row."""
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


@ON_SQLITE
def test_the_documented_surface_is_the_reviewed_one(client: TestClient) -> None:
    """After an intended change, run python tests/api/snapshot.py and review the difference."""
    found = client.get("/openapi.json").json()
    assert found == json.loads(SNAPSHOT.read_text())


@ON_SQLITE
def test_values_that_do_not_work_yet_are_not_offered(client: TestClient) -> None:
    run_jobs = client.get("/openapi.json").json()["components"]["schemas"]
    assert run_jobs["Mode"]["enum"] == ["feature-extraction", "fine-tuning", "from-scratch"]


def test_a_run_is_queued_with_every_default_filled_in(
    client: TestClient, dataset: str, requested: list[tuple[str, str]]
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
        "network": None,
        "image_size": 299,
        "resize": "squash",
        "task": "multiclass",
        "head": {"hidden": [], "activation": "relu", "dropout": 0.0, "l2": 0.0001},
        "loss": "auto",
        "optimizer": {"name": "adam", "learning_rate": 0.001},
        "batch_size": 32,
        "epochs": 100,
        "early_stopping": {"monitor": "val_loss", "patience": 5, "min_delta": 0.0, "target": None},
        "folds": {"k": 4, "repeats": 1, "validation_fraction": 0.15},
        "augmentation": None,
        "unfreeze": None,
        "fine_tune": None,
        "class_weights": "none",
        "precision": "float32",
        "recalibrate": False,
        "neighbours": False,
        "seed": 0,
    }
    assert requested[-1][0] == "cpu"
    assert client.get(answer.headers["location"]).json() == run


@ON_SQLITE
def test_fine_tuning_wakes_the_worker_with_a_gpu_if_there_is_one(
    client: TestClient, services: Services, dataset: str, requested: list[tuple[str, str]]
) -> None:
    start(client, dataset, mode="fine-tuning")
    with services.database.writing() as session:
        workers.see_worker(session, "there", [Queue.GPU])
    start(client, dataset, mode="fine-tuning")
    start(client, dataset)
    assert [queue for queue, _ in requested[-3:]] == ["cpu", "gpu", "cpu"]


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"folds": {"k": 5}}, "recipe.folds.k"),
        ({"folds": {"k": 1}}, "recipe.folds.k"),
        ({"backbone": "xception", "image_size": 32}, "recipe.image_size"),
        ({"backbone": "vgg16", "features_from": "block6"}, "recipe.features_from"),
        ({"backbone": "resnet51"}, "recipe.backbone"),
        ({"weights": "mine"}, "recipe.weights"),
        ({"weights": "../x"}, "recipe.weights"),
        ({"mode": "fine-tuning", "unfreeze": "block15"}, "recipe.unfreeze"),
        ({"unfreeze": "block14"}, "recipe.unfreeze"),
        ({"mode": "distillation"}, "recipe.mode"),
        ({"mode": "from-scratch", "backbone": "vgg16"}, "recipe.backbone"),
        (
            {"mode": "from-scratch", "network": {"layers": [{"type": "flatten"}, {"type": "pooling"}]}},
            "recipe.network.layers[1].inputs",
        ),
        ({"backbone": "auto"}, "recipe.weights"),
        ({"precision": "int4"}, "recipe.precision"),
        ({"precision": "bfloat16", "recalibrate": True}, "recipe.recalibrate"),
        ({"augmentation": {"flip": True}}, "recipe.augmentation"),
        ({"task": "binary"}, "recipe.task"),
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
@ON_SQLITE
def test_an_impossible_recipe_is_refused_at_once_naming_the_field(
    client: TestClient, dataset: str, recipe: dict[str, Any], field: str
) -> None:
    answer = start(client, dataset, **recipe)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith(":recipe-invalid")
    assert answer.json()["field"] == field
    assert answer.json()["detail"].startswith(f"{field}: ")
    assert client.get("/api/v1/runs").json()["items"] == []


@ON_SQLITE
def test_a_k_that_is_too_large_says_which_class_is_too_small(client: TestClient, dataset: str) -> None:
    assert "'b'" in start(client, dataset, folds={"k": 5}).json()["detail"]


@ON_SQLITE
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


@ON_SQLITE
def test_a_rejected_archive_that_is_kept_is_taken_in_again_once(client: TestClient, services: Services) -> None:
    dataset = client.post("/api/v1/datasets?name=waiting", content=ARCHIVE).json()["id"]
    address = f"/api/v1/datasets/{dataset}/versions/1/ingest"
    assert client.post(f"{address}?allow_refused=true").status_code == 409
    with services.database.writing() as session:
        version = datasets.get_versions(session, dataset)[0]
        error = {"code": "dataset-refused", "detail": "18 of 34.", "retry": "allow_refused"}
        datasets.mark_rejected(session, version.id, error, warnings=["Look."], keep_archive=True)
    shown = client.get(f"/api/v1/datasets/{dataset}").json()
    assert (shown["warnings"], shown["error"]["retry"]) == (["Look."], "allow_refused")
    assert client.post(address).status_code == client.post(f"{address}?names=utf-16").status_code == 422
    answers = [
        client.post(f"{address}?names=cp949&allow_refused=true", headers={"Idempotency-Key": "once"}) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json() and answers[0].json()["version"] == 2
    with services.database.reading() as session:
        again, rejected = datasets.get_versions(session, dataset)
    assert (again.code_page, again.allow_refused, rejected.archive_sha256) == ("cp949", True, None)
    assert client.post(f"{address}?allow_refused=true").status_code == 409
    assert client.post(f"/api/v1/datasets/{dataset}/versions/9/ingest?allow_refused=true").status_code == 404


@pytest.mark.parametrize("version", [2, 0])
def test_a_run_needs_a_version_that_exists(client: TestClient, dataset: str, version: int) -> None:
    answer = client.post("/api/v1/runs", json={"dataset": dataset, "name": "m", "version": version})
    assert answer.status_code == (404 if version else 422)


@pytest.mark.parametrize("body", [b"{not json", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}"])
@ON_SQLITE
def test_a_body_that_is_no_json_is_told(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/v1/runs", content=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["field"] == "body"
    assert answer.json()["detail"].startswith("body: Expected JSON")


@pytest.mark.parametrize("way", ["announced", "streamed"])
@ON_SQLITE
def test_a_json_body_above_a_mebibyte_is_refused(client: TestClient, way: str) -> None:
    body = json.dumps({"dataset": "x" * 2**20, "name": "m"}).encode()
    answer = client.post("/api/v1/runs", content=body if way == "announced" else iter([body]))
    assert answer.status_code == 413
    assert answer.json()["type"].endswith(":too-large")
    received = f"{len(body)} bytes" if way == "announced" else "more than 1048576 bytes"
    assert answer.json()["detail"] == f"The body has {received}; the limit is 1 MiB."


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "application/json"])
@ON_SQLITE
def test_a_json_body_is_read_whatever_it_is_called(client: TestClient, dataset: str, content_type: str) -> None:
    order = json.dumps({"dataset": dataset, "name": "m"})
    answer = client.post("/api/v1/runs", content=order, headers={"Content-Type": content_type})
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("order", "detail"),
    [
        ({"dataset": "ds_x", "name": "Upper"}, "Received 'Upper'"),
        ({"dataset": "ds_x"}, "name: Field required. Received nothing."),
        ({"dataset": 5, "name": "m"}, "Received 5."),
        ({"dataset": "ds_x", "name": "m", "recipe": {"epochs": 0}}, "recipe.epochs: Input should be greater"),
        ({"dataset": "ds_x", "name": "m", "recipe": {"epochs": 0}}, "Received 0."),
        ({"dataset": "ds_x", "name": "m", "extra": "x" * 1000}, "xxx...xxx"),
        ([], "body: "),
    ],
)
@ON_SQLITE
def test_a_problem_says_what_was_expected_and_what_was_received(client: TestClient, order: Any, detail: str) -> None:
    answer = client.post("/api/v1/runs", json=order)
    assert answer.status_code == 422
    assert detail in answer.json()["detail"] and len(answer.json()["detail"]) < 300


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


@ON_SQLITE
def test_an_empty_cursor_asks_for_the_first_page(client: TestClient, dataset: str) -> None:
    for path in ("/api/v1/datasets", f"/api/v1/datasets/{dataset}/images", "/api/v1/runs", "/api/v1/models"):
        assert client.get(f"{path}?cursor=").json() == client.get(path).json()
    assert client.get("/api/v1/datasets?cursor=").json()["items"]


# Names in which databases' collations differ: upper case, accents, punctuation, and beyond 16 bits.
_PATHS = ["a/1.png", "B/2.png", "a/Z.png", "a-b/3.png", "é/4.png", "e/5.png", "_/6.png", "😀/7.png", "\uffee/8.png"]


def test_images_are_listed_in_the_order_of_the_manifest(
    client: TestClient, services: Services, database: Database
) -> None:
    with database.writing() as session:
        found = records.ready_version(session, images=[records.accepted(path) for path in _PATHS]).dataset_id
    statements: list[str] = []
    event.listen(services.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    seen: list[str] = []
    cursor = ""
    while cursor is not None:
        page = client.get(f"/api/v1/datasets/{found}/images", params={"limit": 2, "cursor": cursor}).json()
        seen += [image["path"] for image in page["items"]]
        cursor = page["next_cursor"]
    assert seen == sorted(_PATHS)
    if not database.is_sqlite:  # this server has no other collation to be wrong in
        last = next(one for one in reversed(statements) if "ORDER BY" in one and "membership" in one)
        assert last.count('membership.path COLLATE "C"') == 2, "to order by, and to begin after"


def test_a_label_chooses_images_in_each_unicode_form_and_an_empty_one_chooses_nothing(
    client: TestClient, database: Database
) -> None:
    old = unicodedata.normalize("NFD", "chêne")  # as versions from before have it
    images = [
        records.accepted("1.png", label="chêne"),
        records.accepted("2.png", label="rose"),
        records.accepted("3.png", label=old),
    ]
    with database.writing() as session:
        found = records.ready_version(session, images=images).dataset_id
    oaks = ["1.png", "3.png"]
    for label, paths in [
        ("", ["1.png", "2.png", "3.png"]),
        ("rose", ["2.png"]),
        ("chêne", oaks),
        (old, oaks),
        ("x", []),
    ]:
        page = client.get(f"/api/v1/datasets/{found}/images", params={"label": label}).json()
        assert [image["path"] for image in page["items"]] == paths


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "cursor=%F0%9F", "cursor=!!!", "cursor=AGE"])
@ON_SQLITE
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
    over = client.get(f"/api/v1/runs/{run}/events", headers={"Last-Event-ID": "2"})
    assert (over.status_code, over.content) == (204, b""), "else a browser would ask for ever"
    assert client.get(f"/api/v1/runs/{run}/events", headers={"Last-Event-ID": "x"}).status_code == 422
    assert client.get("/api/v1/runs/run_none/events").status_code == 404


@pytest.mark.parametrize("number", [2**31, 10**30, -1, "9" * 5000], ids=["2^31", "10^30", "-1", "5000 digits"])
def test_a_number_that_no_database_keeps_is_told(client: TestClient, dataset: str, number: Any) -> None:
    run = start(client, dataset).json()["id"]
    client.post(f"/api/v1/runs/{run}/cancel")
    for answer in (
        client.get(f"/api/v1/runs/{run}/events", headers={"Last-Event-ID": str(number)}),
        client.get(f"/api/v1/datasets/{dataset}/images", params={"version": number}),
        client.get(f"/api/v1/models/m/versions/{number}"),
        client.post("/api/v1/models/m/predict", params={"version": number}, content=b"x"),
    ):
        assert answer.status_code == 422, answer.text
        assert answer.json()["field"] in ("Last-Event-ID", "version")
    if isinstance(number, int):
        for answer in (
            client.post("/api/v1/runs", json={"dataset": dataset, "name": "m", "version": number}),
            client.put("/api/v1/models/m/aliases/prod", json={"version": number}),
        ):
            assert (answer.status_code, answer.json()["field"]) == (422, "version")


def test_a_nul_in_a_name_or_an_id_is_told(client: TestClient, dataset: str) -> None:
    for path in (
        "/api/v1/datasets/ds%00",
        f"/api/v1/datasets/{dataset}/images?label=%00",
        f"/api/v1/datasets/{dataset}/images/%00/thumbnail",
        "/api/v1/runs/%00",
        "/api/v1/runs/%00/events",
        "/api/v1/runs/run_none/files/%00",
        "/api/v1/models/%00",
        "/api/v1/models/m/versions/1?x=%00",
    ):
        answer = client.get(path)
        assert answer.status_code == 422, path
        assert answer.json()["type"].endswith(":request-invalid") and "%00" in answer.json()["detail"]
    assert client.delete("/api/v1/datasets/ds%00").status_code == 422
    answer = client.post("/api/v1/runs", json={"dataset": "ds\0", "name": "m"})
    assert (answer.status_code, answer.json()["field"]) == (422, "dataset")


def test_a_file_of_a_run_is_sent_as_it_was_made_or_not_at_all(
    client: TestClient, services: Services, dataset: str
) -> None:
    run = start(client, dataset).json()["id"]
    digest = services.store.put(b"0123456789")
    with services.database.writing() as session:
        runs.add_artifact(session, run, "report.md", digest, 10, "text/markdown")
    (file,) = client.get(f"/api/v1/runs/{run}").json()["files"]
    answer = client.get(file["url"])
    assert (answer.status_code, answer.content) == (200, b"0123456789")
    assert answer.headers["content-type"].startswith("text/markdown")
    assert answer.headers["etag"] == f'"{digest}"'
    for known in (f'"{digest}"', f'"other", W/"{digest}"', "*"):
        again = client.get(file["url"], headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", f'"{digest}"')
    assert client.get(file["url"], headers={"If-None-Match": '"other"'}).status_code == 200
    part = client.get(file["url"], headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    for sent, status, said in [
        ("bytes=10-", 416, "which has 10 bytes"),
        ("bytes=4-2", 400, "bytes=FIRST-LAST"),
        ("lines=1-2", 400, "bytes=FIRST-LAST"),
    ]:
        refused = client.get(file["url"], headers={"Range": sent})
        assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json"), sent
        assert said in refused.json()["detail"]
        assert refused.headers.get("content-range") == ("bytes */10" if status == 416 else None)
    services.store.path_for(digest).write_bytes(b"0123456780")
    assert client.get(file["url"]).json()["type"].endswith(":corrupt")


def test_a_version_that_was_rejected_later_says_which_files_were_refused(
    client: TestClient, services: Services, dataset: str
) -> None:
    refused = [Refused("a/1.png", "it is empty"), Refused("a/2.png", "it is a text")]
    with services.database.writing() as session:
        found = session.get_one(datasets.Dataset, dataset)
        version = datasets.add_version(session, found, records.digest("more"))
        error = {"code": "dataset-refused", "detail": "Too many."}
        datasets.mark_rejected(session, version.id, error, refused, ignored=3)
    shown = client.get(f"/api/v1/datasets/{dataset}").json()
    assert (shown["version"], shown["state"], shown["refused"], shown["refused_total"]) == (1, "ready", [], 0)
    second, first = shown["versions"]
    (listed,) = client.get("/api/v1/datasets").json()["items"]
    assert listed["versions"][0]["refused_total"] == 2 and "refused" not in {*listed, *listed["versions"][0]}
    assert second["refused"] == [vars(file) for file in refused]
    assert (second["refused_total"], second["ignored"]) == (2, 3)
    assert second["error"] == {
        "type": "urn:espalier:problem:dataset-refused",
        "title": "Data set refused",
        "status": 422,
        "detail": "Too many.",
    }
    assert (first["refused"], first["refused_total"], first["ignored"], first["error"]) == ([], 0, 0, None)


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
    assert vgg16["unfreeze"] == ["block1", "block2", "block3", "block4", "block5", "all"]
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
    good = {"database", "schema", "disk", "process", "store", "engine", "mlflow"}
    assert checks.keys() == good | {"broker", "workers"}
    assert {name for name, check in checks.items() if check["ok"]} == good


@ON_SQLITE
def test_a_process_that_ends_soon_is_not_ready_and_has_its_clients_leave(
    client: TestClient, services: Services
) -> None:
    assert "connection" not in client.get("/healthz").headers
    services.shutdown.is_draining = True
    answer = client.get("/readyz")
    assert answer.status_code == 503 and answer.json()["checks"]["process"] == {
        "ok": False,
        "detail": "is shutting down",
    }
    assert client.get("/healthz").headers["connection"] == "close"


def test_an_old_schema_is_not_ready(client: TestClient, services: Services) -> None:
    from ops.migrate import downgrade

    downgrade(services.database)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    checks = answer.json()["checks"]
    assert "run the migrations" in checks["schema"]["detail"]
    assert not checks["workers"]["ok"], "their table is away"


def swap(client: TestClient, **parts: Any) -> None:
    """Replace some of the services of the process."""
    state = client.app.state  # type: ignore[attr-defined]
    state.services = replace(state.services, **parts)


@ON_SQLITE
def test_a_part_that_breaks_in_any_way_is_named_and_the_others_are_still_asked(
    client: TestClient, services: Services
) -> None:
    def broken() -> str:
        raise RuntimeError("secret: Illegal instruction")

    swap(client, probe_engine=broken)
    shutil.rmtree(services.store.root)
    answer = client.get("/readyz")
    checks = answer.json()["checks"]
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert {name for name, check in checks.items() if check["ok"]} == {"database", "schema", "process", "mlflow"}
    assert checks["engine"]["detail"].startswith("RuntimeError") and "secret" not in answer.text
    assert checks["disk"]["detail"].startswith("FileNotFoundError")


def test_the_engine_is_asked_and_one_that_is_not_there_is_seen() -> None:
    from api.engine_probe import probe

    assert probe("CPU")
    with pytest.raises(RuntimeError):
        probe("NO_SUCH_DEVICE")


def test_metrics_count_requests_and_jobs(client: TestClient, dataset: str) -> None:
    start(client, dataset)
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    jobs = {(s.labels["queue"], s.labels["state"]): s.value for s in families["espalier_jobs"].samples}
    assert jobs["cpu", "queued"] == 1.0
    requests = [s for s in families["espalier_http_requests"].samples if s.labels["route"] == "/api/v1/runs"]
    assert [(s.labels["method"], s.labels["status"], s.value) for s in requests] == [("POST", "202", 1.0)]


def test_metrics_are_answered_while_the_database_is_away(client: TestClient, dataset: str) -> None:
    assert "espalier_jobs{" in client.get("/metrics").text
    away = Database("postgresql://nobody@127.0.0.1:1/nothing")
    swap(client, database=away)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "espalier_jobs{" not in answer.text and "espalier_http_requests_total{" in answer.text
    away.close()


def test_metrics_are_answered_without_a_schema(client: TestClient, services: Services) -> None:
    from ops.migrate import downgrade

    downgrade(services.database)
    assert client.get("/metrics").status_code == 200


@ON_SQLITE
def test_every_route_documents_its_problems(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status in ("422", "4XX", "5XX"):
                assert operation["responses"][status]["content"] == problem, (method, path, status)
    answers = {
        path: operations["get"]["responses"] for path, operations in document["paths"].items() if "get" in operations
    }
    assert "204" in answers["/api/v1/runs/{run_id}/events"]
    assert {"200", "206", "304"} <= answers["/api/v1/runs/{run_id}/files/{name}"].keys()
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    real = client.get("/api/v1/runs/run_none").json()
    assert set(document["components"]["schemas"]["Problem"]["required"]) < real.keys()


@ON_SQLITE
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


# --- once more -------------------------------------------------------------------------------------------------------


def test_a_failed_run_is_queued_once_more_with_what_it_has(
    client: TestClient, services: Services, dataset: str, requested: list[tuple[str, str]]
) -> None:
    run = start(client, dataset).json()["id"]
    url = f"/api/v1/runs/{run}"
    refused = client.post(f"{url}/retry")
    assert refused.status_code == 409 and "This run is queued" in refused.json()["detail"]
    with services.database.writing() as session:
        job = records.job_of(session, run)
        runs.start_run(session, run)
        runs.add_fold(session, records.fold(run, outcome_sha256=records.digest("outcome")))
        assert run_jobs.mark_failed(session, job, {"code": "crashed", "detail": "It died."})
        job.state = JobState.FAILED
    assert client.get(url).json()["error"]["type"].endswith(":crashed")
    again = client.post(f"{url}/retry")
    assert again.status_code == 202, again.text
    shown = again.json()
    assert (shown["state"], shown["error"], shown["finished_at"]) == ("queued", None, None)
    assert [fold["fold"] for fold in shown["folds"]] == [0]
    assert len(requested) == 3 and requested[-1][0] == "cpu"
    assert client.post(f"{url}/retry").status_code == 409, "it waits already"
    assert client.post("/api/v1/runs/run_unknown/retry").status_code == 404


def test_a_run_whose_data_set_is_gone_cannot_be_trained_again(
    client: TestClient, services: Services, dataset: str
) -> None:
    run = start(client, dataset).json()["id"]
    with services.database.writing() as session:
        assert run_jobs.mark_failed(session, records.job_of(session, run), {"code": "crashed", "detail": "It died."})
    assert client.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    refused = client.post(f"/api/v1/runs/{run}/retry")
    assert refused.status_code == 409 and "was deleted" in refused.json()["detail"]


def test_workers_say_which_queues_they_serve(client: TestClient, services: Services) -> None:
    assert client.get("/api/v1/workers").json() == {"items": [], "next_cursor": None}
    with services.database.writing() as session:
        workers.see_worker(session, "gone", [Queue.CPU])
        session.get_one(Worker, "gone").looked_at = now() - timedelta(hours=1)
        workers.see_worker(session, "here", [Queue.GPU, Queue.INGEST])
    here, gone = client.get("/api/v1/workers").json()["items"]
    assert (here["name"], here["queues"], here["is_alive"]) == ("here", ["gpu", "ingest"], True)
    assert (gone["name"], gone["queues"], gone["is_alive"]) == ("gone", ["cpu"], False)
    first = client.get("/api/v1/workers?limit=1").json()
    assert client.get("/api/v1/workers", params={"limit": 1, "cursor": first["next_cursor"]}).json()["items"] == [gone]
    assert client.get("/api/v1/workers?cursor=bm9uZQ").json()["field"] == "cursor"


def test_lists_leave_out_what_grows_with_the_classes_and_versions_have_pages(
    client: TestClient, services: Services, dataset: str
) -> None:
    digest = services.store.put(b"bundle and backbone")
    tables = {"confusion": [[1, 0], [0, 1]], "per_class": [{"label": "a"}]}
    with services.database.writing() as session:
        version = records.ready_version(session, "counted")
        for number in range(52):
            run = records.queued_run(session, version, "m")
            run.metrics = {"accuracy": number, **tables}
            registry.add_model_version(session, records.PRINCIPAL, "m", run.id, digest, digest)
        without = records.queued_run(session, version, "n").id
    listed = {run["id"]: run["metrics"] for run in client.get("/api/v1/runs?limit=200").json()["items"]}
    assert listed.pop(without) is None and len(listed) == 52
    assert all(metrics.keys() == {"accuracy"} for metrics in listed.values())
    assert client.get(f"/api/v1/runs/{run.id}").json()["metrics"] == {"accuracy": 51, **tables}
    (model,) = client.get("/api/v1/models").json()["items"]
    assert model == client.get("/api/v1/models/m").json()
    assert [one["metrics"] for one in model["versions"]] == [{"accuracy": number} for number in range(51, 1, -1)]
    assert model["versions_total"] == 52
    first = client.get("/api/v1/models/m/versions?limit=40").json()
    rest = client.get("/api/v1/models/m/versions", params={"limit": 40, "cursor": first["next_cursor"]}).json()
    assert [one["version"] for one in first["items"] + rest["items"]] == list(range(52, 0, -1))
    assert rest["next_cursor"] is None and rest["items"][0]["metrics"] == {"accuracy": 11}
    assert client.get("/api/v1/models/m/versions/52").json()["metrics"] == {"accuracy": 51, **tables}


def test_lists_are_filtered_by_state_name_or_data_set(client: TestClient, services: Services) -> None:
    rejected = DatasetRefused("No images.").record()
    digest = services.store.put(b"bundle and backbone")
    with services.database.writing() as session:
        first, second = (records.ready_version(session, name) for name in ("first", "second"))
        added = datasets.add_version(session, records.dataset_of(session, second), records.digest("more"))
        datasets.mark_rejected(session, added.id, rejected)
        none = records.waiting_version(session, "none")
        datasets.mark_rejected(session, none.id, rejected, [Refused("a.png", "it is empty")])
        mine, failed = (records.queued_run(session, first, name).id for name in ("mine", "failed"))
        also = records.queued_run(session, second, "mine").id
        session.get_one(runs.Run, failed).state = runs.RunState.FAILED
        compared, _ = comparisons.create_comparison(session, records.PRINCIPAL, first.id, "mine", [records.RECIPE])
        (of_comparison,) = (run.id for run in comparisons.get_runs(session, compared.id))
        registry.add_model_version(session, records.PRINCIPAL, "mine", mine, digest, digest)
        registry.add_model_version(session, records.PRINCIPAL, "failed", also, digest, digest)
        datasets.delete_dataset(records.dataset_of(session, first))
    for query, key, found in [
        ("runs?state=failed", "id", [failed]),
        ("runs?name=mine", "id", [of_comparison, also, mine]),
        (f"runs?dataset={second.dataset_id}", "id", [also]),
        (f"runs?dataset={first.dataset_id}&state=queued", "id", [of_comparison, mine]),
        ("runs?state=running", "id", []),
        ("datasets?state=ready", "id", [second.dataset_id]),
        ("datasets?state=rejected&name=none", "id", [none.dataset_id]),
        ("datasets?state=rejected&name=second", "id", []),
        ("comparisons?state=queued", "id", [compared.id]),
        ("comparisons?state=failed", "id", []),
        (f"comparisons?dataset={first.dataset_id}&name=mine", "id", [compared.id]),
        (f"comparisons?dataset={second.dataset_id}", "id", []),
        ("models?name=mine", "name", ["mine"]),
        (f"models?dataset={second.dataset_id}", "name", ["failed"]),
    ]:
        answer = client.get(f"/api/v1/{query}")
        assert [one[key] for one in answer.json().get("items", ())] == found, (query, answer.text)
    for query in ("state=broken", "state=", "name=Not A Name", "dataset=none", "name=a&name=b"):
        for root in ("runs", "datasets", "comparisons", "models"):
            refused = client.get(f"/api/v1/{root}?{query}")
            assert (refused.status_code, refused.json()["field"]) == (422, query.split("=")[0]), (root, query)
