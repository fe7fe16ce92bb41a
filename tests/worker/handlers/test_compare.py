"""The worker's side of comparisons: which end of a run makes the table due, and what the child makes of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
from buckets import EACH_STORE_SLOWLY
from networks import mean_colour
from records import PRINCIPAL
from safetensors.numpy import save as save_tensors
from sqlalchemy import select
from working import SendFromChild, StartLoop, claimed_work, look, settled, training_settings

from artifacts import manifest
from artifacts.bundle import Bundle, Dense
from artifacts.images import IMAGE_RULE
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import Crashed
from models import comparison as comparisons
from models import job as jobs
from models import registry, run_jobs
from models import run as runs
from models.comparison import Comparison, ComparisonState
from models.job import Job, JobKind, JobState
from models.outbox import Outbox
from models.run import RunState
from models.session import Database
from recipes.layers import Activation
from recipes.recipe import Precision, Resize, Task
from worker.handlers.compare import Compare
from worker.handlers.train import Train
from worker.lease import Complete, Reason, Stopped
from worker.messages import Alive, ComparisonOutcome, Failed, RunOutcome

ERROR = Crashed("It died.")
OUTCOME = RunOutcome(
    bundle=records.digest("bundle"),
    backbone=records.digest("backbone"),
    metrics={"accuracy": 0.5},
    training_s=1.0,
    files=(),
)


def end(database: Database, train: Train, run_id: str, how: str) -> None:
    """End a run as the worker does."""
    with database.writing() as session:
        assert train._make_order(session, records.job_of(session, run_id)) is not None
    with database.writing() as session:
        job = records.job_of(session, run_id)
        match how:
            case "succeeded":
                train._complete(session, job, OUTCOME)
            case "failed":
                train.failed(session, job, ERROR)
            case "cancelled":
                train.cancelled(session, job)
        job.state = JobState(how)


def due(database: Database) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(Job.subject_id).where(Job.kind == JobKind.COMPARE)))


@pytest.fixture
def train(store: Store, tmp_path: Path) -> Train:
    return Train(store, training_settings(tmp_path))


@pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled"])
def test_however_the_last_run_ends_it_makes_the_table_due(database: Database, train: Train, how: str) -> None:
    with database.writing() as session:
        comparison = records.queued_comparison(session, records.ready_version(session))
        first, second = (run.id for run in comparisons.get_runs(session, comparison.id))
    end(database, train, first, "succeeded")
    assert due(database) == []
    with database.reading() as session:
        assert comparisons.get_comparison(session, PRINCIPAL, comparison.id).state is ComparisonState.RUNNING
    end(database, train, second, how)
    assert due(database) == [comparison.id]


def test_runs_that_end_at_once_make_one_table_due(database: Database, train: Train) -> None:
    with database.writing() as session:
        comparison = records.queued_comparison(session, records.ready_version(session), 4)
        made = [run.id for run in comparisons.get_runs(session, comparison.id)]
    together = threading.Barrier(4)

    def close(run_id: str, how: str) -> None:
        together.wait()
        end(database, train, run_id, how)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(close, made, ["succeeded", "failed", "succeeded", "cancelled"]))
    assert due(database) == [comparison.id]


# --- with a child --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A comparison of three runs, the second of which failed, and the job that makes its table."""

    database: Database
    store: Store
    comparison_id: str
    run_ids: list[str]
    job_id: str

    def comparison(self) -> Comparison:
        with self.database.reading() as session:
            return comparisons.get_comparison(session, PRINCIPAL, self.comparison_id)

    def outbox_rows(self) -> list[tuple[str, str]]:
        """Return which runs owe MLflow a table."""
        with self.database.reading() as session:
            query = select(Outbox.run_id, Outbox.kind).where(Outbox.kind == "comparison").order_by(Outbox.run_id)
            return [tuple(row) for row in session.execute(query)]  # type: ignore[misc]


IMAGES = 40
TRUTH = np.arange(IMAGES) % 2


