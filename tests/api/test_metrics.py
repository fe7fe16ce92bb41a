"""What Prometheus is told, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient
from flat import PNG, Loads, add_model, flat_bundle, serve
from running import ROOT

from api.dependencies import Services
from api.metrics import FOLDER, MODELS, OTHERS, Metrics
from artifacts.store import digest_of
from inference.batcher import Batcher
from inference.engine import FlatEngine
from inference.shelf import LoadedBackbone
from recipes.recipe import Precision

# Two processes that count and end, then what a third one tells, before and after the first is known to be dead.
SEVERAL = """
import os
import numpy as np
from api.metrics import Metrics, forget, shared_folder
from recipes.recipe import Precision
from artifacts.store import digest_of
from inference.batcher import Batcher
from inference.engine import FlatEngine
from inference.shelf import LoadedBackbone

def work(images, limit):
    metrics = Metrics(shared_folder())
    batcher = Batcher(FlatEngine(), limit)
    metrics.watch(lambda: [LoadedBackbone(digest_of(b"a network"), Precision.FLOAT32, batcher, 1000, images)])
    for _ in range(images):
        batcher.submit(np.zeros((1, 8, 8, 3), np.uint8), float("inf")).result()
        metrics.count_request("GET", "/", 200, 0.01)
        metrics.count_prediction("colours", 1, {"queue": 1.0})
    metrics.page(None)

processes = []
for images, limit in ((2, 4), (3, 8)):
    processes.append(os.fork())
    if not processes[-1]:
        work(images, limit)
        os._exit(0)
    os.waitpid(processes[-1], 0)
asked = Metrics(shared_folder())
print(asked.page(None).decode())
print("first one dead")
forget(shared_folder(), processes[0])
print(asked.page(None).decode())
"""


def figures(page: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_whoever_is_asked_tells_the_numbers_of_all_processes(tmp_path: Path) -> None:
    environment = os.environ | {FOLDER: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SEVERAL], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    both, later = map(figures, done.stdout.split("first one dead"))
    of_backbone = f'{{backbone="{digest_of(b"a network")[:12]}",precision="float32"}}'
    for found in (both, later):  # what was counted stays counted
        assert found['espalier_http_requests_total{method="GET",route="/",status="200"}'] == 5
        assert found['espalier_http_request_seconds_count{method="GET",route="/"}'] == 5
        assert found['espalier_predictions_total{model="colours"}'] == found["espalier_predicted_images_total"] == 5
        assert found['espalier_prediction_stage_seconds_count{stage="queue"}'] == 5
        assert found[f"espalier_engine_images_total{of_backbone}"] == 5
        assert found[f"espalier_engine_busy_seconds_total{of_backbone}"] > 0
    assert both["espalier_api_processes"] == 3 and later["espalier_api_processes"] == 2
    assert both[f"espalier_shelf_bytes{of_backbone}"] == 2000 and later[f"espalier_shelf_bytes{of_backbone}"] == 1000
    assert both[f"espalier_shelf_models{of_backbone}"] == 3, "the same models are in both"
    assert both[f"espalier_engine_batch_limit{of_backbone}"] == 8


def test_a_backbone_that_was_put_away_is_told_no_more_and_what_it_did_stays_counted() -> None:
    metrics = Metrics()
    batcher = Batcher(FlatEngine(), 4)
    loaded = [LoadedBackbone(digest_of(b"a network"), Precision.FLOAT32, batcher, 1000, 1)]
    metrics.watch(lambda: loaded)
    assert metrics.page(None).count(b"espalier_shelf_bytes{") == 1
    batcher.submit(np.zeros((3, 8, 8, 3), np.uint8), math.inf).result()
    loaded.clear()
    batcher.close()
    page = metrics.page(None).decode()
    assert "espalier_shelf_bytes{" not in page and "espalier_engine_queued_images{" not in page
    of_backbone = f'{{backbone="{digest_of(b"a network")[:12]}",precision="float32"}}'
    assert figures(page)[f"espalier_engine_images_total{of_backbone}"] == 3


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
            metrics.count_prediction(f"model-{number}", 1, {})
    lines = [line for line in metrics.page(None).decode().splitlines() if line.startswith("espalier_predictions_total")]
    assert len(lines) == MODELS + 1
    assert f'espalier_predictions_total{{model="{OTHERS}"}} 100.0' in lines


def test_the_dashboard_asks_for_metrics_that_there_are(client: TestClient, services: Services) -> None:
    serve(client, services.settings, Loads())
    add_model(services, "one", flat_bundle(services.store.put(b"a network")))
    client.post("/api/v1/models/one/predict", content=PNG)
    known = set(re.findall(r"^(espalier_\w+?)(?:\{| )", client.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((ROOT / "deploy" / "dashboards" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) >= 8
    for expression in asked:
        names = re.findall(r"espalier_\w+", expression)
        assert names and set(names) <= known, expression
