from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update
from structlog.testing import capture_logs
from waiting import until
from working import add_job, make_due, request_cancel

import dispatch as dispatching
from dispatch import ThreadDispatcher, dispatch
from models import job as jobs
from models import worker as workers
from models.base import now
from models.job import Job, Queue
from models.session import Database
from models.worker import Worker

LIVE_S = 15.0


class ListBroker:
    """Keeps messages in a list; may be away."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, str]] = []
        self.is_away = False

    def count_waiting(self, queue: str) -> int:
        if self.is_away:
            raise ConnectionError("The broker is away.")
        return sum(queue == of for of, _ in self.waiting)

    def send(self, queue: str, kind: str, job_id: str) -> None:
        self.waiting.append((queue, job_id))

    def close(self) -> None:
        pass

    def sent(self) -> list[str]:
        """Return the ids of the jobs whose messages wait, and have workers fetch these."""
        found, self.waiting = [job_id for _, job_id in self.waiting], []
        return found


@pytest.fixture
def broker() -> ListBroker:
    return ListBroker()


def see(database: Database, *names: str, queue: Queue = Queue.CPU) -> None:
    with database.writing() as session:
        for name in names:
            workers.see_worker(session, name, [queue])


def claim(database: Database, job_id: str, worker: str) -> None:
    with database.writing() as session:
        assert jobs.claim(session, job_id, [Queue.CPU], worker) is not None


def test_a_job_is_sent_for_each_free_slot_and_none_ahead(database: Database, broker: ListBroker) -> None:
    ids = [add_job(database, f"run_{number}") for number in range(4)]
    assert dispatch(database, broker, LIVE_S) == 0, "there is no worker"
    see(database, "one", "two")
    assert dispatch(database, broker, LIVE_S) == 2
    assert dispatch(database, broker, LIVE_S) == 0, "two messages wait for two slots"
    assert broker.sent() == ids[:2]
    claim(database, ids[0], "one")
    claim(database, ids[1], "two")
    assert dispatch(database, broker, LIVE_S) == 0


def test_what_becomes_urgent_goes_before_what_has_waited_longer(database: Database, broker: ListBroker) -> None:
    see(database, "one")
    first, _, urgent = [add_job(database, f"run_{number}") for number in range(3)]
    claim(database, first, "one")
    assert dispatch(database, broker, LIVE_S) == 0
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == urgent).values(priority=jobs.UNDER_WAY))
        session.execute(update(Job).where(Job.id == first).values(lease_owner=None, state="succeeded"))
    dispatch(database, broker, LIVE_S)
    assert broker.sent() == [urgent]


def test_a_lost_message_is_sent_again(database: Database, broker: ListBroker) -> None:
    see(database, "one", "two")
    first, second = add_job(database, "run_1"), add_job(database, "run_2")
    dispatch(database, broker, LIVE_S)
    broker.waiting.clear()
    dispatch(database, broker, LIVE_S)
    assert broker.sent() == [first, second]


def test_messages_that_wait_are_taken_to_be_for_the_first_jobs(database: Database, broker: ListBroker) -> None:
    see(database, "one")
    first, second = add_job(database, "run_1"), add_job(database, "run_2")
    dispatch(database, broker, LIVE_S)
    see(database, "two")
    dispatch(database, broker, LIVE_S)
    assert broker.sent() == [first, second]


def test_a_job_that_is_not_due_or_was_cancelled_is_not_sent(database: Database, broker: ListBroker) -> None:
    see(database, "one", "two")
    later, cancelled = add_job(database, "run_1"), add_job(database, "run_2")
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == later).values(next_attempt_at=now() + timedelta(seconds=50)))
    request_cancel(database, "run_2")
    assert dispatch(database, broker, LIVE_S) == 0
    make_due(database, later)
    assert dispatch(database, broker, LIVE_S) == 1
    assert broker.sent() == [later] != [cancelled]


def test_nothing_is_sent_to_a_worker_that_was_not_seen_lately(database: Database, broker: ListBroker) -> None:
    see(database, "gone")
    add_job(database)
    with database.writing() as session:
        session.execute(update(Worker).values(looked_at=now() - timedelta(seconds=LIVE_S + 1)))
    assert dispatch(database, broker, LIVE_S) == 0


def test_each_queue_has_its_own_workers(database: Database, broker: ListBroker) -> None:
    see(database, "trains")
    see(database, "takes in", queue=Queue.INGEST)
    add_job(database, "dsv_1", queue=Queue.TRACKING)
    mine = {add_job(database, "dsv_2", queue=Queue.INGEST), add_job(database, "run_1")}
    dispatch(database, broker, LIVE_S)
    assert {*broker.sent()} == mine


# --- the thread ------------------------------------------------------------------------------------------------------


Start = Callable[[Database, ListBroker], ThreadDispatcher]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start dispatchers that are closed at the end of the test."""
    started: list[ThreadDispatcher] = []

    def start(database: Database, broker: ListBroker) -> ThreadDispatcher:
        started.append(ThreadDispatcher(database, broker, LIVE_S))
        started[-1].start()
        return started[-1]

    yield start
    for dispatcher in started:
        dispatcher.close()


def test_a_request_is_answered_on_another_thread(sqlite: Database, broker: ListBroker, start: Start) -> None:
    see(sqlite, "one")
    dispatcher = start(sqlite, broker)
    job_id = add_job(sqlite)
    dispatcher.request()
    until(lambda: broker.waiting)
    assert broker.sent() == [job_id]


def test_a_broker_that_is_away_costs_nobody_anything_and_is_asked_again(
    sqlite: Database, broker: ListBroker, start: Start
) -> None:
    see(sqlite, "one")
    job_id = add_job(sqlite)
    broker.is_away = True
    with capture_logs() as logs:
        dispatcher = start(sqlite, broker)
        dispatcher.request()
        until(lambda: [entry for entry in logs if entry["event"] == "jobs not sent"])
    broker.is_away = False
    dispatcher.request()
    until(lambda: broker.waiting)
    assert broker.sent() == [job_id]


def test_whoever_requests_or_closes_does_not_wait_for_a_broker_that_hangs(
    sqlite: Database, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "_CLOSE_S", 0.2)
    hangs, asked = threading.Event(), threading.Event()

    class HangingBroker(ListBroker):
        def count_waiting(self, queue: str) -> int:
            asked.set()
            hangs.wait(120)
            return 0

    see(sqlite, "one")
    add_job(sqlite)
    dispatcher = start(sqlite, HangingBroker())
    dispatcher.request()
    assert asked.wait(120)
    for _ in range(1000):
        dispatcher.request()
    dispatcher.close()
    assert not hangs.is_set()
    hangs.set()


def test_a_database_that_is_away_is_asked_again(tmp_path: Path, broker: ListBroker, start: Start) -> None:
    with capture_logs() as logs:
        dispatcher = start(Database(f"sqlite:///{tmp_path / 'no' / 'folder' / 'test.db'}"), broker)
        dispatcher.request()
        until(lambda: [entry for entry in logs if entry["event"] in ("database unavailable", "jobs not sent")])
        before = len(logs)
        dispatcher.request()
        until(lambda: len(logs) > before)
