"""What Prometheus is told, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re

from fastapi.testclient import TestClient
from flat import PNG, Loads, add_model, flat_bundle, serve
from running import ROOT

from api.deps import Services
from api.metrics import MODELS, OTHERS, Metrics


def test_engines_models_and_memory_are_told(client: TestClient, services: Services) -> None:
    serve(client, services.settings, Loads())
    backbone = services.store.put(b"a network")
    for seed, name in enumerate(("one", "two")):
        add_model(services, name, flat_bundle(backbone, seed=seed))
        for _ in range(3):
            assert client.post(f"/api/v1/models/{name}/predict", content=PNG).status_code == 200
    page = client.get("/metrics").text
    of_backbone = f'{{backbone="{backbone[:12]}",precision="float32"}}'
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(found[f"espalier_engine_images_total{of_backbone}"]) == 8, "two golden ones, and what was sent"
    assert float(found[f"espalier_engine_batches_total{of_backbone}"]) == 8
    assert float(found[f"espalier_engine_busy_seconds_total{of_backbone}"]) > 0
    assert float(found[f"espalier_engine_queued_images{of_backbone}"]) == 0
    assert float(found[f"espalier_engine_batch_limit{of_backbone}"]) >= 1
    assert float(found[f"espalier_shelf_models{of_backbone}"]) == 2
    assert float(found[f"espalier_shelf_bytes{of_backbone}"]) > 0
    assert float(found['espalier_predictions_total{model="one"}']) == 3


def test_no_number_of_models_makes_more_labels_than_are_allowed() -> None:
    metrics = Metrics()
    for number in range(MODELS + 50):
        for _ in range(2):
            metrics.saw_prediction(f"model-{number}", 1, {})
    lines = [line for line in metrics.page(None).decode().splitlines() if line.startswith("espalier_predictions_total")]
    assert len(lines) == MODELS + 1
    assert f'espalier_predictions_total{{model="{OTHERS}"}} 100.0' in lines


def test_the_dashboard_asks_for_metrics_that_there_are(client: TestClient, services: Services) -> None:
    serve(client, services.settings, Loads())
    add_model(services, "one", flat_bundle(services.store.put(b"a network")))
    client.post("/api/v1/models/one/predict", content=PNG)
    known = set(re.findall(r"^(espalier_\w+?)(?:\{| )", client.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 8
    for expression in asked:
        names = re.findall(r"espalier_\w+", expression)
        assert names and set(names) <= known, expression
