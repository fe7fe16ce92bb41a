"""Numbers and several labels from upload to prediction, each in one mode, and what MLflow shows of them."""

from __future__ import annotations

from typing import Any

import mlflow
import pytest
import sample
from running import Service

LEVELS = [40 + 4 * number for number in range(40)]
SLOWLY = {"epochs": 40, "batch_size": 4, "optimizer": {"name": "adam", "learning_rate": 0.01}}
TUNED = {"mode": "fine-tuning", "augmentation": None, "fine_tune": {"learning_rate": 1e-5, "epochs": 2}}


def upload(service: Service, name: str, column: str, values: list[str], files: list[bytes]) -> dict[str, Any]:
    """Return a ready data set of pictures that a labels.csv names."""
    lines = [f"path,{column}", *(f"{number}.png,{value}" for number, value in enumerate(values))]
    pictures = {f"{number}.png": data for number, data in enumerate(files)}
    return service.upload(name, sample.zipped({"labels.csv": "\n".join(lines).encode(), **pictures}))


@pytest.mark.slow
def test_a_number_is_learned_and_answered(service: Service) -> None:
    greys = [sample.png(level, (level, level, level)) for level in LEVELS]
    dataset = upload(service, "greys", "target", [str(level) for level in LEVELS], greys)
    assert dataset["task"] == "regression" and dataset["target"] == {"min": 40, "max": 196, "mean": 118}
    run = service.train(dataset["id"], "greys", **SLOWLY)
    assert run["state"] == "succeeded", run["error"]
    metrics = run["metrics"]
    assert metrics["r2"] > 0.6
    for name in ("rmse", "mae", "r2"):
        low, high = metrics[f"{name}_ci95"]
        assert low < metrics[name] < high and metrics[f"{name}_sd"] >= 0
    assert {"values.png", "curves.png", "report.md"} <= {file["name"] for file in run["files"]}

    grey = sample.png(9_999, (120, 120, 120))
    answer = service.http.post("/api/v1/models/greys/predict", content=grey).json()["predictions"][0]
    assert answer.keys() == {"value"} and 60 < answer["value"] < 180

    refused = service.http.post(
        "/api/v1/runs", json={"dataset": dataset["id"], "name": "greys", "recipe": {"class_weights": "auto"}}
    )
    assert (refused.status_code, refused.json()["field"]) == (422, "recipe.class_weights")

    client = mlflow.MlflowClient(service.mlflow_url)
    found = service.until(f"/api/v1/runs/{run['id']}", lambda run: run["mlflow_url"] is not None)
    run_id = found["mlflow_url"].rsplit("/", 1)[1]
    service.until(f"/api/v1/runs/{run['id']}", lambda _: client.get_run(run_id).info.status == "FINISHED")
    shown = client.get_run(run_id)
    assert shown.data.metrics["cv/rmse"] == pytest.approx(metrics["rmse"])
    assert shown.data.metrics["cv/rmse_high"] == pytest.approx(metrics["rmse_ci95"][1])
    assert "Root mean squared error" in shown.data.tags["mlflow.note.content"]
    experiment = client.get_experiment_by_name("greys")
    assert experiment is not None
    assert experiment.tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "False"
    assert "Numbers from 40 to 196" in experiment.tags["mlflow.note.content"]


@pytest.mark.slow
def test_labels_are_learned_by_a_whole_network_and_answered(service: Service) -> None:
    has = [(number % 2 == 0, number % 3 == 0) for number in range(48)]
    values = ["|".join(["green"] * is_green + ["red"] * is_red) or "|" for is_red, is_green in has]
    pictures = [
        sample.png(number, (200 if is_red else 60, 200 if is_green else 60, 60))
        for number, (is_red, is_green) in enumerate(has)
    ]
    dataset = upload(service, "lights", "label", values, pictures)
    assert dataset["task"] == "multilabel"
    assert dataset["classes"] == [{"name": "green", "images": 16}, {"name": "red", "images": 24}]
    run = service.train(dataset["id"], "lights", **TUNED | SLOWLY)
    assert run["state"] == "succeeded", run["error"]
    assert min(run["metrics"]["f1_macro"], run["metrics"]["f1_micro"]) > 0.8
    assert "labels.png" in {file["name"] for file in run["files"]}
    both, neither = sample.png(7_001, (200, 200, 60)), sample.png(7_002, (60, 60, 60))
    files = [("images", ("both.png", both)), ("images", ("neither.png", neither))]
    answers = service.http.post("/api/v1/models/lights/predict", files=files).json()["predictions"]
    assert [answer["labels"] for answer in answers] == [["green", "red"], []]
    assert answers[0]["probabilities"].keys() == {"green", "red"}
