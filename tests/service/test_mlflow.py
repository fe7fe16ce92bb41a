"""What MLflow's readers see of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import sample
from running import Service


@pytest.fixture
def page(service: Service, trained: dict[str, Any]) -> dict[str, Any]:
    """The finished run, once MLflow is owed nothing about it."""
    url = f"/api/v1/runs/{trained['id']}"
    found = service.until(url, lambda run: run["mlflow_url"] is not None)
    client = mlflow.MlflowClient(service.mlflow_url)
    run_id = found["mlflow_url"].rsplit("/", 1)[1]
    service.until(url, lambda _: client.get_run(run_id).info.status == "FINISHED")
    return found


@pytest.fixture
def client(service: Service) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(service.mlflow_url, registry_uri=service.mlflow_url)


def test_a_run_is_a_parent_with_one_child_per_fold(client: mlflow.MlflowClient, page: dict[str, Any]) -> None:
    base, experiment, _, run = page["mlflow_url"].rsplit("/", 3)
    assert base.endswith("#/experiments")
    parent = client.get_run(run)
    assert parent.info.status == "FINISHED" and parent.info.run_name.startswith("vgg16-block1-extraction-2fold-")
    assert parent.data.metrics["cv/accuracy"] == pytest.approx(page["metrics"]["accuracy"])
    assert parent.data.metrics["cv/accuracy_low"] == pytest.approx(page["metrics"]["accuracy_ci95"][0])
    assert parent.data.params["optimizer.name"] == "adam" and parent.data.params["folds.k"] == "2"
    assert "Accuracy" in parent.data.tags["mlflow.note.content"]
    assert [data.dataset.name for data in parent.inputs.dataset_inputs] == ["colours v1"]
    assert len(parent.data.metrics) < 40
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run}'")
    assert sorted(child.data.tags["espalier.fold"] for child in children) == ["fold-1", "fold-2"]
    for child in children:
        fold = page["folds"][int(child.data.tags["espalier.fold"][-1]) - 1]
        for curve in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
            history = client.get_metric_history(child.info.run_id, curve)
            assert sorted(point.step for point in history) == list(range(1, fold["epochs"] + 1))


def test_an_experiment_has_a_card_and_opens_arranged(client: mlflow.MlflowClient, page: dict[str, Any]) -> None:
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    assert "| red | 20 |" in experiment.tags["mlflow.note.content"]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "cv/accuracy"
    assert json.loads(experiment.tags["mlflow.sharedViewState.espalier"])["orderByKey"] == "metrics.`cv/accuracy`"


def test_pictures_report_and_table_are_there(client: mlflow.MlflowClient, page: dict[str, Any], tmp_path: Path) -> None:
    run = page["mlflow_url"].rsplit("/", 1)[1]
    names = {file.path for file in client.list_artifacts(run)}
    assert {"report.md", "confusion.png", "curves.png", "per_class.json", "recipe.json"} <= names
    table = json.loads(Path(client.download_artifacts(run, "per_class.json", str(tmp_path))).read_text())
    assert [row[0] for row in table["data"]] == ["blue", "green", "red"]


def test_a_registered_version_answers_through_the_service(
    service: Service, client: mlflow.MlflowClient, page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", service.mlflow_url)
    run = page["mlflow_url"].rsplit("/", 1)[1]
    [version] = client.search_model_versions(f"name = 'colours' and run_id = '{run}'")
    assert version.tags["espalier.version"] == "1"
    mlflow.set_tracking_uri(service.mlflow_url)
    model = mlflow.pyfunc.load_model(f"models:/colours/{version.version}")
    images = pd.DataFrame({"image": [sample.png(5, sample.COLOURS["red"]), sample.png(6, sample.COLOURS["blue"])]})
    assert list(model.predict(images)["label"]) == ["red", "blue"]


def test_a_moved_alias_is_mirrored(service: Service, client: mlflow.MlflowClient, page: dict[str, Any]) -> None:
    run = page["mlflow_url"].rsplit("/", 1)[1]
    service.http.put("/api/v1/models/colours/aliases/staging", json={"version": 1})
    [version] = client.search_model_versions(f"name = 'colours' and run_id = '{run}'")

    def is_mirrored(_: Any) -> bool:
        aliases = client.get_registered_model("colours").aliases
        return aliases.get("staging") == version.version and "champion" in aliases

    service.until("/healthz", is_mirrored)


def test_a_failed_run_is_shown_as_failed(
    service: Service, client: mlflow.MlflowClient, unreachable: dict[str, Any]
) -> None:
    found = service.until(f"/api/v1/runs/{unreachable['id']}", lambda run: run["mlflow_url"] is not None)
    mine = found["mlflow_url"].rsplit("/", 1)[1]
    service.until("/healthz", lambda _: client.get_run(mine).info.status == "FAILED")
    assert "cannot be fetched" in client.get_run(mine).data.tags["mlflow.note.content"]
