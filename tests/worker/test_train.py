"""The worker's side of training, with a child that says what one of training says, and trains nothing."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import records
from sqlalchemy import select
from working import QUICK, Forgetful, Say, StartLoop, claimed_work, settled, training_place

from artifacts.store import Digest, Store
from models import job as jobs
from models import run as runs
from models.job import Job, JobKind, JobState, Outbox, Queue
from models.run import EventKind, RunState
from models.session import Database
from worker.child import Channel, _Reporter
from worker.train import Train

FOLD = {"epochs": 3, "best_epoch": 2, "stopped": "epochs", "metrics": {"accuracy": 0.5}, "history": []}
OUTCOME = {
    "type": "outcome",
    "bundle": records.digest("bundle"),
    "backbone": records.digest("backbone"),
    "metrics": {"accuracy": 0.5},
    "extraction": {},
    "files": [],
}


@dataclass
class Case:
    """A run that waits, its job, and what does it."""

    database: Database
    store: Store
    train: Train
    run_id: str
    job_id: str

    def events(self) -> list[tuple[EventKind, dict[str, Any]]]:
        with self.database.reading() as session:
            return [(event.kind, event.payload) for event in runs.get_events(session, self.run_id, after=0)]

    def owed(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(Outbox.kind).order_by(Outbox.id)))


@pytest.fixture
def case(sqlite: Database, store: Store, tmp_path: Path) -> Case:
    with sqlite.writing() as session:
        run = records.queued_run(session, records.ready_version(session))
        job = jobs.add_job(session, run.project_id, JobKind.TRAIN, Queue.CPU, run.id)
        return Case(sqlite, store, Train(store, training_place(tmp_path)), run.id, job.id)


def test_what_was_written_though_its_answer_was_lost_is_told_once(case: Case, say: Say) -> None:
    epochs = [{"type": "epoch", "fold": 0, "epoch": number, "metrics": {"loss": 1.0}} for number in (1, 2, 3)]
    state = {"stage": "folds", "fraction": 0.5}
    say(
        *epochs,
        {"type": "progress", "state": state},
        {"type": "fold", "result": {"number": 0, **FOLD}},
        {"type": "fold", "result": {"number": 1, **FOLD}},
        OUTCOME,
    )
    forgetful = Forgetful(case.database.engine.url)
    with claimed_work(case.database, through=forgetful) as work:
        complete = case.train.run(work)
        with case.database.writing() as session:
            complete(session)
            jobs.finish(session, work.lease, JobState.SUCCEEDED)
    forgetful.close()
    told = case.events()
    assert [kind.value for kind, _ in told] == [
        "state", "state", "epoch", "epoch", "epoch", "fold", "progress", "fold", "state",
    ]  # fmt: skip
    assert [payload["state"] for kind, payload in told if kind is EventKind.STATE] == ["queued", "running", "succeeded"]
    assert [payload["epoch"] for kind, payload in told if kind is EventKind.EPOCH] == [1, 2, 3]
    assert [payload["fold"] for kind, payload in told if kind is EventKind.FOLD] == [0, 1]
    assert case.owed() == ["started", "fold", "fold", "finished"]
    with case.database.reading() as session:
        assert runs.get_run(session, records.PRINCIPAL, case.run_id).state is RunState.SUCCEEDED
        assert [fold.number for fold in runs.get_folds(session, case.run_id)] == [0, 1]


@pytest.mark.parametrize("says", [True, False], ids=["alive", "silent"])
def test_a_long_epoch_is_only_stopped_if_nothing_moves(case: Case, say: Say, start_loop: StartLoop, says: bool) -> None:
    if says:
        say(*[{"type": "alive"}] * 10, OUTCOME, apart_s=0.3)
    else:
        say({"type": "alive"}, OUTCOME, apart_s=3.0)
    start_loop(case.database, case.train, timings=replace(QUICK, stall_s=1.5))
    job = settled(case.database, case.job_id, JobState.SUCCEEDED if says else JobState.FAILED)
    assert (job.error or {}).get("code") == (None if says else "stalled")


def test_a_child_says_at_most_once_a_second_that_it_lives(store: Store) -> None:
    said = io.StringIO()
    report = _Reporter(Channel(io.StringIO(), said), store)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        report.alive()
    assert said.getvalue() == '{"type": "alive"}\n' * 2


def test_the_export_of_a_run_that_was_slower_is_removed(case: Case, say: Say) -> None:
    quicker, slower = case.store.put(b"one export"), case.store.put(b"another export")
    key = {"network": "vgg16", "weights": records.digest("weights"), "cut": "block2", "size": 32, "export_version": 1}

    def export(digest: Digest) -> dict[str, Any]:
        return {"type": "add_backbone", "key": key, "digest": digest, "facts": {}}

    say(export(quicker), export(slower), export(quicker), OUTCOME)
    with claimed_work(case.database) as work:
        case.train.run(work)
    assert list(case.store.digests()) == [quicker]


@pytest.mark.parametrize(
    ("queue", "mine", "seen"),
    [(Queue.CPU, "0", "-1"), (Queue.GPU, "", "0"), (Queue.GPU, "3", "3"), (Queue.GPU, "2,5", "2")],
)
def test_a_job_sees_one_gpu_if_it_waited_for_one(
    case: Case, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: Queue, mine: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
    if not mine:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with case.database.writing() as session:
        session.get_one(Job, case.job_id).queue = queue
    say(OUTCOME)
    with claimed_work(case.database) as work:
        case.train.run(work)
    assert (tmp_path / "devices").read_text() == seen
