"""What can be looked at of a finished run, against the running service: computed when asked for, then there."""

from __future__ import annotations

import io
import time
from typing import Any

import httpx2
import mlflow
import numpy as np
import pytest
import sample
from PIL import Image
from running import Service
from waiting import until

from artifacts.store import Store, digest_of


def shown(service: Service, url: str, **params: str) -> httpx2.Response:
    """Return what is at `url` once it is computed, asking again when it says so."""
    deadline = time.monotonic() + 300
    while (answer := service.http.get(url, params=params)).status_code == 202:
        assert answer.json()["state"] in ("queued", "running") and time.monotonic() < deadline
        assert 0 <= answer.json()["progress"]["fraction"] <= 1
        time.sleep(min(2, int(answer.headers["Retry-After"])))
    return answer


@pytest.mark.slow
def test_a_layer_of_the_network_that_answers_is_drawn_for_an_image(
    service: Service, colours: dict[str, Any], trained: dict[str, Any]
) -> None:
    url = f"/api/v1/runs/{trained['id']}/activations"
    layers = shown(service, url).json()["layers"]
    assert [(layer["name"], layer["height"], layer["channels"]) for layer in layers] == [
        ("block1_conv1", 32, 64),
        ("block1_conv2", 32, 64),
        ("block1_pool", 16, 64),
    ]
    images = service.http.get(f"/api/v1/datasets/{colours['id']}/images").json()["items"]
    answers = [shown(service, url, image=one["image"], layer="block1_pool") for one in (images[0], images[-1])]
    for answer in answers:
        sheet = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert answer.headers["content-type"] == "image/png" and sheet.shape == (8 * 130, 8 * 98)
    assert answers[0].content != answers[1].content
    again = service.http.get(url, params={"image": images[0]["image"], "layer": "block1_pool"})
    assert again.status_code == 200 and again.content == answers[0].content
    refused = service.http.get(url, params={"image": images[0]["image"], "layer": "block9"})
    assert refused.status_code == 422 and "block1_conv1, block1_conv2, block1_pool" in refused.json()["detail"]


@pytest.mark.slow
def test_a_learning_curve_ends_in_the_score_of_its_run_and_mlflow_shows_it(
    service: Service, trained: dict[str, Any]
) -> None:
    url = f"/api/v1/runs/{trained['id']}/learning-curve"
    answer = shown(service, url)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert [point["images"] for point in found["points"]] == [3, 6, 12, 21, 30]
    last, metrics = found["points"][-1], trained["metrics"]
    assert (last["score"], last["ci95"]) == (metrics["accuracy"], metrics["accuracy_ci95"])
    assert found["twice"]["images"] == 60 and found["sentence"]
    picture = service.http.get(found["picture"])
    assert Image.open(io.BytesIO(picture.content)).format == "PNG"
    again = service.http.get(url)
    assert again.status_code == 200 and again.json() == found

    client = mlflow.MlflowClient(service.mlflow_url, registry_uri=service.mlflow_url)

    def is_told(run: dict[str, Any]) -> bool:
        page = run["mlflow_url"].rsplit("/", 1)[-1] if run["mlflow_url"] else None
        return bool(page) and "learning-curve.png" in [file.path for file in client.list_artifacts(page)]

    told = service.until(f"/api/v1/runs/{trained['id']}", is_told)
    assert "learning-curve.png" in [file["name"] for file in told["files"]]


@pytest.mark.slow
def test_a_network_that_has_learned_is_looked_at_too_until_its_images_are_deleted(service: Service) -> None:
    dataset = service.upload("looked-at", sample.zipped(sample.coloured(per_class=8, classes=2, seed=7)))["id"]
    tuning = {"mode": "fine-tuning", "fine_tune": {"epochs": 1, "warmup_epochs": 0}, "augmentation": None}
    run = service.train(dataset, "looked-at", **tuning)
    assert run["state"] == "succeeded", run
    answer = service.http.get(f"/api/v1/runs/{run['id']}/learning-curve")
    assert answer.status_code == 409 and "fine-tuning" in answer.json()["detail"]

    url = f"/api/v1/runs/{run['id']}/activations"
    image = service.http.get(f"/api/v1/datasets/{dataset}/images").json()["items"][0]["image"]
    picture = shown(service, url, image=image, layer="block1_conv2")
    assert picture.status_code == 200, picture.text
    file = Store(service.var / "store").path_for(digest_of(picture.content))
    assert file.read_bytes() == picture.content

    assert service.http.delete(f"/api/v1/datasets/{dataset}").status_code == 204
    until(lambda: not file.exists(), within_s=60)
    gone = service.http.get(url, params={"image": image, "layer": "block1_conv2"})
    assert gone.status_code == 409 and "its images were deleted" in gone.json()["detail"]


@pytest.mark.slow
def test_layers_of_a_network_from_scratch_have_the_names_of_its_recipe(
    service: Service, colours: dict[str, Any]
) -> None:
    layers = [
        {"type": "convolution", "name": "edges", "filters": 6},
        {"type": "pooling"},
        {"type": "global_average"},
    ]
    recipe = {
        "mode": "from-scratch",
        "network": {"kind": "cnn", "layers": layers},
        "image_size": [24, 16],
        "epochs": 2,
        "folds": {"k": 2},
    }
    answer = service.http.post("/api/v1/runs", json={"dataset": colours["id"], "name": "grown", "recipe": recipe})
    assert answer.status_code == 202, answer.text
    run = service.settled(f"/api/v1/runs/{answer.json()['id']}")
    assert run["state"] == "succeeded", run
    url = f"/api/v1/runs/{run['id']}/activations"
    assert shown(service, url).json()["layers"] == [
        {"name": "edges", "height": 22, "width": 14, "channels": 6},
        {"name": "pooling_1", "height": 11, "width": 7, "channels": 6},
    ]
    image = service.http.get(f"/api/v1/datasets/{colours['id']}/images").json()["items"][0]["image"]
    picture = shown(service, url, image=image, layer="edges")
    width, height = Image.open(io.BytesIO(picture.content)).size
    tile, below = width // 3 - 2, 2 + 2 * 16  # pixels between tiles and two lines of text
    assert width % 3 == 0 and tile >= 96 and height == 2 * (round(tile * 22 / 14) + below)
    assert service.http.get(f"/api/v1/runs/{run['id']}/learning-curve").status_code == 409
