"""The prediction route with a fake engine: request bodies, waiting, deadlines, overload and explanations."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import sample
from asgi import ask
from fastapi.testclient import TestClient
from flat_models import PNG, SIZE, CountingLoader, add_model, flat_bundle, serve
from PIL import Image
from waiting import until

from api.deadline import Deadline
from api.dependencies import Services
from api.prediction_queue import Admission, PredictionQueue
from artifacts import images
from artifacts.bundle import Dense
from artifacts.decode_memory import DecodeMemory, Reserve, reserve_nothing
from artifacts.features import Features
from artifacts.images import ImageLimits, Pixels
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.neighbours import FeatureNormaliser, build_index
from artifacts.store import Digest
from errors import DeadlineExceeded, ImageRefused, Overloaded
from inference import heads
from inference.engine import Engine, FlatEngine
from inference.predictor import Predictor
from inference.shelf import Shelf
from recipes.layers import Activation
from recipes.recipe import Precision, Resize, Task
from settings import Settings

WARM, COLD = "/api/v1/models/warm/predict", "/api/v1/models/cold/predict"
HURRY = {"predict_deadline_s": 0.5}


@pytest.fixture
def loads(client: TestClient, services: Services, settings: Settings) -> Iterator[CountingLoader]:
    """Two models on two backbones. Loading the backbone of `cold` waits until the test lets it continue."""
    found = CountingLoader()
    for name in ("warm", "cold"):
        backbone = services.store.put(name.encode())
        add_model(services, name, flat_bundle(backbone))
        if name == "cold":
            found.held.add(backbone)
    serve(client, settings, found)
    yield found
    found.gate.set()


def test_a_model_of_bad_versions_answers_only_if_one_is_named_or_made_champion(
    client: TestClient, services: Services, loads: CountingLoader
) -> None:
    add_model(services, "noise", flat_bundle(services.store.put(b"noise")), can_be_champion=False)
    url = "/api/v1/models/noise"
    refused = client.post(f"{url}/predict", content=PNG)
    assert (refused.status_code, refused.json()["version"]) == (409, 1)
    assert refused.json()["type"].endswith("no-champion") and f"PUT {url}/aliases/champion" in refused.json()["detail"]
    assert client.post(f"{url}/predict?version=1", content=PNG).status_code == 200
    assert client.put(f"{url}/aliases/champion", json={"version": 1}).status_code == 200
    assert client.post(f"{url}/predict", content=PNG).json()["version"] == 1


# --- what is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "labels", "outputs", "fields"),
    [
        (Task.BINARY, ("dark", "light"), 1, {"label", "probability", "probabilities"}),
        (Task.MULTICLASS, ("dark", "light"), 2, {"label", "probability", "probabilities"}),
        (Task.MULTILABEL, ("dark", "light", "wet"), 3, {"labels", "probabilities"}),
        (Task.REGRESSION, (), 1, {"value"}),
    ],
)
def test_an_answer_has_the_form_of_its_task(
    client: TestClient,
    services: Services,
    settings: Settings,
    task: Task,
    labels: tuple[str, ...],
    outputs: int,
    fields: set[str],
) -> None:
    bundle = flat_bundle(services.store.put(b"flat"), task, labels, outputs)
    add_model(services, "one", bundle)
    serve(client, settings, CountingLoader())
    answer = client.post("/api/v1/models/one/predict", content=PNG).json()["predictions"][0]
    assert answer.keys() == fields
    if "probabilities" in fields:
        assert list(answer["probabilities"]) == list(labels)
    pixels = images.decode(PNG, 8, Resize.SQUASH, settings.image_limits)
    logit = float(heads.logits(bundle.layers, FlatEngine().features(pixels[None]))[0, 0])
    assert logit > 0
    if task is Task.REGRESSION:
        assert answer["value"] == pytest.approx(logit)
    if task is Task.MULTILABEL:
        assert answer["labels"] == list(labels)


# --- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "application/json", "image/png", "text/plain", None]
)
@pytest.mark.parametrize("body", [PNG, b' \n{"images": ["' + base64.b64encode(PNG) + b'"]}'], ids=["image", "json"])
def test_a_raw_body_is_what_it_shows_whatever_it_is_called(
    client: TestClient, loads: CountingLoader, body: bytes, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = client.post(WARM, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["predictions"]) == 1
    assert answer.json()["timings_ms"].keys() == {"queue", "decode", "backbone", "head"}


def test_an_empty_part_keeps_its_place_and_is_refused_by_it(client: TestClient, loads: CountingLoader) -> None:
    files = [("images", ("a", PNG)), ("images", ("b", b"")), ("images", ("c", PNG))]
    answer = client.post(WARM, files=files)
    assert (answer.status_code, answer.json()["image"]) == (422, 1)
    assert answer.json()["type"].endswith(":image-refused") and "is an empty file" in answer.json()["detail"]
    empty = client.post(WARM, json={"images": [base64.b64encode(PNG).decode(), ""]})
    assert (empty.status_code, empty.json()["image"]) == (422, 1)


def test_a_file_above_its_limit_is_too_large_in_each_way(client: TestClient, loads: CountingLoader) -> None:
    large = PNG + bytes(50_000)
    for sent in (
        {"content": large},
        {"files": [("images", ("a", PNG)), ("images", ("b", large))]},
        {"json": {"images": [base64.b64encode(large).decode()]}},
    ):
        answer = client.post(WARM, **sent)  # type: ignore[arg-type]
        assert answer.status_code == 413, answer.text
        assert answer.json()["type"].endswith(":too-large")
    assert "has 0.1 MiB; the limit for a file is 0.0476837 MiB" in answer.json()["detail"]


@pytest.mark.parametrize("way", ["announced", "streamed"])
def test_a_body_above_its_limit_is_too_large_and_the_answer_says_how_large(
    client: TestClient, loads: CountingLoader, way: str
) -> None:
    large = bytes(200_001)
    answer = client.post(WARM, content=large if way == "announced" else iter([large]))
    assert answer.status_code == 413
    said = "200001 bytes" if way == "announced" else "more than 200000 bytes"
    assert f"The body has {said}; the limit is" in answer.json()["detail"]


def test_what_is_wrong_with_json_is_told_with_what_was_received(client: TestClient, loads: CountingLoader) -> None:
    for body, field, received in [
        (b'{"images": ["not base64!"]}', "images[0]", "not base64!"),
        (b'{"images": []}', "images", "[]"),
        (b'{"image": "x"}', "images", "nothing"),
        (b"{oops", "body", "something else"),
    ]:
        answer = client.post(WARM, content=body).json()
        assert answer["field"] == field
        assert answer["detail"].startswith(f"{field}: ") and received in answer["detail"].split("Received")[1]


# --- what waits ----------------------------------------------------------------------------------------------------


def test_a_model_that_takes_too_long_to_load_is_told_in_time_and_loaded_once(
    client: TestClient, loads: CountingLoader, settings: Settings
) -> None:
    serve(client, settings.model_copy(update=HURRY), loads)
    for _ in range(3):
        started = time.monotonic()
        answer = client.post(COLD, content=PNG)
        assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) == (504, "deadline-exceeded")
        assert answer.json()["stage"] == "load" and "went into loading the model" in answer.json()["detail"]
        assert time.monotonic() - started > 0.4
    loads.gate.set()
    until(lambda: client.post(COLD, content=PNG).status_code == 200)
    assert len(loads.seen) == 1


def test_while_many_wait_for_a_model_all_else_is_answered(client: TestClient, loads: CountingLoader) -> None:
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(client.post, COLD, content=PNG) for _ in range(60)]
        until(lambda: loads.seen)
        assert client.post(WARM, content=PNG).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.get("/api/v1/models").status_code == 200
        assert not any(one.done() for one in waiting)
        loads.gate.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_a_model_that_cannot_be_loaded_is_told_and_tried_again(
    client: TestClient, loads: CountingLoader, services: Services
) -> None:
    backbone = services.store.path_for(next(iter(loads.held)))  # type: ignore[arg-type]
    kept = backbone.read_bytes()
    backbone.write_bytes(b"something else")
    answer = client.post(COLD, content=PNG)
    assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) == (500, "corrupt")
    backbone.write_bytes(kept)
    loads.gate.set()
    assert client.post(COLD, content=PNG).status_code == 200


def test_a_body_that_stands_still_is_given_up(client: TestClient, loads: CountingLoader, settings: Settings) -> None:
    serve(client, settings.model_copy(update=HURRY), loads)

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append(b"half")
            return {"type": "http.request", "body": b"half", "more_body": True}
        return await asyncio.Event().wait()  # type: ignore[return-value]

    sent: list[bytes] = []
    status, problem = ask(client, "POST", WARM, receive)
    assert (status, problem["type"].rsplit(":")[-1]) == (504, "deadline-exceeded")
    assert problem["stage"] == "body" and "went into receiving the request" in problem["detail"]


class HeldDecoder(Predictor):
    """A predictor whose decoders hang until its gate opens."""

    def __init__(self) -> None:
        self.gate = Event()

    def wait_s(self, images: int) -> float:
        return 0.0

    def decode(
        self,
        position: int,
        file: bytes,
        limits: ImageLimits,
        until: float,
        scale: int = 1,
        reserve: Reserve = reserve_nothing,
    ) -> Pixels:
        with reserve(600):
            assert self.gate.wait(120)
        raise ImageRefused("decoded too late for anyone")


class HeldShelf(Shelf):
    """A shelf with one predictor."""

    def __init__(self, held: HeldDecoder) -> None:
        self.held = held

    def find(self, bundle: Digest) -> Predictor:
        return self.held


@pytest.mark.parametrize(("limit_bytes", "decoding"), [(1200, 2), (1199, 1)])
def test_the_deadline_covers_decoders_and_its_problem_names_the_stage_that_took_the_time(
    settings: Settings, limit_bytes: int, decoding: int
) -> None:
    held = HeldDecoder()
    queue = PredictionQueue(settings.model_copy(update={"threads": 1}), HeldShelf(held), DecodeMemory(limit_bytes))

    async def predict_all() -> list[Any]:
        hanging = [queue.predict(Digest("0" * 64), [PNG], Deadline(0.3)) for _ in range(8)]
        return await asyncio.gather(*hanging, return_exceptions=True)

    failures = asyncio.run(predict_all())
    held.gate.set()
    queue.close()
    assert {type(one) for one in failures} == {DeadlineExceeded}
    assert sorted(one.extra["stage"] for one in failures) == ["decode"] * decoding + ["decoder"] * (8 - decoding)
    assert "went into waiting for a decoder" in failures[-1].detail


# --- what is turned away -------------------------------------------------------------------------------------------


def test_admission_counts_images_and_bytes_and_lets_an_idle_service_take_any() -> None:
    admission = Admission(limit_images=4, limit_bytes=100)
    with admission.admit(1000) as take:
        take(30)
        with pytest.raises(Overloaded, match="1 more; the limit is 4"), admission.admit(1):
            pass
    with admission.admit(50) as take:
        with pytest.raises(Overloaded, match="51 more; the limit is 100"), admission.admit(51):
            pass
        with admission.admit(50):
            take(2)
            with pytest.raises(Overloaded, match="4 images are waiting, and this request has 1 more"):
                take(1)
        with (
            admission.admit(50) as take_more,
            pytest.raises(Overloaded, match="4 images are waiting, and this request has 2 more"),
        ):
            take_more(2)
    with admission.admit(100), pytest.raises(RuntimeError), admission.admit(0):
        raise RuntimeError("what fails gives its places back")
    with admission.admit(0) as take:
        take(3)


def test_a_request_is_turned_away_before_its_body_is_read(client: TestClient, loads: CountingLoader) -> None:
    read = False

    async def receive() -> dict[str, Any]:
        nonlocal read
        read = True
        return {"type": "http.request", "body": PNG, "more_body": False}

    with client.app.state.services.prediction_queue.admission.admit(10**9):  # type: ignore[attr-defined]
        status, problem = ask(client, "POST", WARM, receive)
        assert (status, problem["type"].rsplit(":")[-1], read) == (503, "overloaded", False)
    assert ask(client, "POST", WARM, receive)[0] == 200


# --- what overloads, and who leaves ----------------------------------------------------------------------------------


class Slow(FlatEngine):
    """An engine that takes a fixed time for each image, and waits while its gate is closed."""

    seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.gate = Event()
        self.gate.set()

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        time.sleep(self.seconds * len(images))
        assert self.gate.wait(120)
        return super().run(images, wants_maps=wants_maps)


@pytest.fixture
def slow(client: TestClient, services: Services, settings: Settings, request: pytest.FixtureRequest) -> Iterator[Slow]:
    """Serves a model `slow` with the given settings. Its engine was measured at 0.1 s per image."""
    engine = Slow()
    engine.seconds = 0.1

    class One(CountingLoader):
        def __call__(self, path: Path, precision: Precision, threads: int) -> Engine:
            return engine

    add_model(services, "slow", flat_bundle(services.store.put(b"slow")))
    serve(client, settings.model_copy(update=getattr(request, "param", {})), One())
    until(lambda: client.post("/api/v1/models/slow/predict", content=PNG).status_code == 200)
    engine.seconds = 0.0
    yield engine
    engine.gate.set()


@pytest.mark.parametrize("slow", [HURRY], indirect=True, ids=["hurry"])
def test_what_could_not_be_answered_in_time_is_turned_away_and_told_when_to_come_back(
    client: TestClient, slow: Slow
) -> None:
    [loaded] = client.app.state.services.shelf.loaded()  # type: ignore[attr-defined]
    slow.seconds = 1.0
    loaded.batcher.submit(np.zeros((1, 8, 8, 3), np.uint8), 1e9).result(120)  # measured
    until(lambda: loaded.batcher.wait_s() == 0.0)
    assert loaded.batcher.wait_s(1) > 0.25
    slow.seconds = 0.0
    slow.gate.clear()
    blocked = loaded.batcher.submit(np.zeros((3, 8, 8, 3), np.uint8), 1e9)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.post("/api/v1/models/slow/predict", content=PNG), range(12)))
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.json()["type"].endswith(":overloaded") and answer.json()["retry_after_s"] > 0
        assert int(answer.headers["Retry-After"]) >= answer.json()["retry_after_s"]
    assert not blocked.done()
    slow.gate.set()
    until(lambda: client.post("/api/v1/models/slow/predict", content=PNG).status_code == 200)


def test_the_answer_says_in_a_header_where_its_time_went(client: TestClient, loads: CountingLoader) -> None:
    answer = client.post(WARM, content=PNG)
    said = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
    assert {stage: float(spent) for stage, spent in said.items()} == answer.json()["timings_ms"]


def test_a_client_that_left_costs_the_engine_nothing(client: TestClient, slow: Slow) -> None:
    [loaded] = client.app.state.services.shelf.loaded()  # type: ignore[attr-defined]
    slow.gate.clear()
    busy = [loaded.batcher.submit(np.zeros((1, 8, 8, 3), np.uint8), 1e9) for _ in range(2)]
    seen = slow.images_seen
    messages = [{"type": "http.request", "body": PNG, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    assert ask(client, "POST", "/api/v1/models/slow/predict", receive) == (499, None)
    slow.gate.set()
    for one in busy:
        one.result(120)
    assert client.post("/api/v1/models/slow/predict", content=PNG).status_code == 200
    assert slow.images_seen - seen == 3, "the two that were there, and the last"


# --- why -------------------------------------------------------------------------------------------------------------


class Places(FlatEngine):
    """An engine whose maps are the image itself, so that each feature is the mean of one colour."""

    def run(self, images: Pixels, *, wants_maps: bool) -> tuple[Features, Features | None]:
        maps = images.astype(np.float32) / 255
        return maps.mean(axis=(1, 2)), maps if wants_maps else None


NFD_BLUE = unicodedata.normalize("NFD", "bleuté")  # bundles from before have such labels
RED_LEFT = np.zeros((8, 8, 3), np.uint8)
RED_LEFT[:, :4, 0], RED_LEFT[:, 4:, 2] = 255, 255


@pytest.fixture
def colours(client: TestClient, services: Services, settings: Settings) -> bytes:
    """Serve a model of two colours with maps of 8×8 positions; return an image, red left and blue right."""

    class One(CountingLoader):
        def __call__(self, path: Path, precision: Precision, threads: int) -> Engine:
            return Places()

    kernel = np.array([[3, 0], [0, 0], [0, 2]], np.float32)
    layers = (Dense(kernel, np.zeros(2, np.float32), Activation.LINEAR),)
    golden = np.zeros((1, 8, 8, 3), np.uint8)
    flat = flat_bundle(services.store.put(b"places"), labels=("red", NFD_BLUE))
    add_model(
        services,
        "colours",
        replace(flat, layers=layers, golden_input=golden, golden_output=np.zeros((1, 2), np.float32)),
    )
    serve(client, settings, One())
    file = io.BytesIO()
    Image.fromarray(RED_LEFT).save(file, "PNG")
    return file.getvalue()


def test_a_heat_map_is_drawn_on_the_image_and_not_on_the_small_input_of_the_network(
    client: TestClient, colours: bytes
) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::4, 0] = stripes[:, 1::4, 0] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    png = client.post(
        "/api/v1/models/colours/predict?explain=heatmap", content=file.getvalue(), headers={"Accept": "image/png"}
    )
    picture = np.asarray(Image.open(io.BytesIO(png.content))).astype(int)[:256]
    assert picture.shape[1] == 256 and (np.abs(picture[:, 2:, 0] - picture[:, :-2, 0]) > 30).all()


def test_a_heat_map_shows_which_places_speak_for_the_answer_or_for_a_label(client: TestClient, colours: bytes) -> None:
    url = "/api/v1/models/colours/predict"
    answer = client.post(f"{url}?explain=heatmap", content=colours).json()
    [explained] = answer["explanations"]
    assert explained["label"] == answer["predictions"][0]["label"] == "red"
    for label, left_is_brighter in (("red", True), ("bleuté", False), (NFD_BLUE, False)):
        png = client.post(f"{url}?explain=heatmap&label={label}", content=colours, headers={"Accept": "image/png"})
        assert png.headers["content-type"] == "image/png" and "backbone;dur=" in png.headers["server-timing"]
        picture = np.asarray(Image.open(io.BytesIO(png.content)), dtype=float)[:, :, 1]
        assert (picture[:, :100].mean() > picture[:, -100:].mean()) == left_is_brighter


def test_the_channels_of_each_image_are_shown_as_a_sheet(client: TestClient, colours: bytes) -> None:
    files = [("images", ("a", colours)), ("images", ("b", PNG))]
    answer = client.post("/api/v1/models/colours/predict?explain=activations", files=files).json()
    sheets = [Image.open(io.BytesIO(base64.b64decode(one["png"]))) for one in answer["explanations"]]
    assert len(sheets) == 2 and all(sheet.size == (196, 260) for sheet in sheets)


def test_what_cannot_be_explained_is_told(client: TestClient, colours: bytes, services: Services) -> None:
    url = "/api/v1/models/colours/predict"
    for query, detail in [
        ("explain=heatmap&label=green", f"This model has no label 'green'. Its labels are: red, {NFD_BLUE}."),
        ("label=red", "together with explain=heatmap"),
        ("explain=neighbours", "train a model with `neighbours: true`"),
        ("explain=why", "Received 'why'"),
    ]:
        answer = client.post(f"{url}?{query}", content=colours)
        assert answer.status_code == 422 and detail in answer.json()["detail"], answer.text
    assert "explanations" not in client.post(url, content=colours).json()


def test_the_training_images_that_look_most_alike_are_shown_and_named(
    client: TestClient, services: Services, settings: Settings, loads: CountingLoader
) -> None:
    colours = {"red": (200, 50, 40), "green": (40, 200, 50), "blue": (50, 40, 200), "white": (250, 250, 250)}
    shown = [sample.png(seed, colour, SIZE) for seed, colour in enumerate(colours.values())]
    rows = [
        Row(f"{name}.png", services.store.put(file), (name,), None, None, Split.TRAIN)
        for name, file in zip(colours, shown, strict=True)
    ]
    pixels = np.stack([images.decode(file, SIZE, Resize.SQUASH, ImageLimits()) for file in shown])
    features = FlatEngine().features(pixels)
    directions = FeatureNormaliser(features.mean(axis=0), np.ones(48, np.float32))
    kept = services.store.put(build_index(rows, features, directions).dump())
    bundle = replace(flat_bundle(services.store.put(b"a flat network")), neighbours=kept)
    add_model(services, "colours", bundle)
    serve(client, settings, loads)
    services.store.delete(rows[0].sha256)

    url = "/api/v1/models/colours/predict?explain=neighbours"
    answer = client.post(url, content=shown[2])
    [explained] = answer.json()["explanations"]
    assert explained["neighbours"][0] == {
        "image": rows[2].sha256,
        "path": "blue.png",
        "labels": ["blue"],
        "similarity": pytest.approx(1, abs=1e-2),
    }
    assert len(explained["neighbours"]) == 3
    picture = client.post(url, content=shown[2], headers={"Accept": "image/png"})
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (4 * 196, 192)


def test_a_map_of_one_place_is_not_explained(client: TestClient, loads: CountingLoader) -> None:
    answer = client.post(f"{WARM}?explain=heatmap", content=PNG)
    assert answer.status_code == 422 and "only 1×1 positions" in answer.json()["detail"]
