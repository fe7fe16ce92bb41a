"""An API whose files are stored in a bucket, which may be unavailable."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample
from buckets import KEYS, Bucket, NetworkProxy
from fastapi.testclient import TestClient

from api.app import create_app
from api.dependencies import Services
from artifacts.store import digest_of
from errors import StoreRefused
from settings import Settings

ARCHIVE = sample.zipped(sample.coloured(per_class=2))


@pytest.fixture
def settings(settings: Settings, bucket: Bucket, line: NetworkProxy) -> Settings:
    shared = {"store_url": bucket.address.url, "store_endpoint": line.endpoint, "store_region": bucket.address.region}
    return settings.model_copy(update=shared)


def local(services: Services) -> list[str]:
    """Return every file in the local folder, including incomplete ones."""
    return [path.name for path in services.store.root.rglob("*") if path.is_file()]


def test_an_upload_lies_in_the_bucket_before_it_is_answered(
    client: TestClient, services: Services, bucket: Bucket
) -> None:
    assert client.post("/api/v1/datasets?name=x", content=ARCHIVE).status_code == 202
    assert bucket.digests() == {digest_of(ARCHIVE)} == set(local(services))


def test_an_upload_that_is_refused_leaves_nothing_in_the_bucket(
    client: TestClient, services: Services, bucket: Bucket
) -> None:
    client.post("/api/v1/datasets?name=x", content=ARCHIVE)
    other = ARCHIVE + bytes(9)
    assert client.post("/api/v1/datasets?name=x", content=other).status_code == 409
    assert client.post("/api/v1/datasets?name=y", content=b"no archive").status_code == 422
    assert bucket.digests() == {digest_of(ARCHIVE)} == set(local(services))


def test_while_the_bucket_is_away_uploads_are_told_to_come_back_and_nothing_is_left(
    client: TestClient, services: Services, bucket: Bucket, line: NetworkProxy
) -> None:
    line.cut()
    answer = client.post("/api/v1/datasets?name=x", content=ARCHIVE)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:espalier:problem:store-unavailable"), answer.text
    assert answer.headers["retry-after"] and bucket.name in answer.json()["detail"]
    assert local(services) == [] and client.get("/api/v1/datasets").json()["items"] == []
    line.mend()
    assert bucket.digests() == set()
    assert client.post("/api/v1/datasets?name=x", content=ARCHIVE).status_code == 202


def test_readiness_tells_of_a_bucket_that_is_away_and_does_not_depend_on_it(
    client: TestClient, line: NetworkProxy
) -> None:
    assert client.get("/readyz").json()["checks"]["store"]["ok"]
    line.cut()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert not answer.json()["checks"]["store"]["ok"]
    assert "is unavailable" in answer.json()["checks"]["store"]["detail"]
    line.mend()
    assert client.get("/readyz").json()["checks"]["store"]["ok"]


def test_an_api_that_the_bucket_refuses_does_not_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreRefused, match="nobody-made-this"):
        create_app(settings.model_copy(update={"store_url": "s3://nobody-made-this"}))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreRefused, match="AWS_SECRET_ACCESS_KEY") as told:
        create_app(settings.model_copy())
    assert not [value for value in KEYS.values() if value in str(told.value)]


def test_files_that_are_nowhere_else_are_not_taken_for_copies(settings: Settings) -> None:
    """Copies in a cache are deleted, but files stored before a bucket was configured must stay."""
    folder = settings.model_copy(update={"store_url": None}).store.folder
    assert settings.store.folder != folder
    assert Path(settings.store.folder).parent == Path(folder).parent == settings.var.absolute()
