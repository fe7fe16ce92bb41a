"""The metrics for Prometheus; the Grafana dashboard may only use metrics that exist."""

from __future__ import annotations

import json
import math
import re

import numpy as np
from fastapi.testclient import TestClient
from flat_models import PNG, CountingLoader, add_model, flat_bundle, serve
from running import ROOT

from api.dependencies import Services
from api.metrics import LABELLED_MODELS, OTHER_MODELS, Metrics
from artifacts.store import digest_of
from inference.batcher import Batcher
from inference.engine import FlatEngine
from inference.shelf import LoadedBackbone
from recipes.recipe import Precision


def figures(page: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_an_evicted_backbone_has_no_gauges_and_its_work_stays_counted() -> None:
    metrics = Metrics()
    batcher = Batcher(FlatEngine(), 4)
    loaded = [LoadedBackbone(digest_of(b"a network"), Precision.FLOAT32, batcher, 1000, 1)]
    metrics.watch(lambda: loaded)
    assert metrics.render(None).count(b"espalier_shelf_bytes{") == 1
    batcher.submit(np.zeros((3, 8, 8, 3), np.uint8), math.inf).result()
    loaded.clear()
    batcher.close()
    page = metrics.render(None).decode()
    assert "espalier_shelf_bytes{" not in page and "espalier_engine_queued_images{" not in page
    of_backbone = f'{{backbone="{digest_of(b"a network")[:12]}",precision="float32"}}'
    assert figures(page)[f"espalier_engine_images_total{of_backbone}"] == 3


def test_engines_models_and_memory_are_reported(client: TestClient, services: Services) -> None:
    serve(client, services.settings, CountingLoader())
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
    for number in range(LABELLED_MODELS + 50):
        for _ in range(2):
            metrics.count_prediction(f"model-{number}", 1, {})
    lines = [
        line for line in metrics.render(None).decode().splitlines() if line.startswith("espalier_predictions_total")
    ]
    assert len(lines) == LABELLED_MODELS + 1
    assert f'espalier_predictions_total{{model="{OTHER_MODELS}"}} 100.0' in lines


def test_the_dashboard_asks_for_metrics_that_there_are(client: TestClient, services: Services) -> None:
    serve(client, services.settings, CountingLoader())
    add_model(services, "one", flat_bundle(services.store.put(b"a network")))
    client.post("/api/v1/models/one/predict", content=PNG)
    known = set(re.findall(r"^(espalier_\w+?)(?:\{| )", client.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((ROOT / "deploy" / "dashboards" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 8
    for expression in asked:
        names = re.findall(r"espalier_\w+", expression)
        assert names and set(names) <= known, expression
