"""Celery as workers use it, with a real Valkey: tasks, what Celery's own tools show, and a broker that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import records
import redis
import structlog
from celery import Celery
from celery.contrib.testing.worker import start_worker
from running import ROOT
from sqlalchemy import select
from waiting import until, until_no
from working import settled

from broker import CeleryBroker, make_celery, task_name
from models import dataset as datasets
from models import job as jobs
from models.job import JobKind, JobState, Queue
from models.session import Database
from models.worker import Worker
from ops.migrate import upgrade
from ops.valkey_binary import get_binary_path
from worker.consumer import Consumer
from worker.job_runner import Outcome
from worker.tasks import add_tasks


class Valkey:
    """A broker of one test, which can be away."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis+socket://{folder}/valkey.sock"

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", f"{self._folder}/valkey.sock"]
        self._process = subprocess.Popen([*command, "--save", "", "--dir", self._folder], stdout=subprocess.DEVNULL)
        with redis.Redis(unix_socket_path=f"{self._folder}/valkey.sock") as client:
            until_no(redis.RedisError, client.ping)

    def freeze(self) -> None:
        """Keep its connections, and say nothing more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A broker that is away at first."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        valkey = Valkey(folder)
        yield valkey
        valkey.stop()


@pytest.fixture
def broker_url(redis_url: str) -> str:
    """Address of the session's broker, with nothing in it."""
    with redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        client.flushall()
    return redis_url


@contextmanager
def serving(url: str, run: Any, queue: str = "cpu") -> Iterator[Celery]:
    """Run Celery as a worker of one queue does, in a thread; it does what `run` says."""
    app = make_celery(lambda: url)
    add_tasks(app, run)
    before = structlog.get_config()  # Celery has this process configure its logs, as a worker does
    with start_worker(
        app, perform_ping_check=False, queues=[queue], pool="threads", loglevel="CRITICAL", shutdown_timeout=120.0
    ):
        yield app
    structlog.configure(**before)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_job_is_a_task() -> None:
    app = make_celery(lambda: "memory://")
    add_tasks(app, lambda job_id: Outcome.SUCCEEDED)
    assert {task_name(kind.value) for kind in JobKind} == {name for name in app.tasks if name.startswith("espalier.")}


def test_a_message_has_a_worker_of_its_queue_do_the_job(broker_url: str) -> None:
    done: list[str] = []

    def run(job_id: str) -> Outcome:
        done.append(job_id)
        return Outcome.SUCCEEDED

    broker = CeleryBroker(broker_url)
    broker.send("gpu", "train", "job_1")
    broker.send("cpu", "train", "job_2")
    assert (broker.count_waiting("gpu"), broker.count_waiting("cpu"), broker.count_waiting("ingest")) == (1, 1, 0)
    with serving(broker_url, run):
        until(lambda: done)
        until(lambda: broker.count_waiting("cpu") == 0)
    assert done == ["job_2"] and broker.count_waiting("gpu") == 1
    broker.close()


def test_celery_shows_which_job_a_worker_does_and_which_wait(broker_url: str) -> None:
    may_end = threading.Event()

    def run(job_id: str) -> Outcome:
        may_end.wait(120)
        return Outcome.SUCCEEDED

    broker = CeleryBroker(broker_url)
    with serving(broker_url, run) as app:
        try:
            broker.send("cpu", "fold", "job_1")
            broker.send("cpu", "train", "job_2")
            active = until(
                lambda: [task for tasks in (app.control.inspect().active() or {}).values() for task in tasks]
            )
            assert [(task["name"], task["args"]) for task in active] == [("espalier.fold", ["job_1"])]
            assert broker.count_waiting("cpu") == 1, "a busy worker fetches nothing that a free one could do"
            (stats,) = app.control.inspect().stats().values()
            assert stats["pool"]["max-concurrency"] == 1
        finally:
            may_end.set()
    broker.close()


ENDS = """
import sys
from broker import make_celery
from worker.job_runner import JobFailed, Outcome
from worker.tasks import add_tasks

def run(job_id):
    if job_id == "refused":
        raise JobFailed("Data set refused: Received 1 class.")
    return Outcome(job_id)

app = make_celery(lambda: sys.argv[1])
add_tasks(app, run)
app.worker_main(["worker", "--queues", "cpu", "--loglevel", "CRITICAL"])
"""


def test_task_events_tell_how_each_job_ended(broker_url: str) -> None:
    events: list[dict[str, Any]] = []
    app = make_celery(lambda: broker_url)
    broker = CeleryBroker(broker_url)
    with (
        subprocess.Popen([sys.executable, "-c", ENDS, broker_url], cwd=ROOT, stdout=subprocess.DEVNULL) as worker,
        app.connection_for_read() as connection,
    ):
        receiver = app.events.Receiver(connection, handlers={"*": events.append})

        try:
            with receiver.consumer_context(wakeup=True) as (own_connection, _, _):

                def have_come(count: int, *kinds: str) -> bool:
                    with suppress(TimeoutError):
                        own_connection.drain_events(timeout=1)
                    return sum(event["type"] in kinds for event in events) >= count

                until(lambda: have_come(1, "worker-heartbeat"))
                for job_id in ("succeeded", "cancelled", "given back", "refused"):
                    broker.send("cpu", "train", job_id)
                until(lambda: have_come(4, "task-succeeded", "task-failed"))
        finally:
            worker.kill()
    ended = [event["result"] for event in events if event["type"] == "task-succeeded"]
    (failed,) = [event["exception"] for event in events if event["type"] == "task-failed"]
    assert ended == ["'succeeded'", "'cancelled'", "'given back'"]
    assert "Data set refused: Received 1 class." in failed
    broker.close()


