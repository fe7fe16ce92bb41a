"""Several recipes on the same folds, against the running service: one table, a picture, and MLflow's pages."""

from __future__ import annotations

import io
from typing import Any

import mlflow
import pytest
from PIL import Image
from running import QUICK, Service


@pytest.mark.slow
def test_recipes_are_compared_and_the_table_says_which_is_best(service: Service, colours: dict[str, Any]) -> None:
    deep = {**QUICK, "features_from": "block3", "image_size": 40}
    untrained = {"optimizer": {"learning_rate": 1e-7}, "epochs": 1}
    recipes = [deep, {**deep, "head": {"hidden": [8]}}, {**deep, "head": {"hidden": [2]}, **untrained}]
    order = {"dataset": colours["id"], "name": "contest", "recipes": recipes}
    answer = service.http.post("/api/v1/comparisons", json=order)
    assert answer.status_code == 202, answer.text
    found = service.settled(answer.headers["location"], within_s=300)
    assert found["state"] == "succeeded", found
    assert (found["metric"], found["greater_is_better"]) == ("accuracy", True)
    rows = found["rows"]
    assert [row["state"] for row in rows] == ["succeeded"] * 3
    assert sorted(row["model"]["version"] for row in rows) == [1, 2, 3]
    assert {row["model"]["name"] for row in rows} == {"contest"}

    runs = [service.http.get(f"/api/v1/runs/{row['run']}").json() for row in rows]
    assert [row["score"] for row in rows] == [run["metrics"]["accuracy"] for run in runs]
    assert [row["ci95"] for row in rows] == [run["metrics"]["accuracy_ci95"] for run in runs]
    assert [run["extraction"]["computed"] for run in runs] == [60, 0, 0], "features are shared"

    best = found["best"]
    assert rows[best]["score"] == max(row["score"] for row in rows) and rows[best]["difference"] is None
    worst = rows[2]["difference"]
    assert worst["difference"] == pytest.approx(rows[2]["score"] - rows[best]["score"])
    assert worst["ci95"][0] <= worst["difference"] <= worst["ci95"][1] < 0 and worst["p_value"] < 0.01
    assert all(row["predict_ms"] > 0 and row["training_s"] > row["extraction_s"] >= 0 for row in rows)
    assert len({row["backbone_bytes"] for row in rows}) == 1 and rows[1]["bundle_bytes"] > rows[0]["bundle_bytes"]

    picture = service.http.get(f"{answer.headers['location']}/picture")
    assert Image.open(io.BytesIO(picture.content)).format == "PNG"
    report = service.http.get(f"{answer.headers['location']}/report").text
    assert found["verdict"] in report and report.count("| head.hidden=") == 3
    model = service.http.get("/api/v1/models/contest").json()
    assert model["aliases"] == {"champion": 1}, "a table moves no alias"

    client = mlflow.MlflowClient(service.mlflow_url, registry_uri=service.mlflow_url)

    def is_told(run: dict[str, Any]) -> bool:
        shown = run["mlflow_url"] and client.get_run(run["mlflow_url"].rsplit("/", 1)[-1])
        return bool(shown and "espalier.p_value" in shown.data.tags)

    told = service.until(f"/api/v1/runs/{rows[2]['run']}", is_told)
    page = client.get_run(told["mlflow_url"].rsplit("/", 1)[-1])
    assert page.data.tags["espalier.comparison"] == found["id"]
    assert float(page.data.tags["espalier.difference_to_best"]) == pytest.approx(worst["difference"], abs=1e-4)
    assert "comparison.md" in [file.path for file in client.list_artifacts(page.info.run_id)]
