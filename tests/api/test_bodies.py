"""Checks of a request body while it is received. No worker runs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import sample
import structlog
from asgi import ask
from fastapi.testclient import TestClient
from flat_models import CountingLoader, add_model, flat_bundle, serve
from sqlalchemy import Connection, event

from api.bodies import MIB, OTHER_FIELDS, _json_images
from api.dependencies import Services
from api.problems import ERRORS_SHOWN
from artifacts.store import digest_of
from errors import RequestInvalid, TooLarge
from models.job import Queue

ARCHIVE = sample.zipped(sample.coloured(per_class=2))


def stored(services: Services) -> list[str]:
    """Return every file in the store, including incomplete ones."""
    return [path.name for path in services.store.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("way", ["raw", "multipart", "chunked"])
def test_an_archive_is_stored_whole_and_its_ingest_is_owed(
    client: TestClient, services: Services, requested: list[tuple[str, str]], way: str
) -> None:
    match way:
        case "raw":
            answer = client.post("/api/v1/datasets?name=colours", content=ARCHIVE)
        case "multipart":
            fields = {"note": "a field that is not the archive"}
            answer = client.post("/api/v1/datasets?name=colours", files={"archive": ("a.zip", ARCHIVE)}, data=fields)
        case "chunked":
            pieces: Iterator[bytes] = (ARCHIVE[start : start + 100] for start in range(0, len(ARCHIVE), 100))
            answer = client.post("/api/v1/datasets?name=colours", content=pieces)
    assert answer.status_code == 202, answer.text
    created = answer.json()
    assert answer.headers["location"] == f"/api/v1/datasets/{created['id']}"
    assert (created["name"], created["state"]) == ("colours", "uploaded")
    assert stored(services) == [digest_of(ARCHIVE)]
    assert [queue for queue, _ in requested] == [Queue.INGEST]
    assert client.get(answer.headers["location"]).json()["state"] == "uploaded"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "an empty body"),
        (b"hello, I am no archive", "hello"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "PNG"),
        (bytes(1000), "Expected a zip, tar or tar.gz"),
    ],
)
def test_what_is_no_archive_is_refused_at_the_door(
    client: TestClient, services: Services, body: bytes, expected: str
) -> None:
    answer = client.post("/api/v1/datasets?name=x", content=body)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith(":archive-refused")
    assert expected in answer.json()["detail"]
    assert stored(services) == []
    assert client.get("/api/v1/datasets").json()["items"] == []


def test_an_archive_above_the_limit_is_refused_before_and_while_it_comes(
    client: TestClient, services: Services
) -> None:
    large = ARCHIVE + bytes(1_000_001)
    announced = client.post("/api/v1/datasets?name=x", content=large)
    streamed = client.post("/api/v1/datasets?name=x", content=iter([large[:500_000], large[500_000:]]))
    for answer in (announced, streamed):
        assert answer.status_code == 413
        assert "the limit is 1 MiB" in answer.json()["detail"]
    assert stored(services) == []


def test_a_full_disk_is_told_before_anything_is_sent(client: TestClient, services: Services, tmp_path: Path) -> None:
    huge = services.settings.model_copy(update={"free_disk_bytes": 10**18})
    client.app.state.services = Services(**{**vars(services), "settings": huge})  # type: ignore[attr-defined]
    answer = client.post("/api/v1/datasets?name=x", content=ARCHIVE)
    assert answer.status_code == 507
    assert stored(services) == []


@pytest.mark.parametrize("around", ["another-field", "after-the-end"])
def test_a_multipart_body_that_never_ends_is_refused_although_its_archive_is_small(
    client: TestClient, services: Services, around: str
) -> None:
    def body() -> Iterator[bytes]:
        name = b"junk" if around == "another-field" else b"archive"
        yield b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n' % name
        yield b"" if around == "another-field" else ARCHIVE + b"\r\n--b--\r\n"
        yield from [bytes(MIB)] * 8

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/api/v1/datasets?name=x", content=body(), headers=headers)
    assert answer.status_code == 413 and "Send only the field 'archive'" in answer.json()["detail"], answer.text
    assert stored(services) == []


def test_a_disk_that_fills_up_while_an_archive_comes_leaves_nothing(
    client: TestClient, services: Services, fill_disk: Callable[[Path], None]
) -> None:
    pieces = [ARCHIVE, bytes(2**20), bytes(2**20)]

    async def receive() -> Any:
        if len(pieces) == 2:
            fill_disk(services.store.root / "incoming")
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    roomy = services.settings.model_copy(update={"archive_bytes": 10**9})
    client.app.state.services = Services(**{**vars(services), "settings": roomy})  # type: ignore[attr-defined]
    status, problem = ask(client, "POST", "/api/v1/datasets?name=x", receive)
    assert (status, problem["type"]) == (507, "urn:espalier:problem:disk-full"), problem
    assert stored(services) == [] and client.get("/api/v1/datasets").json()["items"] == []
    assert client.post("/api/v1/datasets?name=x", content=ARCHIVE).status_code == 202, "there is room again"


def test_a_database_that_has_no_room_for_an_upload_leaves_nothing(client: TestClient, services: Services) -> None:
    @event.listens_for(services.database.engine, "begin")
    def fill_up(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {'1' if is_full else '1000000'}")

    def upload(number: int) -> int:
        return client.post(f"/api/v1/datasets?name=x{number}", content=ARCHIVE + bytes(number)).status_code

    is_full = True
    taken = list(takewhile(lambda number: upload(number) == 202, range(10_000)))
    refused = client.post("/api/v1/datasets?name=y", content=ARCHIVE + b"y" * 9000)
    assert (refused.status_code, refused.json()["type"]) == (507, "urn:espalier:problem:disk-full"), refused.text
    assert len(stored(services)) == len(taken) == len(client.get("/api/v1/datasets?limit=200").json()["items"])
    is_full = False
    assert upload(len(taken)) == 202


@pytest.mark.parametrize("name", ["", "Upper", "with space", "-dash", "x" * 64, "../x"])
def test_a_name_that_does_not_fit_is_refused(client: TestClient, name: str) -> None:
    answer = client.post("/api/v1/datasets", params={"name": name}, content=ARCHIVE)
    assert answer.status_code == 422
    assert answer.json()["field"] == "name"


def test_a_missing_name_is_told(client: TestClient) -> None:
    answer = client.post("/api/v1/datasets", content=ARCHIVE)
    assert (answer.status_code, answer.json()["field"]) == (422, "name")


def test_a_name_is_taken_until_its_data_set_is_deleted(client: TestClient) -> None:
    first = client.post("/api/v1/datasets?name=x", content=ARCHIVE).json()
    taken = client.post("/api/v1/datasets?name=x", content=ARCHIVE)
    assert taken.status_code == 409
    assert taken.json()["dataset"] == first["id"]
    assert client.delete(f"/api/v1/datasets/{first['id']}").status_code == 204
    assert client.get(f"/api/v1/datasets/{first['id']}").status_code == 404
    assert client.post("/api/v1/datasets?name=x", content=ARCHIVE).status_code == 202


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("multipart/form-data", b"x", "boundary"),
        ("multipart/form-data; boundary=b", b"no multipart at all", "malformed"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nPK\x03\x04\r\n--b--\r\n',
            "curl -F archive=@images.zip",
        ),
    ],
)
def test_a_malformed_multipart_body_is_told(
    client: TestClient, services: Services, content_type: str, body: bytes, expected: str
) -> None:
    answer = client.post("/api/v1/datasets?name=x", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 422
    assert expected in answer.json()["detail"]
    assert stored(services) == []


def test_a_second_archive_in_one_form_is_refused(client: TestClient, services: Services) -> None:
    files = [("archive", ("a.zip", ARCHIVE)), ("archive", ("b.zip", ARCHIVE))]
    answer = client.post("/api/v1/datasets?name=x", files=files)
    assert (answer.status_code, answer.json()["field"]) == (422, "archive")
    assert "Received two" in answer.json()["detail"]
    assert stored(services) == []


@pytest.mark.parametrize("path", ["/api/v1/datasets?name=x", "/api/v1/runs"])
def test_an_upload_that_its_client_gives_up_is_no_fault_of_ours(
    client: TestClient, services: Services, path: str
) -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": ARCHIVE[:500], "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    with structlog.testing.capture_logs() as logs:
        status, _ = ask(client, "POST", path, receive)
    assert status == 499
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("client left", "info")]
    assert stored(services) == []
    assert 'status="500"' not in client.get("/metrics").text


def test_images_cannot_be_added_to_what_is_not_there_or_not_idle(client: TestClient) -> None:
    assert client.post("/api/v1/datasets/ds_none/versions", content=ARCHIVE).status_code == 404
    created = client.post("/api/v1/datasets?name=x", content=ARCHIVE).json()
    answer = client.post(f"/api/v1/datasets/{created['id']}/versions", content=ARCHIVE)
    assert answer.status_code == 409
    assert answer.json()["type"].endswith(":not-ready")


def test_a_prediction_for_an_unknown_model_is_told_whatever_is_sent(client: TestClient) -> None:
    answer = client.post("/api/v1/models/none/predict", content=b"x")
    assert answer.status_code == 404
    assert "'none'" in answer.json()["detail"]


def test_json_images_are_bytes_in_base64() -> None:
    assert _json_images(b'{"images": ["' + base64.b64encode(b"abc") + b'"]}', 1) == [b"abc"]
    assert _json_images(b'{"images": ["YW\\r\\n Jj"]}', 1) == [b"abc"]  # with line breaks, as `base64` writes them


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"images": [' + b"1," * 300_000 + b"1]}", "images[0]: Expected the bytes of an image file as base64"),
        (b'{"images": [' + b'"",' * 300_000 + b'""]}', "more than 32 images"),
        (
            b'{"images": ["YQ=="]' + b"".join(b',"%d": 1' % number for number in range(99_000)) + b"}",
            "0: Expected only",
        ),
        (b'{"images": [' + b'"data:image/png;base64,YQ==",' * 40 + b'""]}', "follows the comma of a data URL"),
        # Without its signs, the head of this URL is twenty letters, which are base64 themselves.
        (b'{"images": ["data:image/jpeg;base64,YQ=="]}', "follows the comma of a data URL"),
        (b'{"images": ["!!!!"]}', "images[0]: Expected the bytes of an image file as base64 text. Received '!!!!'"),
        (b'{"images": [' + b"," * 300_000, "body: Expected JSON"),
        (b'{"file": "YQ=="}', "images: Expected a list of base64 texts. Received a field 'file'."),
        (b'{"images": "YQ=="}', "Send a list for a single image too"),
    ],
    ids=[
        "numbers",
        "empty",
        "unknown-fields",
        "data-urls",
        "jpeg-url",
        "no-base64",
        "no-json",
        "another-field",
        "no-list",
    ],
)
def test_images_in_json_are_read_up_to_their_first_error_or_their_limit(body: bytes, said: str) -> None:
    with pytest.raises((RequestInvalid, TooLarge)) as raised:
        _json_images(body, 32)
    assert said in raised.value.detail and len(raised.value.detail) < 300


def test_a_json_body_of_very_many_values_is_not_read_and_few_errors_are_listed(client: TestClient) -> None:
    many = client.post("/api/v1/networks/preview", content=b'{"network": {"layers": [' + b"1," * 40_000 + b"1]}}")
    assert (many.status_code, many.json()["type"]) == (413, "urn:espalier:problem:too-large")
    unknown = client.post("/api/v1/runs", json={f"field{number}": 1 for number in range(1000)})
    assert unknown.status_code == 422 and len(unknown.json()["errors"]) == ERRORS_SHOWN
    assert "'errors' lists the first 19 of 1001 more." in unknown.json()["detail"]
    layers = client.post("/api/v1/networks/preview", json={"network": {"layers": [1] * 10_000}})
    assert layers.status_code == 422 and layers.json()["field"] == "network.layers[0]"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"dataset": "\udce9", "name": "m"}',
        rb'{"dataset": "d", "name": "m", "\ud800": 1}',
        rb'{"dataset": "d", "name": "m", "recipe": {"weights": "\ud800"}}',
        rb'{"dataset": "d", "name": "m", "recipe": {"\ud800": "\ud800"}}',
    ],
)
def test_half_a_surrogate_pair_is_refused_like_any_other_value(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/v1/runs", content=body)
    assert answer.status_code == 422 and answer.json()["request_id"], answer.text


def test_json_of_any_depth_is_refused_like_any_other_value(client: TestClient) -> None:
    for depth in range(900, 1010, 2):
        value = "[" * depth + "]" * depth
        answer = client.post("/api/v1/runs", content=f'{{"dataset": "d", "name": "m", "recipe": {{"x": {value}}}}}')
        assert answer.status_code == 422 and answer.json()["request_id"], (depth, answer.text)


@pytest.mark.parametrize(
    ("name", "count", "status", "said"),
    [
        ("images", 33, 413, "more than 32 images"),
        ("other", OTHER_FIELDS + 1, 422, f"at most {OTHER_FIELDS} others"),
        ("file", 1, 422, "curl -F images=@photo.jpg"),
        ("images", 1, 422, "Received a data URL"),
    ],
)
def test_a_multipart_body_is_read_up_to_its_limit_of_fields(
    client: TestClient, services: Services, name: str, count: int, status: int, said: str
) -> None:
    add_model(services, "one", flat_bundle(services.store.put(b"one")))
    serve(client, services.settings, CountingLoader())
    answer = client.post("/api/v1/models/one/predict", files=[(name, ("a", b"data:,"))] * count)
    assert answer.status_code == status and said in answer.json()["detail"], answer.text
    listed = client.post("/api/v1/models/one/predict", content=b' ["YQ=="]')
    assert listed.status_code == 422 and listed.json()["field"] == "body", listed.text
