"""An API of two processes on one port: they agree, one dies, all are told to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest
import sample
from several import add_version, answering, several
from waiting import until

from artifacts.store import Store
from benchmarks.load import Load, load, post
from models.session import Database

PATH = "/api/v1/models/colours/predict"
IMAGE = sample.png(1)
REQUEST = post(PATH, IMAGE)


def until_counted(client: httpx2.Client, predictions: int) -> bool:
    """Wait until the metrics count so many predictions, which they do just after the answers; False if it is more."""

    def counted() -> float:
        page = client.get("/metrics").text
        [line] = re.findall(r'^espalier_http_requests_total\{.*/predict",status="200"\} (.*)$', page, re.MULTILINE)
        return float(line)

    until(lambda: counted() >= predictions)
    return counted() == predictions


def move(clients: Mapping[int, httpx2.Client], version: int) -> int:
    """Move the alias, wait until every process has followed, for good, and return how often they were asked."""
    one = next(iter(clients.values()))
    assert one.put("/api/v1/models/colours/aliases/champion", json={"version": version}).status_code == 200
    asked = 0

    def ask(client: httpx2.Client) -> int:
        nonlocal asked
        answer = client.post(PATH, content=IMAGE)
        assert answer.status_code == 200, answer.text
        asked += 1
        return int(answer.json()["version"])

    for client in clients.values():
        until(lambda client=client: ask(client) == version)
    assert {ask(client) for client in clients.values()} == {version}
    return asked


@pytest.mark.slow
def test_two_processes_follow_an_alias_count_together_and_end_without_a_lost_request(
    tmp_path: Path, migrated_file: Path
) -> None:
    var = tmp_path / "var"
    store = Store(var / "store")
    database = Database(f"sqlite:///{shutil.copy(migrated_file, var / 'espalier.db')}")
    for name in ("one", "other"):
        add_version(database, store, "colours", name)
    database.close()
    with several(tmp_path) as api, ThreadPoolExecutor(1) as pool:
        with api.clients() as clients:
            is_over = threading.Event()
            flood = pool.submit(
                load, api.port, [REQUEST], 6, 300.0, keeps_bodies=True, is_over=lambda _: is_over.is_set()
            )
            asked = 0
            try:
                for version in (2, 1, 2):
                    time.sleep(0.5)
                    asked += move(clients, version)
            finally:
                is_over.set()
            assert clients.keys() == {answering(client) for client in clients.values()}, "the same connections"
            found: Load = flood.result()
            assert found.statuses.keys() == {200} and found.broken == found.refused == 0, found.figures()
            assert {json.loads(body)["version"] for body in found.bodies} == {1, 2}
            sent = found.statuses[200] + asked
            for client in clients.values():
                assert until_counted(client, sent)

        victim, other = clients
        os.kill(victim, signal.SIGKILL)
        assert api.post(PATH, IMAGE).status_code == 200, "the other one goes on"
        until(lambda: victim not in api.processes())
        with api.clients() as clients:
            assert victim not in clients and other in clients
            for client in clients.values():
                assert until_counted(client, sent + 1)
                assert "espalier_api_processes 2.0" in client.get("/metrics").text

        flood = pool.submit(load, api.port, [REQUEST], 6, 120.0, is_over=lambda found: found.refused > 6)
        time.sleep(1.0)
        processes = [psutil.Process(number) for number in api.processes()]
        api.supervisor.terminate()
        found = flood.result()
        assert found.statuses.keys() == {200} and found.broken == 0, found.figures()
        assert found.refused > 0, "it did end"
        assert api.supervisor.wait(60) == 0
        assert not any(process.is_running() for process in processes)
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_supervisor(tmp_path: Path, migrated_file: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches all of them at once; after a SIGKILL nobody is left to tell the others."""
    (tmp_path / "var").mkdir()
    shutil.copy(migrated_file, tmp_path / "var" / "espalier.db")
    with several(tmp_path) as api:
        with api.clients():
            pass
        running = api.supervisor.children(recursive=True)
        assert len(running) >= 2
        if number is signal.SIGINT:
            os.killpg(api.supervisor.pid, number)
        else:
            api.supervisor.send_signal(number)
        api.supervisor.wait(60)
        _, alive = psutil.wait_procs(running, timeout=60)
        assert not alive