# --- a broker that is away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["redis+socket:///nowhere/valkey.sock", "redis://127.0.0.1:9/0", "redis://broker.invalid/0"]
)
def test_a_broker_that_cannot_be_reached_is_an_error(url: str) -> None:
    broker = CeleryBroker(url)
    with pytest.raises(Exception, match=r".+"):
        broker.count_waiting("cpu")
    with pytest.raises(Exception, match=r".+"):
        broker.send("cpu", "train", "job_1")
    broker.close()


def test_messages_are_sent_again_once_the_broker_is_back(valkey: Valkey) -> None:
    valkey.start()
    broker = CeleryBroker(valkey.url)
    broker.send("cpu", "train", "job_1")
    assert broker.count_waiting("cpu") == 1
    valkey.stop()
    with pytest.raises(Exception, match=r".+"):
        broker.count_waiting("cpu")
    valkey.start()
    assert until_no(Exception, lambda: broker.count_waiting("cpu")) == 0, "it came back empty"
    broker.send("cpu", "train", "job_1")
    assert broker.count_waiting("cpu") == 1
    broker.close()


def test_a_consumer_does_not_wait_longer_and_longer_for_the_broker() -> None:
    asked: dict[str, Any] = {}

    class Connection:
        def ensure_connection(self, *args: Any, **options: Any) -> Connection:
            asked.update(options)
            return self

        def ensure(self, *args: Any, **options: Any) -> None: ...

    class UnconnectedConsumer(Consumer):
        def __init__(self) -> None:
            self.app = make_celery(lambda: "memory://")
            self.first_connection_attempt = True

    connection = Connection()
    assert UnconnectedConsumer().ensure_connected(connection) is connection
    assert (asked["interval_start"], asked["interval_step"], asked["interval_max"]) == (2.0, 0, 2.0)


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'espalier.db'}")
    upgrade(database)
    yield database
    database.close()


@contextmanager
def worker_process(var: Path, broker_url: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker of the queue `ingest` as operators do."""
    environment = os.environ | {"ESPALIER_VAR": str(var), "ESPALIER_LOOK_EVERY_S": "1", "REDIS_URL": broker_url}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "ingest", *options]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def add_purge(database: Database, name: str) -> str:
    """Delete an empty data set, so that a worker of the queue `ingest` has to purge it; return the job's id."""
    with database.writing() as session:
        dataset = datasets.create_dataset(session, records.PRINCIPAL, name)
        datasets.delete_dataset(dataset)
        return jobs.add_job(session, dataset.project_id, JobKind.PURGE, Queue.INGEST, dataset.id).id


def test_work_waits_while_the_broker_is_away_and_goes_on_when_it_is_back(
    database: Database, valkey: Valkey, tmp_path: Path
) -> None:
    first = add_purge(database, "tulips")
    with worker_process(tmp_path, valkey.url) as worker:
        with database.reading() as session:
            until(lambda: session.scalars(select(Worker)).all() or session.rollback())
        valkey.start()
        settled(database, first, JobState.SUCCEEDED)
        valkey.stop()
        second = add_purge(database, "roses")
        valkey.start()
        settled(database, second, JobState.SUCCEEDED)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    with database.reading() as session:
        assert session.scalars(select(Worker)).all() == [], "a worker that ended takes no jobs"


@pytest.mark.slow
def test_a_worker_ends_within_25_seconds_though_its_broker_hangs(
    database: Database, valkey: Valkey, tmp_path: Path
) -> None:
    valkey.start()
    job_id = add_purge(database, "tulips")
    with worker_process(tmp_path, valkey.url) as worker:
        settled(database, job_id, JobState.SUCCEEDED)
        valkey.freeze()
        time.sleep(3)  # a heartbeat is being sent
        worker.send_signal(signal.SIGTERM)
        worker.wait(25)


def test_a_worker_with_more_than_one_slot_is_refused(tmp_path: Path, broker_url: str) -> None:
    with worker_process(tmp_path, broker_url, "--concurrency", "2") as worker:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 1 and "start more workers" in said


def test_a_worker_with_a_pool_of_processes_is_refused(tmp_path: Path, broker_url: str) -> None:
    # `--pool prefork` is the default of the command line, so Celery takes the pool of the configuration instead.
    with worker_process(tmp_path, broker_url, "--pool", "processes") as worker:
        _, output = worker.communicate(timeout=120)
        assert worker.returncode == 1 and "jobs need the pool 'threads'" in output and "Traceback" not in output


def test_a_worker_ends_when_celery_asks_it_to(database: Database, broker_url: str, tmp_path: Path) -> None:
    job_id = add_purge(database, "tulips")
    with worker_process(tmp_path, broker_url) as worker:
        settled(database, job_id, JobState.SUCCEEDED)
        app = make_celery(lambda: broker_url)
        app.control.shutdown()
        assert worker.wait(60) == 0
    with database.reading() as session:
        assert session.scalars(select(Worker)).all() == []


def test_a_bucket_that_refuses_a_worker_ends_it_and_says_why(tmp_path: Path, broker_url: str, s3_server: str) -> None:
    wrong = {"ESPALIER_STORE_URL": "s3://nobody/has/this", "ESPALIER_STORE_ENDPOINT": s3_server}
    wrong |= {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"}
    os.environ.update(wrong)
    try:
        with worker_process(tmp_path, broker_url) as worker:
            _, said = worker.communicate(timeout=120)
            assert worker.returncode == 1 and "worker cannot start" in said and "s3://nobody" in said
    finally:
        for name in wrong:
            del os.environ[name]
