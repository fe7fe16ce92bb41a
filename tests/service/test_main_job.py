"""Upload, train, predict: every call of the contract against the running service."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import sample
from PIL import Image
from running import Service
from safetensors.numpy import load as load_tensors

RED = sample.png(77_777, sample.COLOURS["red"])


def test_a_data_set_shows_its_classes_and_its_images(service: Service, colours: dict[str, Any]) -> None:
    assert colours["state"] == "ready" and colours["task"] == "multiclass"
    assert colours["classes"] == [{"name": name, "images": 20} for name in ("blue", "green", "red")]
    assert (colours["images"], colours["version"], colours["refused_total"]) == (60, 1, 0)
    url = f"/api/v1/datasets/{colours['id']}"
    reds: list[dict[str, Any]] = []
    cursor = None
    while True:
        query = {"label": "red", "limit": 7} | ({"cursor": cursor} if cursor else {})
        page = service.http.get(f"{url}/images", params=query).json()
        reds += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len({image["path"] for image in reds}) == 20
    assert {image["label"] for image in reds} == {"red"}
    answer = service.http.get(reds[0]["thumbnail"])
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (40, 40)
    other = service.http.get(reds[0]["thumbnail"].replace(colours["id"], "ds_none"))
    assert other.status_code == 404


def test_a_run_shows_all_that_it_did(service: Service, colours: dict[str, Any], trained: dict[str, Any]) -> None:
    assert trained["dataset"] == colours["id"] and trained["version"] == 1
    assert trained["model"] == {"name": "colours", "version": 1}
    assert trained["progress"]["fraction"] == 1.0 and trained["error"] is None
    assert trained["created_at"] < trained["started_at"] < trained["finished_at"]
    metrics = trained["metrics"]
    low, high = metrics["accuracy_ci95"]
    assert 0.9 < low < metrics["accuracy"] <= high <= 1
    assert sum(map(sum, metrics["confusion"])) == 60
    assert [row["label"] for row in metrics["per_class"]] == ["blue", "green", "red"]
    assert [fold["fold"] for fold in trained["folds"]] == [0, 1]
    assert all(1 <= fold["best_epoch"] <= fold["epochs"] <= 5 for fold in trained["folds"])
    assert trained["extraction"]["computed"] + trained["extraction"]["cached"] == 60
    assert trained["id"] in [run["id"] for run in service.http.get("/api/v1/runs").json()["items"]]


def test_a_runs_files_can_be_read(service: Service, trained: dict[str, Any]) -> None:
    found = {file["name"]: service.http.get(file["url"]) for file in trained["files"]}
    assert found.keys() == {"report.md", "confusion.png", "curves.png", "out-of-fold.safetensors"}
    assert "| fold | Accuracy |" in found["report.md"].text
    assert Image.open(io.BytesIO(found["confusion.png"].content)).format == "PNG"
    assert load_tensors(found["out-of-fold.safetensors"].content)["logits"].shape == (1, 60, 3)


def test_events_tell_the_run_and_can_be_resumed(service: Service, trained: dict[str, Any]) -> None:
    text = service.http.get(f"/api/v1/runs/{trained['id']}/events").text
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    kinds = [event["event"] for event in events]
    assert [int(event["id"]) for event in events] == list(range(1, len(events) + 1))
    assert kinds[0] == kinds[-1] == "state" and kinds.count("fold") == 2
    epochs = [json.loads(event["data"]) for event in events if event["event"] == "epoch"]
    assert len([epoch for epoch in epochs if epoch["fold"] == 0]) == trained["folds"][0]["epochs"]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= epochs[0]["metrics"].keys()
    states = [json.loads(event["data"])["state"] for event in events if event["event"] == "state"]
    assert states == ["queued", "running", "succeeded"]
    middle = events[len(events) // 2]["id"]
    rest = service.http.get(f"/api/v1/runs/{trained['id']}/events", headers={"Last-Event-ID": middle}).text
    assert rest.count("event: ") == len(events) - int(middle)


def test_three_ways_to_send_an_image_give_one_answer(service: Service, trained: dict[str, Any]) -> None:
    url = "/api/v1/models/colours/predict"
    raw = service.http.post(url, content=RED, headers={"Content-Type": "application/x-www-form-urlencoded"})
    form = service.http.post(url, files=[("images", ("a.png", RED)), ("images", ("b.png", RED))])
    text = service.http.post(url, json={"images": [base64.b64encode(RED).decode()]}, params={"version": 1})
    named = service.http.post(url, content=RED, params={"alias": "champion"})
    answers = [answer.json() for answer in (raw, form, text, named)]
    assert [len(answer["predictions"]) for answer in answers] == [1, 2, 1, 1]
    for answer in answers:
        assert (answer["model"], answer["version"]) == ("colours", 1)
        assert answer["timings_ms"].keys() == {"queue", "decode", "backbone", "head"}
        for prediction in answer["predictions"]:
            assert prediction["label"] == "red"
            assert prediction["probabilities"].keys() == {"blue", "green", "red"}
            assert sum(prediction["probabilities"].values()) == pytest.approx(1)
            first = answers[0]["predictions"][0]["probability"]
            assert prediction["probability"] == pytest.approx(first, abs=1e-5)


@pytest.mark.slow
def test_a_later_run_makes_a_version_and_an_alias_chooses_between_them(
    service: Service, colours: dict[str, Any], trained: dict[str, Any]
) -> None:
    again = service.train(colours["id"], "colours", seed=1, head={"hidden": [8]})
    assert again["model"] == {"name": "colours", "version": 2}
    assert again["extraction"]["computed"] == 0, "another head needs no image to go through the backbone again"
    model = service.http.get("/api/v1/models/colours").json()
    assert [version["version"] for version in model["versions"]] == [2, 1]
    assert model["aliases"]["champion"] == 1, "only a first run becomes champion by itself"
    moved = service.http.put("/api/v1/models/colours/aliases/champion", json={"version": 2})
    assert moved.json() == {"model": "colours", "alias": "champion", "version": 2, "serving": "new"}
    assert service.http.post("/api/v1/models/colours/predict", content=RED).json()["version"] == 2
    shown = service.http.get("/api/v1/models/colours/versions/2").json()
    assert shown["aliases"] == ["champion"] and shown["run"] == again["id"]
    assert shown["metrics"] == again["metrics"] and shown["recipe"] == again["recipe"]
    assert shown["backbone"] == service.http.get("/api/v1/models/colours/versions/1").json()["backbone"]
    service.http.put("/api/v1/models/colours/aliases/champion", json={"version": 1})


@pytest.mark.slow
def test_no_image_goes_through_the_backbone_twice(service: Service) -> None:
    files = sample.coloured(per_class=12, seed=50_000)
    dataset = service.upload("counted", sample.tarred(files))
    first = service.train(dataset["id"], "counted", image_size=40)
    assert (first["extraction"]["computed"], first["extraction"]["cached"]) == (36, 0)
    more = sample.zipped({f"red/more{i}.png": sample.png(60_000 + i, sample.COLOURS["red"]) for i in range(10)})
    service.http.post(f"/api/v1/datasets/{dataset['id']}/versions", content=more)
    url = f"/api/v1/datasets/{dataset['id']}"
    grown = service.until(url, lambda found: found["versions"][0]["state"] == "ready")
    assert (grown["version"], grown["images"]) == (2, 46)
    assert [version["images"] for version in grown["versions"]] == [46, 36]
    third = service.train(dataset["id"], "counted", image_size=40)
    assert third["version"] == 2
    assert (third["extraction"]["computed"], third["extraction"]["cached"]) == (10, 36)
    old = service.http.post("/api/v1/runs", json={"dataset": dataset["id"], "version": 1, "name": "counted"})
    assert old.json()["version"] == 1
    service.http.post(f"/api/v1/runs/{old.json()['id']}/cancel")
    service.settled(f"/api/v1/runs/{old.json()['id']}")


@pytest.mark.slow
def test_two_classes_are_binary_and_both_are_answered(service: Service) -> None:
    dataset = service.upload("pair", sample.tarred(sample.coloured(per_class=10, classes=2), "w"))
    assert dataset["task"] == "binary"
    run = service.train(dataset["id"], "pair")
    assert run["recipe"]["task"] == "binary" and 0.5 < run["metrics"]["roc_auc"] <= 1
    blue = sample.jpeg(1, sample.COLOURS["blue"])
    answer = service.http.post("/api/v1/models/pair/predict", content=blue).json()["predictions"][0]
    assert answer["label"] == "blue" and answer["probabilities"].keys() == {"blue", "green"}
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_network_is_fine_tuned_and_answers(service: Service, colours: dict[str, Any]) -> None:
    tuning = {"mode": "fine-tuning", "features_from": "block2", "unfreeze": "block2", "epochs": 1, "precision": "int8"}
    run = service.train(colours["id"], "tuned", fine_tune={"learning_rate": 1e-5, "epochs": 2}, **tuning)
    assert run["state"] == "succeeded", run["error"]
    assert run["recipe"]["unfreeze"] == "block2" and run["recipe"]["augmentation"]["rotate_degrees"] > 0
    assert [phase["name"] for phase in run["folds"][0]["metrics"]["phases"]] == ["head", "network"]
    assert [one["precision"] for one in run["metrics"]["precision"]["tried"]] == ["float32", "int8"]
    sheet = service.http.get(f"/api/v1/runs/{run['id']}/augmentations")
    assert Image.open(io.BytesIO(sheet.content)).size == (8 * 96, 8 * 96 + 32)  # with labels
    answer = service.http.post("/api/v1/models/tuned/predict", content=RED)
    assert answer.status_code == 200 and answer.json()["predictions"][0]["label"] in ("blue", "green", "red")


@pytest.mark.slow
def test_labels_with_groups_and_splits_are_kept_together(service: Service) -> None:
    files = sample.coloured(per_class=12, classes=2, seed=80_000)
    lines = ["path,label,group,split"]
    for number, path in enumerate(files):
        split = "test" if number % 12 >= 10 else "train"
        lines.append(f"{path},{path.split('/')[0]},{split}-{number % 12 // 2},{split}")
    archive = {"labels.csv": "\n".join(lines).encode(), **files}
    dataset = service.upload("grouped", sample.zipped(archive))
    assert dataset["state"] == "ready", dataset["error"]
    run = service.train(dataset["id"], "grouped")
    assert run["metrics"]["test"]["images"] == 4
    folds = load_tensors(service.http.get(f"/api/v1/runs/{run['id']}/files/out-of-fold.safetensors").content)["folds"][
        0
    ]
    images = service.http.get(f"/api/v1/datasets/{dataset['id']}/images", params={"limit": 200}).json()["items"]
    assert len(images) == len(folds) == 24
    fold_of_group: dict[str, set[int]] = {}
    for image, fold in zip(images, folds.tolist(), strict=True):
        assert (fold == -1) == (image["split"] == "test")
        fold_of_group.setdefault(image["group"], set()).add(fold)
    assert all(len(folds) == 1 for folds in fold_of_group.values()), fold_of_group


@pytest.mark.slow
def test_a_deleted_data_set_takes_its_images_along_and_leaves_its_models(service: Service) -> None:
    files = sample.coloured(per_class=8, seed=90_000)
    dataset = service.upload("short-lived", sample.zipped(files))
    service.train(dataset["id"], "short-lived")
    before = stored(service)
    assert service.http.delete(f"/api/v1/datasets/{dataset['id']}").status_code == 204
    assert service.http.get(f"/api/v1/datasets/{dataset['id']}").status_code == 404
    service.until("/readyz", lambda _: len(before - stored(service)) >= len(files) + 1)
    assert len(before - stored(service)) == len(files) + 1, "its images and its manifest, and nothing else"
    assert service.http.post("/api/v1/models/short-lived/predict", content=RED).status_code == 200


def stored(service: Service) -> set[str]:
    return {path.name for path in (service.var / "store").rglob("*") if path.is_file()}
