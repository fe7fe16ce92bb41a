"""Requests that are sent again with their `Idempotency-Key`, on each database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import records
import sample
from database_marks import ON_POSTGRESQL
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update
from waiting import until

from api.dependencies import Services
from api.key_claims import KeyClaims
from errors import InFlight
from models.base import now
from models.comparison import Comparison
from models.dataset import Dataset, DatasetVersion
from models.idempotency import Answer, Claim, try_claim
from models.run import Run
from models.session import Database

ARCHIVE = sample.zipped(sample.coloured(per_class=2))
OTHER = sample.zipped(sample.coloured(per_class=2, seed=7))
KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}

Send = Callable[..., Any]


@pytest.fixture
def database_url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.fixture
def dataset(services: Services) -> str:
    with services.database.writing() as session:
        return records.dataset_of(session, records.ready_version(session, "ready")).id


@pytest.fixture(params=["runs", "comparisons", "datasets"])
def send(request: pytest.FixtureRequest, client: TestClient, dataset: str) -> Send:
    """Send a request that creates something; with `other` one that creates something else."""

    def make(other: bool = False, **headers: str) -> Any:
        if request.param == "datasets":
            content = OTHER if other else ARCHIVE
            return client.post("/api/v1/datasets?name=new", content=content, headers=headers)
        recipe = {"epochs": 3 if other else 2}
        order: dict[str, Any] = {"dataset": dataset, "name": "m"}
        order |= {"recipe": recipe} if request.param == "runs" else {"recipes": [recipe, {"epochs": 9}]}
        return client.post(f"/api/v1/{request.param}", json=order, headers=headers)

    return make


def count(services: Services) -> dict[str, int]:
    with services.database.reading() as session:
        return {
            record.__tablename__: records.count(session, record)
            for record in (Run, Comparison, Dataset, DatasetVersion, Answer)
        }


def test_a_request_that_is_sent_again_is_answered_again_and_changes_nothing(
    send: Send, services: Services, requested: list[tuple[str, str]]
) -> None:
    first = send(**KEY)
    assert first.status_code == 202, first.text
    before, requests = count(services), len(requested)
    again = send(**KEY)
    assert (again.status_code, again.json(), again.headers["location"]) == (
        202,
        first.json(),
        first.headers["location"],
    )
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    assert count(services) == before and len(requested) == requests


def test_a_key_with_another_request_is_refused(send: Send, services: Services) -> None:
    send(**KEY)
    before, files = count(services), sorted(services.store.digests())
    refused = send(other=True, **KEY)
    assert refused.status_code == 422 and refused.json()["type"].endswith(":key-reused")
    assert count(services) == before and sorted(services.store.digests()) == files


@pytest.fixture
def elsewhere(services: Services) -> Iterator[KeyClaims]:
    """The claims of another process, as far as that is possible; file locks are shared within one."""
    if services.database.is_sqlite:
        yield services.key_claims
        return
    database = Database(services.database.engine.url)
    claims = KeyClaims(database, renew_every_s=0.01)
    claims.start()
    yield claims
    claims.close()
    database.close()


def test_the_same_request_is_refused_while_it_is_being_answered(send: Send, elsewhere: KeyClaims) -> None:
    with elsewhere.hold(records.PRINCIPAL, KEY["Idempotency-Key"]) as claim:
        assert claim is not None
        refused = send(**KEY)
        assert refused.status_code == 409 and refused.json()["type"].endswith(":in-flight")
        assert send(**{"Idempotency-Key": "another"}).status_code == 202
    assert ":in-flight" not in send(other=True, **KEY).text


def expire(services: Services) -> None:
    with services.database.writing() as session:
        session.execute(update(Claim).values(expires_at=now() - timedelta(days=1)))


def is_renewed(services: Services) -> bool:
    with services.database.reading() as session:
        return session.scalar(select(Claim.expires_at).where(Claim.expires_at > now())) is not None


BUSY_CONNECTIONS = """
    SELECT count(*) FROM pg_stat_activity
    LEFT JOIN pg_locks ON pg_locks.pid = pg_stat_activity.pid AND locktype = 'advisory'
    WHERE datname = current_database() AND pg_stat_activity.pid <> pg_backend_pid()
    AND (state <> 'idle' OR locktype IS NOT NULL)
