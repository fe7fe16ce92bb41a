from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from api.app import create_app
from models.session import Database
from ops.migrate import upgrade
from settings import Settings

KEY = "correct horse battery staple"
POST = {"dataset": "ds_x", "name": "x"}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(var=tmp_path, api_key=KEY, api_host="0.0.0.0")
    database = Database(settings.database)
    upgrade(database)
    database.close()
    with TestClient(create_app(settings), base_url="http://models.example:8000") as client:
        yield client


def test_an_address_other_than_loopback_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="ESPALIER_API_KEY"):
        Settings(var=tmp_path, api_host="0.0.0.0")
    assert Settings(var=tmp_path, api_host="0.0.0.0", api_key=KEY).hosts == ("*",)


def test_without_the_key_nothing_but_probes_and_documentation_answers(guarded: TestClient) -> None:
    for path in ("/api/v1/datasets", "/api/v1/runs", "/api/v1/models", "/api/v1/backbones", "/metrics"):
        answer = guarded.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    for path in ("/healthz", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path
    assert guarded.get("/readyz").json()["checks"]["database"] == {"ok": True, "detail": None}


@pytest.mark.parametrize(("sent", "detail"), [(KEY, "answers"), (KEY[:-1], None)])
def test_details_of_readiness_need_the_key(guarded: TestClient, sent: str, detail: str | None) -> None:
    answer = guarded.get("/readyz", headers={"Authorization": f"Bearer {sent}"})
    assert answer.json()["checks"]["database"] == {"ok": True, "detail": detail}


def test_an_address_that_sends_many_wrong_keys_has_to_wait(guarded: TestClient) -> None:
    right, wrong = {"Authorization": f"Bearer {KEY}"}, {"Authorization": "Bearer a-guess"}
    assert [guarded.get("/api/v1/runs", headers=wrong).status_code for _ in range(12)] == [401] * 10 + [429] * 2
    answer = guarded.get("/api/v1/runs", headers=right)  # not even compared: a guess must not be told apart
    assert answer.status_code == 429 and answer.json()["type"].endswith(":key-throttled")
    assert 1 <= int(answer.headers["retry-after"]) <= 6
    assert guarded.get("/api/v1/runs").status_code == 401
    assert guarded.get("/readyz").status_code == 200


@pytest.mark.parametrize("sent", [KEY[:-1], KEY + "x", "", "Bearer", "schlüssel"])
def test_a_wrong_key_is_refused(guarded: TestClient, sent: str) -> None:
    headers = {"Authorization": f"Bearer {sent}".encode()}
    assert guarded.get("/api/v1/runs", headers=headers).status_code == 401


def test_another_scheme_is_refused(guarded: TestClient) -> None:
    assert guarded.get("/api/v1/runs", headers={"Authorization": f"Basic {KEY}"}).status_code == 401


def test_the_right_key_opens(guarded: TestClient) -> None:
    assert guarded.get("/api/v1/runs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_name_that_only_points_here_is_refused(client: TestClient, host: str) -> None:
    answer = client.get("/api/v1/runs", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["type"].endswith(":forbidden")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9999", "localhost:8000", "[::1]:8000", "[::1]"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/v1/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/api/v1/runs", json=POST, headers=headers)
    assert answer.status_code == 403
    assert client.get("/api/v1/runs", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
)
def test_our_own_pages_and_plain_clients_may_ask(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/api/v1/runs", json=POST, headers=headers).status_code == 404  # no such data set


def test_long_addresses_and_large_headers_are_refused_with_their_limit(client: TestClient) -> None:
    answer = client.get("/api/v1/runs", params={"cursor": "x" * 9000})
    assert (answer.status_code, "8192" in answer.json()["detail"]) == (414, True)
    answer = client.get("/api/v1/runs", headers={"X-Large": "x" * 17_000})
    assert (answer.status_code, "16384" in answer.json()["detail"]) == (431, True)


def test_every_answer_has_a_request_id_and_a_problem_names_it(client: TestClient) -> None:
    one, other = client.get("/healthz"), client.get("/nowhere")
    assert one.headers["x-request-id"] != other.headers["x-request-id"]
    assert other.status_code == 404
    assert other.json()["request_id"] == other.headers["x-request-id"]
    assert other.headers["content-type"] == "application/problem+json"


def test_a_wrong_method_is_a_problem_that_says_what_is_allowed(client: TestClient) -> None:
    answer = client.delete("/api/v1/runs")
    assert answer.status_code == 405
    assert answer.json()["type"].endswith(":method-not-allowed")
    assert "DELETE /api/v1/runs" in answer.json()["detail"]
    assert answer.headers["allow"] == "GET, HEAD, POST"


def test_head_is_answered_like_get_without_a_body(client: TestClient) -> None:
    for path in ("/healthz", "/api/v1/runs", "/nowhere", "/api/v1/runs/none", "/openapi.json"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-length"] == got.headers["content-length"]
        assert head.headers["content-type"] == got.headers["content-type"]


def test_an_unknown_query_parameter_is_refused_with_those_that_there_are(client: TestClient) -> None:
    answer = client.get("/api/v1/runs?stat=failed")
    assert (answer.status_code, answer.json()["field"]) == (422, "stat")
    assert "Expected limit or cursor or state" in answer.json()["detail"]
    assert client.get("/api/v1/runs?limit=3").status_code == client.get("/healthz?x=1").status_code == 200


def test_the_documentation_asks_for_the_key_where_there_is_one(guarded: TestClient, client: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}
    assert document["security"] == [{name: [] for name in document["components"]["securitySchemes"]}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_open = guarded.request("GET", path).status_code != 401
            assert (operation.get("security") == []) == is_open, path
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_the_key_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(var=tmp_path, api_key=KEY)
    with caplog.at_level(logging.DEBUG):
        assert KEY not in repr(settings) and KEY not in settings.model_dump_json()
