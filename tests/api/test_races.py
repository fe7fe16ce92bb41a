"""Requests of several clients at the same time, on each database."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import records
import sample
from fastapi.testclient import TestClient
from records import PRINCIPAL
from sqlalchemy import event, select
from waiting import until

from api.dependencies import Services
from api.routes import events
from artifacts.store import digest_of
from models import dataset as datasets
from models import run as runs
from models.file_references import lock_files, try_delete_unreferenced
from models.run import Run
from models.session import Database

ARCHIVES = [sample.zipped(sample.coloured(per_class=1, seed=seed)) for seed in range(6)]


@pytest.fixture
def database_url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def at_once(calls: list[Callable[[], Any]]) -> Counter[int]:
    """Return the number of answers with each status."""
    together = threading.Barrier(len(calls))

    def call(one: Callable[[], Any]) -> int:
        together.wait()
        return int(one().status_code)

    with ThreadPoolExecutor(len(calls)) as pool:
        return Counter(pool.map(call, calls))


def ready(database: Database) -> str:
    with database.writing() as session:
        return records.ready_version(session).dataset_id


def test_of_parallel_uploads_under_one_name_one_is_taken(
    client: TestClient, services: Services, database: Database
) -> None:
    def upload(archive: bytes) -> Any:
        return client.post("/api/v1/datasets?name=x", content=archive)

    assert at_once([lambda archive=archive: upload(archive) for archive in ARCHIVES]) == {202: 1, 409: 5}  # type: ignore[misc]
    with database.reading() as session:
        (kept,) = client.get("/api/v1/datasets").json()["items"]
        (version,) = datasets.get_versions(session, kept["id"])
    assert [digest for digest in map(digest_of, ARCHIVES) if services.store.has(digest)] == [version.archive_sha256]


def test_an_archive_that_is_removed_before_it_is_named_is_asked_for_again(
    client: TestClient, services: Services, database: Database
) -> None:
    """Delete the archive, as another request does that sent the same archive and was refused."""
    archive = digest_of(ARCHIVES[0])
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            session.execute(select(1))  # from here on it writes alone on SQLite
            lock_files(session)
            upload = pool.submit(client.post, "/api/v1/datasets?name=x", content=ARCHIVES[0])
            until(lambda: services.store.has(archive))
            time.sleep(0.3)
            try_delete_unreferenced(session, services.store, [archive])
        answer = upload.result()
    assert (answer.status_code, answer.json()["detail"][-14:]) == (503, "Send it again."), answer.text
    assert client.get("/api/v1/datasets").json()["items"] == []
    assert client.post("/api/v1/datasets?name=x", content=ARCHIVES[0]).status_code == 202


def test_of_parallel_uploads_of_one_archive_the_one_that_is_taken_keeps_it(
    client: TestClient, services: Services, database: Database
) -> None:
    """The other requests are refused and delete their archive, which is the same file."""
    for name in ("x", "y", "z"):
        url = f"/api/v1/datasets?name={name}"
        archive = ARCHIVES[0] + name.encode()
        assert at_once([lambda: client.post(url, content=archive)] * 6) == {202: 1, 409: 5}  # noqa: B023
        assert services.store.has(digest_of(archive))


def test_an_upload_waits_for_one_of_its_name_that_is_just_being_written(client: TestClient, database: Database) -> None:
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            first = records.waiting_version(session, "x").dataset_id
            second = pool.submit(client.post, "/api/v1/datasets?name=x", content=ARCHIVES[0])
            time.sleep(0.5)
        answer = second.result()
    assert answer.status_code == 409, answer.text
    assert answer.json()["type"].endswith(":name-taken") and answer.json()["dataset"] == first


def test_of_parallel_versions_one_is_taken(client: TestClient, database: Database) -> None:
    url = f"/api/v1/datasets/{ready(database)}"

    def add(archive: bytes) -> Any:
        return client.post(f"{url}/versions", content=archive)

    assert at_once([lambda archive=archive: add(archive) for archive in ARCHIVES]) == {202: 1, 409: 5}  # type: ignore[misc]
    assert [version["version"] for version in client.get(url).json()["versions"]] == [2, 1]


def test_of_parallel_deletions_one_is_done(client: TestClient, database: Database) -> None:
    url = f"/api/v1/datasets/{ready(database)}"
    assert at_once([lambda: client.delete(url)] * 6) == {204: 1, 404: 5}


@pytest.mark.parametrize("asked", ["run", "version"])
def test_what_a_data_set_is_asked_for_while_it_is_deleted_waits_and_does_not_find_it(
    client: TestClient, database: Database, asked: str
) -> None:
    dataset = ready(database)

    def ask() -> Any:
        if asked == "version":
            return client.post(f"/api/v1/datasets/{dataset}/versions", content=ARCHIVES[0])
        return client.post("/api/v1/runs", json={"dataset": dataset, "name": "m"})

    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            datasets.delete_dataset(datasets.get_dataset(session, PRINCIPAL, dataset, for_change=True))
            session.flush()
            answer = pool.submit(ask)
            time.sleep(0.5)
        assert answer.result().status_code == 404, answer.result().text
    with database.reading() as session:
        assert records.count(session, Run) == 0
        assert len(datasets.get_versions(session, dataset)) == 1


def test_a_deletion_waits_for_a_run_that_is_just_being_started(client: TestClient, database: Database) -> None:
    dataset = ready(database)
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            found = datasets.get_dataset(session, PRINCIPAL, dataset, for_change=True)
            records.queued_run(session, datasets.ready_version(session, found, None))
            answer = pool.submit(client.delete, f"/api/v1/datasets/{dataset}")
            time.sleep(0.5)
        assert answer.result().status_code == 409, answer.result().text


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)  # SQLite's readers see one moment only
def test_the_end_of_a_run_is_not_missed_when_it_falls_into_a_look(services: Services, database: Database) -> None:
    with database.writing() as session:
        run_id = records.running_run(session, records.ready_version(session)).id

    me, statements = threading.get_ident(), itertools.count(1)

    def end(*_: object) -> None:
        if threading.get_ident() == me and next(statements) == 1:  # the API's own threads look as well
            with database.writing() as session:
                runs.cancel_run(session, run_id)

    # After the first statement of the look, before the second.
    event.listen(services.database.engine, "after_cursor_execute", end)
    found, is_over = events._read_events(services, run_id, after=2)
    assert found or not is_over, "the stream would end without its last event"
    found, _ = events._read_events(services, run_id, after=2)
    assert [one.payload["state"] for one in found] == ["cancelled"]