"""


def busy_connections(services: Services) -> int | None:
    """Return how many connections have a transaction or a lock; there is always one for a lock that is held."""
    with services.database.reading() as session:
        return session.scalar(text(BUSY_CONNECTIONS))


@ON_POSTGRESQL
def test_a_key_that_is_held_takes_no_connection_is_renewed_and_is_free_when_its_process_died(
    client: TestClient, services: Services, dataset: str, elsewhere: KeyClaims
) -> None:
    order = {"dataset": dataset, "name": "m"}
    with elsewhere.hold(records.PRINCIPAL, KEY["Idempotency-Key"]):
        until(lambda: not busy_connections(services))
        expire(services)
        until(lambda: is_renewed(services))
        assert client.post("/api/v1/runs", json=order, headers=KEY).status_code == 409
    with services.database.writing() as session:  # of a process that died
        assert try_claim(session, records.PRINCIPAL, KEY["Idempotency-Key"], "0" * 32)
    assert client.post("/api/v1/runs", json=order, headers=KEY).status_code == 409
    expire(services)
    assert client.post("/api/v1/runs", json=order, headers=KEY).status_code == 202


@ON_POSTGRESQL
def test_a_request_whose_key_was_taken_over_changes_nothing(services: Services) -> None:
    frozen = KeyClaims(services.database)  # never renews
    with frozen.hold(records.PRINCIPAL, "k") as claim:
        expire(services)
        with services.key_claims.hold(records.PRINCIPAL, "k") as taken:
            assert claim is not None and taken is not None
            with services.database.writing() as session:
                taken.confirm(session)
            with pytest.raises(InFlight, match="changed nothing"), services.database.writing() as session:
                claim.confirm(session)


def test_a_refused_request_leaves_its_key_free(client: TestClient, dataset: str) -> None:
    order: dict[str, Any] = {"dataset": "ds_unknown", "name": "m"}
    assert client.post("/api/v1/runs", json=order, headers=KEY).status_code == 404
    order["dataset"] = dataset
    assert client.post("/api/v1/runs", json=order, headers=KEY).status_code == 202


@pytest.mark.parametrize(("which", "status"), [("unknown", 404), ("ready", 202)])
def test_a_key_is_free_before_its_answer_leaves(
    client: TestClient, dataset: str, elsewhere: KeyClaims, which: str, status: int
) -> None:
    was_free: list[bool] = []

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        async def pass_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                with elsewhere.hold(records.PRINCIPAL, KEY["Idempotency-Key"]) as claim:
                    was_free.append(claim is not None)
            await send(message)

        await client.app(scope, receive, pass_on)

    order = {"dataset": dataset if which == "ready" else "ds_unknown", "name": "m"}
    answer = TestClient(answering, base_url=str(client.base_url)).post("/api/v1/runs", json=order, headers=KEY)
    assert answer.status_code == status, answer.text
    assert was_free == [True]


def test_a_key_means_nothing_any_more_after_a_week(send: Send, services: Services) -> None:
    first = send(**KEY)
    with services.database.writing() as session:
        session.execute(update(Answer).values(created_at=now() - timedelta(days=7, seconds=1)))
        session.execute(update(Dataset).values(name=Dataset.name + "-old"))
    later = send(other=True, **KEY)
    assert later.status_code == 202 and later.json()["id"] != first.json()["id"]


def test_an_upload_whose_name_is_taken_is_refused_before_it_is_sent_unless_it_may_be_the_same(
    client: TestClient,
) -> None:
    client.post("/api/v1/datasets?name=new", content=ARCHIVE)
    refused = client.post("/api/v1/datasets?name=new", content=ARCHIVE, headers=KEY)
    assert refused.status_code == 409 and refused.json()["type"].endswith(":name-taken")


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
def test_a_key_that_is_none_is_refused(client: TestClient, dataset: str, key: str) -> None:
    order = {"dataset": dataset, "name": "m"}
    refused = client.post("/api/v1/runs", json=order, headers={"Idempotency-Key": key.encode("latin-1")})
    assert refused.status_code == 422 and refused.json()["field"] == "Idempotency-Key"


def test_the_same_version_is_added_once(client: TestClient, services: Services, dataset: str) -> None:
    url = f"/api/v1/datasets/{dataset}/versions"
    first = client.post(url, content=ARCHIVE, headers=KEY)
    assert first.status_code == 202 and first.json()["version"] == 2
    again = client.post(url, content=ARCHIVE, headers=KEY)
    assert again.status_code == 202 and again.json() == first.json()
    other = client.post(url, content=OTHER)
    assert other.status_code == 409, "one version is under way"
    assert count(services)["dataset_version"] == 2