def add_run(case: Case, session: Any, run_id: str, wrong: int) -> None:
    """End a run that answered so many images wrongly, with what it leaves."""
    logits = np.where(TRUTH == 1, 2.0, -2.0).astype(np.float32)[None, :, None]
    logits[:, :wrong] *= -1
    tensors = {"folds": (np.arange(IMAGES, dtype=np.int16) % 4 // 2)[None], "logits": logits}
    file = case.store.put(save_tensors(tensors))
    share = 1 - wrong / IMAGES
    metrics = {"accuracy": share, "accuracy_ci95": [share - 0.1, share], "interval": "Wilson, over images"}
    metrics |= {"groups": 20, "accuracy_ci95_groups": [share - 0.2, share]}
    backbone = case.store.put(mean_colour("colour"))
    layers = (Dense(np.full((3, 1), wrong / 1000, np.float32), np.zeros(1, np.float32), Activation.LINEAR),)
    golden = np.zeros((1, 8, 8, 3), np.uint8)
    bundle = Bundle(
        task=Task.BINARY,
        labels=("daisy", "rose"),
        backbone=backbone,
        engine="openvino",
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=8,
        resize=Resize.SQUASH,
        layers=layers,
        golden_input=golden,
        golden_output=np.zeros((1, 1), np.float32),
    )
    runs.start_run(session, run_id)
    runs.succeed_run(session, run_id, metrics, 1.0)
    runs.add_artifact(session, run_id, RunFile.OUT_OF_FOLD, file, 1, "application/octet-stream")
    digest = case.store.put(bundle.dump())
    registry.add_model_version(session, PRINCIPAL, "flowers", run_id, digest, backbone)
    comparisons.on_run_ended(session, run_id)


@pytest.fixture
def case(sqlite: Database, store: Store) -> Case:
    with sqlite.writing() as session:
        version = records.ready_version(session)
        rows = [
            Row(f"{number:02}.png", records.digest(str(number)), (("daisy", "rose")[label],), None, None, Split.TRAIN)
            for number, label in enumerate(TRUTH)
        ]
        version.manifest_sha256 = store.put(manifest.dump(rows))
        comparison = records.queued_comparison(session, version, 3)
        run_ids = [run.id for run in comparisons.get_runs(session, comparison.id)]
        case = Case(sqlite, store, comparison.id, run_ids, "")
        for run_id in run_ids:
            records.job_of(session, run_id).state = JobState.SUCCEEDED
        runs.fail_run(session, run_ids[1], ERROR.record())
        assert comparisons.on_run_ended(session, run_ids[1]) is None
        add_run(case, session, run_ids[0], wrong=12)
        add_run(case, session, run_ids[2], wrong=1)
        case.job_id = records.job_of(session, comparison.id).id
        return case


@EACH_STORE_SLOWLY
def test_the_child_compares_what_the_runs_left(case: Case, start_loop: StartLoop) -> None:
    start_loop(case.database, Compare(case.store, 1), kind=JobKind.COMPARE)
    settled(case.database, case.job_id, JobState.SUCCEEDED, within_s=180)
    found = case.comparison()
    assert found.state is ComparisonState.SUCCEEDED and found.table is not None
    assert (found.table["metric"], found.table["best"]) == ("accuracy", 2)
    first, last = found.table["rows"]
    assert (first["position"], last["position"]) == (0, 2), "a run that failed has no row"
    assert first["difference"]["difference"] == pytest.approx(-11 / 40) and last["difference"] is None
    assert first["difference"]["p_value"] == pytest.approx(2 * 0.5**11, abs=0.001), "eleven of eleven to one side"
    assert all(row["predict_ms"] > 0 and row["backbone_bytes"] == len(mean_colour("colour")) for row in (first, last))
    assert last["ci95"] == pytest.approx([0.775, 0.975]) and found.table["interval"] == "Wilson, over groups of images"
    assert found.table["verdict"].startswith("epochs=3 has the best accuracy, 97.5%")
    assert found.table["verdict"].endswith("Not in the table: the runs of other recipes (1 failed).")
    assert case.store.has(found.picture_sha256) and case.store.has(found.report_sha256)  # type: ignore[arg-type]
    assert case.outbox_rows() == sorted((case.run_ids[number], "comparison") for number in (0, 2))


@pytest.mark.slow
def test_a_bundle_that_this_machine_does_not_serve_is_compared_but_not_timed(case: Case, start_loop: StartLoop) -> None:
    with case.database.reading() as session:
        version = registry.find_run_version(session, case.run_ids[0])
        assert version is not None
        bundle = case.store.path(Digest(version.bundle_sha256))
    bundle.chmod(0o600)
    bundle.write_bytes(bundle.read_bytes()[:-1] + b"x")
    start_loop(case.database, Compare(case.store, 1), kind=JobKind.COMPARE)
    settled(case.database, case.job_id, JobState.SUCCEEDED, within_s=180)
    table = case.comparison().table
    assert table is not None
    assert [row["predict_ms"] is None for row in table["rows"]] == [True, False]
    assert table["rows"][0]["difference"]["difference"] == pytest.approx(-11 / 40)


def outcome(case: Case) -> ComparisonOutcome:
    picture, report = case.store.put(b"picture"), case.store.put(b"report")
    return ComparisonOutcome(table={"rows": []}, picture=picture, report=report)


def test_a_comparison_that_was_cancelled_meanwhile_keeps_no_files(case: Case, send_from_child: SendFromChild) -> None:
    message = outcome(case)
    send_from_child(message)
    with claimed_work(case.database) as work:
        complete = Compare(case.store, 1).run(work)
        with case.database.writing() as session:
            comparisons.cancel_comparison(session, case.comparison_id)
        with case.database.writing() as session:
            complete(session)
    found = case.comparison()
    assert (found.state, found.table) == (ComparisonState.CANCELLED, None)
    assert not case.store.has(message.picture) and not case.store.has(message.report)
    assert case.outbox_rows() == []


def lose(database: Database, complete: Complete) -> None:
    """Make a change whose commit fails."""
    with database.writing() as session:
        complete(session)
        raise ConnectionError


def test_the_files_of_an_earlier_table_go_when_there_is_another_and_not_before(
    case: Case, send_from_child: SendFromChild
) -> None:
    table = {"rows": [{"position": 0}, {"position": 2}], "verdict": "equal"}
    outcomes = [
        ComparisonOutcome(table=table, picture=case.store.put(name), report=case.store.put(name + b".md"))
        for name in (b"first", b"second")
    ]
    for number, message in enumerate(outcomes):
        send_from_child(message)
        with claimed_work(case.database) as work:
            complete = Compare(case.store, 1).run(work)
            with pytest.raises(ConnectionError):
                lose(case.database, complete)
            shown = case.comparison()
            assert shown.picture_sha256 == (outcomes[0].picture if number else None)
            assert all(case.store.has(file) for one in outcomes for file in (one.picture, one.report))
            with case.database.writing() as session:
                complete(session)
                jobs.finish(session, work.lease, JobState.SUCCEEDED)
        assert case.comparison().picture_sha256 == message.picture
        with case.database.writing() as session:
            comparison = session.get_one(Comparison, case.comparison_id)
            comparison.state = ComparisonState.RUNNING
            assert number or comparisons.on_run_ended(session, case.run_ids[0]) is not None
    assert [case.store.has(file) for one in outcomes for file in (one.picture, one.report)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_table_that_fails_while_a_run_is_tried_again_leaves_the_comparison_open(case: Case) -> None:
    with case.database.writing() as session:
        run_jobs.retry(session, runs.get_run(session, PRINCIPAL, case.run_ids[1]))
        comparisons.on_run_retried(session, case.run_ids[1])
    with case.database.writing() as session:
        Compare(case.store, 1).failed(session, records.job_of(session, case.comparison_id), ERROR)
        jobs.request_cancel(session, case.comparison_id, JobKind.COMPARE)
    assert case.comparison().state is ComparisonState.RUNNING
    with case.database.writing() as session:
        runs.fail_run(session, case.run_ids[1], ERROR.record())
        assert comparisons.on_run_ended(session, case.run_ids[1]) is not None


def test_a_table_that_fails_is_made_anew_if_a_run_has_succeeded_meanwhile(case: Case) -> None:
    with claimed_work(case.database) as work:
        with case.database.writing() as session:
            run_jobs.retry(session, runs.get_run(session, PRINCIPAL, case.run_ids[1]))
            comparisons.on_run_retried(session, case.run_ids[1])
            add_run(case, session, case.run_ids[1], wrong=2)
        with case.database.writing() as session:
            Compare(case.store, 1).failed(session, work.job, ERROR)
            jobs.finish(session, work.lease, JobState.FAILED)
    assert case.comparison().state is ComparisonState.RUNNING
    with claimed_work(case.database) as work, case.database.writing() as session:
        Compare(case.store, 1).failed(session, work.job, ERROR)
        jobs.finish(session, work.lease, JobState.FAILED)
    assert case.comparison().state is ComparisonState.FAILED


def test_a_comparison_that_was_cancelled_before_starts_no_child(case: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Failed.by(ERROR))
    with case.database.writing() as session:
        comparisons.cancel_comparison(session, case.comparison_id)
    with claimed_work(case.database) as work, pytest.raises(Stopped) as stopped:
        Compare(case.store, 1).run(work)
    assert stopped.value.reason is Reason.CANCELLED


def test_a_comparison_fails_with_what_its_child_said(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    error = {"code": "corrupt", "detail": "The stored file is not what its digest says."}
    send_from_child(Failed(error=error))
    start_loop(case.database, Compare(case.store, 1), kind=JobKind.COMPARE)
    settled(case.database, case.job_id, JobState.FAILED)
    found = case.comparison()
    assert (found.state, found.error) == (ComparisonState.FAILED, error)


def test_cancelling_stops_the_child(case: Case, send_from_child: SendFromChild, start_loop: StartLoop) -> None:
    send_from_child(Alive(), outcome(case), apart_s=600.0)
    start_loop(case.database, Compare(case.store, 1), kind=JobKind.COMPARE)
    settled(case.database, case.job_id, JobState.RUNNING)
    with case.database.writing() as session:
        comparisons.request_cancel(session, case.comparison_id)
    settled(case.database, case.job_id, JobState.CANCELLED)
    assert case.comparison().state is ComparisonState.CANCELLED


def test_a_comparison_whose_worker_was_lost_waits_again(case: Case, send_from_child: SendFromChild) -> None:
    draining = threading.Event()
    send_from_child(Alive(), outcome(case))
    with claimed_work(case.database, draining) as work:
        Compare(case.store, 1).run(work)
        with case.database.writing() as session:
            jobs.give_back(session, work.lease)
            Compare(case.store, 1).requeued(session, work.job, None)
    assert look(case.database, case.job_id).state is JobState.QUEUED
    assert case.comparison().state is ComparisonState.RUNNING
    with case.database.reading() as session:
        states = [run.state for run in comparisons.get_runs(session, case.comparison_id)]
    assert states == [RunState.SUCCEEDED, RunState.FAILED, RunState.SUCCEEDED]
