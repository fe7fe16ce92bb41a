"""What users send when it goes wrong: each a clear problem, and nothing left behind."""

from __future__ import annotations

import io
import struct
import time
import zipfile
import zlib
from typing import Any

import pytest
import sample
from running import Service
from waiting import until

GOOD = sample.coloured(per_class=6, seed=300_000)


def huge_png() -> bytes:
    """Return a PNG whose header announces 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def climbing() -> bytes:
    buffer = io.BytesIO(sample.zipped(GOOD))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("../../outside.png", sample.png(1))
    return buffer.getvalue()


def stored(service: Service) -> set[str]:
    return {path.name for path in (service.var / "store").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "archive", "kind", "says"),
    [
        ("nested", sample.zipped({"a/b/c/1.png": sample.png(1)}), "dataset-refused", "2 to 1,000 classes"),
        ("climbing", climbing(), "archive-refused", "with '..'"),
        ("cut-off", sample.zipped(GOOD)[:-60], "archive-refused", "cannot be read"),
        ("texts", sample.zipped({f"{c}/{i}.jpg": b"text" for c in "ab" for i in range(40)}), "dataset-refused", "80"),
    ],
)
def test_an_archive_that_makes_no_data_set_is_rejected_and_leaves_nothing(
    service: Service, name: str, archive: bytes, kind: str, says: str
) -> None:
    before = stored(service)
    dataset = service.upload(name, archive)
    assert dataset["state"] == "rejected"
    assert dataset["error"]["type"] == f"urn:espalier:problem:{kind}"
    assert says in dataset["error"]["detail"]
    assert {"title", "status"} <= dataset["error"].keys()
    until(lambda: stored(service) <= before)  # the archive goes once the rejection is written
    run = service.http.post("/api/v1/runs", json={"dataset": dataset["id"], "name": "m"})
    assert (run.status_code, says in run.json()["detail"]) == (409, True)
    assert service.http.delete(f"/api/v1/datasets/{dataset['id']}").status_code == 204


def test_files_that_cannot_be_used_are_refused_one_by_one(service: Service) -> None:
    good = sample.coloured(per_class=8, seed=300_000)
    red = good["red/0.png"]
    files = good | {
        "red/text.jpg": b"I am a text",
        "red/huge.png": huge_png(),
        "red/half.jpg": sample.jpeg(5, side=200)[:-800],
        "blue/same-as-red.png": red,
        "notes.txt": b"not in a class folder",
        "__MACOSX/red/._0.png": b"litter",
        "red/.DS_Store": b"litter",
        "red/copy.png": good["red/1.png"],
    }
    dataset = service.upload("mixed", sample.zipped(files))
    assert dataset["state"] == "ready", dataset["error"]
    reasons = {file["path"]: file["reason"] for file in dataset["refused"]}
    assert reasons.keys() == {
        "red/text.jpg",
        "red/huge.png",
        "red/half.jpg",
        "blue/same-as-red.png",
        "red/0.png",
    }
    assert "Expected an image" in reasons["red/text.jpg"]
    assert "40,000 × 40,000" in reasons["red/huge.png"]
    assert "damaged" in reasons["red/half.jpg"]
    assert "two labels: blue and red" in reasons["red/0.png"]
    assert dataset["refused_total"] == 5 and dataset["ignored"] == 3
    assert (dataset["images"], dataset["duplicates"]) == (len(good), 1)


def test_an_image_that_cannot_be_used_is_refused_at_prediction_by_the_same_rule(
    service: Service, trained: dict[str, Any]
) -> None:
    url = "/api/v1/models/colours/predict"
    for sent, says in [
        (b"I am a text", "Expected an image"),
        (huge_png(), "40,000"),
        (sample.jpeg(5)[:-100], "damaged"),
    ]:
        answer = service.http.post(url, content=sent)
        assert answer.status_code == 422
        assert answer.json()["type"].endswith(":image-refused") and says in answer.json()["detail"]
    good = sample.png(1)
    second = service.http.post(url, files=[("images", ("a", good)), ("images", ("b", b"text"))])
    assert (second.status_code, second.json()["image"]) == (422, 1)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b""}, 422),
        ({"json": {"images": []}}, 422),
        ({"json": {"images": ["not base64!"]}}, 422),
        ({"json": {"image": "x"}}, 422),
        ({"files": [("images", ("a", b"x"))] * 33}, 413),
        ({"files": [("file", ("a", b"x"))]}, 422),
        ({"content": bytes(64 * 1024 * 1024 + 1)}, 413),
    ],
)
def test_a_prediction_request_that_does_not_fit_is_told(
    service: Service, trained: dict[str, Any], sent: dict[str, Any], status: int
) -> None:
    answer = service.http.post("/api/v1/models/colours/predict", **sent)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_version_or_alias_that_does_not_exist_is_told(service: Service, trained: dict[str, Any]) -> None:
    url = "/api/v1/models/colours/predict"
    image = sample.png(1)
    assert service.http.post(url, content=image, params={"version": 99}).status_code == 404
    assert service.http.post(url, content=image, params={"alias": "nobody"}).status_code == 404
    assert service.http.post(url, content=image, params={"alias": "a", "version": 1}).status_code == 422
    assert service.http.put("/api/v1/models/colours/aliases/prod", json={"version": 99}).status_code == 404
    assert service.http.put("/api/v1/models/colours/aliases/Not-OK", json={"version": 1}).status_code == 422


def test_without_network_a_run_says_what_to_do_before_it_computes_anything(
    service: Service, unreachable: dict[str, Any]
) -> None:
    run = unreachable
    assert run["state"] == "failed"
    told = service.events(run["id"])
    assert [event["state"] for kind, event in told if kind == "state"] == ["queued", "running", "failed"]
    assert {event["stage"] for kind, event in told if kind == "progress"} <= {"starting", "weights"}
    assert run["extraction"] is None and run["folds"] == []
    assert run["error"]["type"].endswith(":weights-unavailable")
    for way_out in ("network access", "make weights BACKBONE=vgg16", "ESPALIER_WEIGHTS_URL", "'random'"):
        assert way_out in run["error"]["detail"]


def test_a_running_run_is_cancelled_within_seconds(service: Service, colours: dict[str, Any]) -> None:
    head = {"hidden": [8]}  # a linear one would be quick
    run = service.train(colours["id"], "endless", wait=False, head=head, epochs=10_000, early_stopping=None)
    url = f"/api/v1/runs/{run['id']}"
    service.until(url, lambda found: found["progress"]["epoch"] is not None)
    started = time.monotonic()
    assert service.http.post(f"{url}/cancel").status_code == 202
    ended = service.settled(url)
    assert ended["state"] == "cancelled" and ended["model"] is None
    assert time.monotonic() - started < 10
    assert service.http.post(f"{url}/cancel").json()["state"] == "cancelled"
    assert service.http.get("/api/v1/models/endless").status_code == 404
