"""The worker's side of training, with a child that says what one of training says, and trains nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import records
from database_marks import ON_SQLITE
from idle_worker import has_ended
from lossy_postgres import lost_commits
from manual_clock import ManualClock
from sqlalchemy import select
from sqlalchemy.orm import Session
from waiting import until
from working import (
    QUICK,
    LostCommitDatabase,
    SendFromChild,
    StartLoop,
    claimed_work,
    look,
    settled,
    sweep_twice,
    training_settings,
)

from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import Crashed, OutOfMemory, TrainingDiverged, Unavailable
from models import job as jobs
from models import registry, run_jobs
from models import run as runs
from models.file_references import find_unreferenced
from models.job import Job, JobKind, JobState, Queue
from models.outbox import Outbox
from models.registry import ModelVersion, QuantisedBackbone, Weights
from models.run import FINAL_PART, EventKind, RunState
from models.session import Database
from recipes.catalogue import BackboneName
from recipes.recipe import Mode, Recipe, Task
from training.progress import Extraction, FoldResult
from worker import app as worker_app
from worker.child_process import Child
from worker.handlers.train import DRAIN_WITHIN_S, Train, _answer
from worker.lease import Complete, Stopped, WarmChild, Work
from worker.local_worker import LocalWorker
from worker.messages import (
    AddBackbone,
    AddQuantised,
    Alive,
    Answer,
    CheckpointWritten,
    ChildMessage,
    ChoiceAnswer,
    DigestAnswer,
    EpochEnded,
    Extracted,
    Failed,
    FileWritten,
    FindPrecisionChoice,
    FindQuantised,
    FoldEnded,
    JobProgress,
    Prepared,
    Progress,
    RunOutcome,
    SetPrecisionChoice,
    Stored,
    StoredFile,
)

FOLD: dict[str, Any] = {
    "epochs": 3,
    "best_epoch": 2,
    "stopped": "epochs",
    "metrics": {"accuracy": 0.5},
    "history": [],
    "seconds": 2.0,
}
STATE = JobProgress(stage="folds", share=0.5, fold=0, epoch=2, epochs=3, spent_s=1.0, eta_s=1.0)
PROGRESS = Progress(state=STATE)
EXTRACTION = {"images": 20, "computed": 20, "cached": 0, "seconds": 3.0}
EXTRACTED = Extracted(extraction=Extraction(images=20, computed=20, cached=0, seconds=3.0))
OUTCOME = RunOutcome(
    bundle=records.digest("bundle"),
    backbone=records.digest("backbone"),
    metrics={"accuracy": 0.5},
    training_s=12.5,
    files=(),
)
TUNING = Recipe(task=Task.BINARY, mode=Mode.FINE_TUNING)


@dataclass
class Case:
    """A run that waits, its first job, and what does it."""

    database: Database
    store: Store
    train: Train
    run_id: str
    job_id: str
    warm_child: WarmChild = field(default_factory=WarmChild)

    def events(self) -> list[tuple[EventKind, dict[str, Any]]]:
        with self.database.reading() as session:
            return [(event.kind, event.payload) for event in runs.get_events(session, self.run_id, after=0)]

    def outbox_kinds(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(Outbox.kind).order_by(Outbox.id)))

    def run(self) -> runs.Run:
        with self.database.reading() as session:
            return runs.get_run(session, records.PRINCIPAL, self.run_id)

    def checkpoints(self) -> dict[int, list[Digest]]:
        with self.database.reading() as session:
            return runs.get_checkpoints(session, self.run_id)

    def jobs(self, state: JobState) -> list[tuple[JobKind, int]]:
        with self.database.reading() as session:
            query = select(Job.kind, Job.index).where(Job.state == state).order_by(Job.kind, Job.index)
            return [tuple(row) for row in session.execute(query)]  # type: ignore[misc]

    def fold(self, number: int) -> FoldEnded:
        """Return what a child says at the end of a fold."""
        outcome = self.store.put(f"outcome of fold {number}".encode())
        return FoldEnded(result=FoldResult(number=number, **FOLD), outcome=outcome)

    def checkpoint(self, fold: int | None, epochs: int) -> CheckpointWritten:
        """Return what a child says when it has kept how far a fold is."""
        digest = self.store.put(f"fold {fold} at epoch {epochs}".encode())
        return CheckpointWritten(fold=fold, epochs=epochs, sha256=digest, size_bytes=9)

    def do(self, through: Database | None = None) -> Work:
        """Do the job that is due, to its end."""
        with claimed_work(self.database, through=through) as work:
            complete = self.train.run(work)
            with self.database.writing() as session:
                complete(session)
                jobs.finish(session, work.lease, JobState.SUCCEEDED)
        return work


def queued(database: Database, store: Store, folder: Path, recipe: Recipe) -> Case:
    recipe = recipe.model_copy(update={"folds": recipe.folds.model_copy(update={"k": 2})})
    with database.writing() as session:
        version = records.ready_version(session)
        run = runs.create_run(session, records.PRINCIPAL, version.id, "flowers", recipe)
        job = run_jobs.queue_training(session, run)
        assert DRAIN_WITHIN_S < worker_app._DRAIN_S, "a worker hears what its child says at the end"
        train = Train(store, training_settings(folder), drain_within_s=600.0)  # a child is done long before
        return Case(database, store, train, run.id, job.id)


@pytest.fixture
def case(sqlite: Database, store: Store, tmp_path: Path) -> Case:
    """A run whose folds are one job."""
    return queued(sqlite, store, tmp_path, records.RECIPE)


@pytest.fixture
def tuning(database: Database, store: Store, tmp_path: Path) -> Iterator[Case]:
    """A run whose folds are jobs of their own."""
    return queued(database, store, tmp_path, TUNING)


# --- what is said is written once ----------------------------------------------------------------------------------


def test_what_was_written_though_its_answer_was_lost_is_told_once(case: Case, send_from_child: SendFromChild) -> None:
    epochs = [EpochEnded(fold=0, epoch=number, metrics={"loss": 1.0}) for number in (1, 2, 3)]
    send_from_child(
        *epochs,
        PROGRESS,
        case.checkpoint(0, 2),
        case.fold(0),
        case.fold(1),
        OUTCOME,
    )
    forgetful = LostCommitDatabase(case.database.engine.url)
    case.do(through=forgetful)
    forgetful.close()
    events = case.events()
    kinds = [kind.value for kind, _ in events]
    assert kinds == ["state", "state", "epoch", "epoch", "epoch", "progress", "fold", "fold", "state"]
    assert [payload["state"] for kind, payload in events if kind is EventKind.STATE] == [
        "queued",
        "running",
        "succeeded",
    ]
    assert [payload["epoch"] for kind, payload in events if kind is EventKind.EPOCH] == [1, 2, 3]
    assert [payload["fold"] for kind, payload in events if kind is EventKind.FOLD] == [0, 1]
    assert case.outbox_kinds() == ["started", "fold", "fold", "finished"]
    assert (case.run().state, case.run().training_s) == (RunState.SUCCEEDED, 12.5)
    with case.database.reading() as session:
        assert [fold.number for fold in runs.get_folds(session, case.run_id)] == [0, 1]
    assert list(case.store.digests()) == [], "what only its folds needed is gone with its end"


def test_progress_is_that_of_the_whole_run(case: Case, send_from_child: SendFromChild) -> None:
    send_from_child(PROGRESS, EXTRACTED)
    with claimed_work(case.database) as work, pytest.raises(Crashed, match="without a result"):
        case.train.run(work)
    progress = case.run().progress
    assert (progress["stage"], progress["fold"], progress["folds"]) == ("folds", 1, 2)
    assert progress["fraction"] == pytest.approx(0.6 + 0.35 / 4)
    assert progress["eta_s"] == pytest.approx(1.0 + 2.0 + 2.0), "the rest of this fold, another one, the final fit"
    assert case.run().extraction == EXTRACTION


def test_progress_of_folds_that_one_child_learns_side_by_side_is_that_of_all_of_them(
    case: Case, send_from_child: SendFromChild
) -> None:
    side_by_side = {"folds": 2, "share": 0.5 + 0.25, "spent_s": 3.0, "eta_s": 5.0}
    send_from_child(Progress(state=STATE.model_copy(update=side_by_side)), EXTRACTED)
    with claimed_work(case.database) as work, pytest.raises(Crashed, match="without a result"):
        case.train.run(work)
    progress = case.run().progress
    assert progress["fraction"] == pytest.approx(0.6 + 0.35 * 0.75 / 2)
    assert progress["eta_s"] == pytest.approx(5.0 + 3.0 / 0.75), "the rest of both, and the final fit"


def late(clock: ManualClock, *gaps_s: float) -> Callable[[Mapping[str, str]], Child]:
    """Start children whose messages come so long one after the other, by a clock that only this moves."""
    left = iter(gaps_s)

    class SlowChild(Child):
        def receive(self, work: Work) -> ChildMessage | None:
            clock.sleep(next(left))
            work._holder.look()
            while (message := super().receive(work)) is None:
                pass
            return message

    return lambda environment: SlowChild(environment=environment)


def done_late(case: Case, folder: Path, *gaps_s: float) -> Job:
    """Do the job with a child that is late, where nothing may stand still for longer than 1.5 s; return the job."""
    clock = ManualClock()
    handlers = dict.fromkeys(JobKind, Train(case.store, training_settings(folder), late(clock, *gaps_s)))
    loop = LocalWorker(case.database, Queue.CPU, handlers, "here", replace(QUICK, stall_s=1.5), clock.worker_clock())
    assert loop.work()
    return look(case.database, case.job_id)


def test_a_long_epoch_is_not_stopped_while_it_moves(case: Case, send_from_child: SendFromChild, tmp_path: Path) -> None:
    send_from_child(*[Alive(step_s=0.01)] * 10, OUTCOME)
    assert done_late(case, tmp_path, *[1.4] * 11).state is JobState.SUCCEEDED


def test_a_long_epoch_is_stopped_if_nothing_moves(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    send_from_child(Alive(step_s=0.01), OUTCOME, apart_s=600.0)
    start_loop(case.database, case.train, timings=replace(QUICK, stall_s=1.5))
    job = settled(case.database, case.job_id, JobState.FAILED)
    assert (job.error or {})["code"] == "stalled"


@pytest.mark.parametrize(
    ("gap_s", "state"), [(9.9, JobState.SUCCEEDED), (10.1, JobState.FAILED)], ids=["waited for", "stalled"]
)
def test_steps_that_take_long_are_waited_for(
    case: Case, send_from_child: SendFromChild, tmp_path: Path, gap_s: float, state: JobState
) -> None:
    send_from_child(Alive(step_s=1.0), OUTCOME)
    job = done_late(case, tmp_path, 1.4, gap_s)
    assert job.state is state
    assert (job.error or {}).get("code") == (None if state is JobState.SUCCEEDED else "stalled")


def test_the_export_of_a_run_that_was_slower_is_removed(case: Case, send_from_child: SendFromChild) -> None:
    quicker, slower = case.store.put(b"one export"), case.store.put(b"another export")

    def export(digest: Digest) -> AddBackbone:
        return AddBackbone(
            network=BackboneName.VGG16,
            weights=records.digest("weights"),
            cut="block2",
            size=32,
            export_version=1,
            digest=digest,
            facts={},
        )

    send_from_child(export(quicker), export(slower), export(quicker), OUTCOME)
    with claimed_work(case.database) as work:
        case.train.run(work)
    assert list(case.store.digests()) == [quicker]


def test_all_parts_of_a_run_use_one_quantised_network_whatever_others_calibrate_meanwhile(case: Case) -> None:
    export = records.digest("export")

    def ask(question: ChildMessage, run_id: str) -> Digest | None:
        with case.database.writing() as session:
            answer = _answer(session, run_id, case.store, question)
        assert isinstance(answer, DigestAnswer)
        return answer.digest

    def find(run_id: str = case.run_id) -> Digest | None:
        return ask(FindQuantised(backbone=export, image_rule=1), run_id)

    def made(data: bytes, run_id: str = case.run_id) -> tuple[Digest, Digest | None]:
        digest = case.store.put(data)
        return digest, ask(AddQuantised(backbone=export, image_rule=1, digest=digest, facts={"images": 20}), run_id)

    assert find() is None
    first, settled = made(b"first")
    assert settled == first == find()
    with case.database.writing() as session:
        run = runs.get_run(session, records.PRINCIPAL, case.run_id)
        anew = Recipe(**{**run.recipe, "precision": "int8", "recalibrate": True})
        other = runs.create_run(session, records.PRINCIPAL, run.dataset_version_id, "other", anew).id
        (row,) = session.scalars(select(QuantisedBackbone))
        assert row.manifest == {"images": 20, "dataset_version": run.dataset_version_id}
    assert find(other) is None
    second, settled = made(b"second", other)
    assert settled == second != first
    assert find() == first and find(other) == second
    late, settled = made(b"another part of the same run", other)
    assert settled == second and not case.store.has(late)
    with case.database.writing() as session:
        runs.drop_networks(session, case.run_id)
    assert find() == second


def test_what_a_run_chose_of_precisions_is_kept_until_it_is_over(case: Case) -> None:
    def ask(question: ChildMessage) -> Answer:
        with case.database.writing() as session:
            return _answer(session, case.run_id, case.store, question)

    assert ask(FindPrecisionChoice()) == ChoiceAnswer(choice=None)
    assert ask(SetPrecisionChoice(choice={"chosen": "int8"})) == Stored()
    assert ask(FindPrecisionChoice()) == ChoiceAnswer(choice={"chosen": "int8"})
    with case.database.writing() as session:
        run_jobs.drop_leftovers(session, case.run_id)
    assert ask(FindPrecisionChoice()) == ChoiceAnswer(choice=None)


@pytest.mark.parametrize(
    ("queue", "mine", "seen"),
    [(Queue.CPU, "0", "-1"), (Queue.GPU, "", "0"), (Queue.GPU, "3", "3"), (Queue.GPU, "2,5", "2")],
)
def test_a_job_sees_one_gpu_if_it_waited_for_one(
    case: Case,
    send_from_child: SendFromChild,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    queue: Queue,
    mine: str,
    seen: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
    if not mine:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with case.database.writing() as session:
        session.get_one(Job, case.job_id).queue = queue
    send_from_child(OUTCOME)
    with claimed_work(case.database) as work:
        case.train.run(work)
    assert (tmp_path / "devices").read_text() == seen


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_of_a_part_are_kept_and_go_with_its_end(
    case: Case, send_from_child: SendFromChild
) -> None:
    first, *kept = (case.checkpoint(0, epochs) for epochs in (1, 2, 3))
    last = case.checkpoint(None, 1)
    send_from_child(first, *kept, last)
    with claimed_work(case.database) as work, pytest.raises(Crashed, match="without a result"):
        case.train.run(work)
    found = {0: [kept[1].sha256, kept[0].sha256], FINAL_PART: [last.sha256]}
    assert case.checkpoints() == found
    assert set(case.store.digests()) == {digest for digests in found.values() for digest in digests}
    with case.database.writing() as session:
        order = case.train._make_order(session, session.get_one(Job, case.job_id))
    assert order is not None and order.checkpoints == {0: tuple(found[0])}
    assert order.final_checkpoints == tuple(found[FINAL_PART])

    send_from_child(case.fold(0))
    with case.database.writing() as session:
        jobs.give_back(session, work.lease)
    with claimed_work(case.database) as work, pytest.raises(Crashed, match="without a result"):
        case.train.run(work)
    assert case.checkpoints() == {FINAL_PART: [last.sha256]}


def test_what_a_child_kept_when_its_worker_was_told_to_end_is_written(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    kept = case.checkpoint(0, 7)
    epoch = EpochEnded(fold=0, epoch=7, metrics={})
    send_from_child(PROGRESS, on_drain=[epoch, kept])
    loop = start_loop(case.database, case.train)
    until(lambda: case.run().progress.get("stage") == "folds")
    loop.drain()
    loop.join(60)
    assert has_ended(loop)
    job = settled(case.database, case.job_id, JobState.QUEUED)
    assert job.attempt == 0, "the attempt does not count"
    assert case.run().state is RunState.QUEUED
    assert case.checkpoints() == {0: [kept.sha256]}
    assert [payload["epoch"] for kind, payload in case.events() if kind is EventKind.EPOCH] == [7]


def test_of_folds_that_are_learned_side_by_side_each_is_kept_when_the_worker_is_told_to_end(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    kept = [case.checkpoint(number, 7) for number in range(2)]
    send_from_child(PROGRESS, on_drain=kept)
    loop = start_loop(case.database, case.train)
    until(lambda: case.run().progress.get("stage") == "folds")
    loop.drain()
    loop.join(60)
    assert case.checkpoints() == {number: [message.sha256] for number, message in enumerate(kept)}


def test_a_fold_that_ends_while_its_worker_is_told_to_end_is_done(
    tuning: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    send_from_child(Prepared())
    tuning.do()
    send_from_child(PROGRESS, on_drain=[tuning.checkpoint(0, 2), tuning.fold(0)])
    loop = start_loop(tuning.database, tuning.train, kind=JobKind.FOLD)
    until(lambda: tuning.run().progress.get("stage") == "folds")
    loop.drain()
    loop.join(60)
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FOLD, 1)] and tuning.jobs(JobState.FAILED) == []
    send_from_child(tuning.fold(1))
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FINAL, 0)]


def test_a_run_that_ends_while_its_worker_is_told_to_end_lacks_nothing(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    sheet = StoredFile(
        name=RunFile.AUGMENTATIONS, sha256=case.store.put(b"sheet"), size_bytes=5, media_type="image/png"
    )
    said = [EXTRACTED, FileWritten(file=sheet)]
    send_from_child(PROGRESS, on_drain=[*said, case.fold(0), case.fold(1), OUTCOME])
    loop = start_loop(case.database, case.train)
    until(lambda: case.run().progress.get("stage") == "folds")
    loop.drain()
    loop.join(60)
    run = case.run()
    assert run.state is RunState.SUCCEEDED and run.extraction == EXTRACTION
    with case.database.reading() as session:
        assert [fold.number for fold in runs.get_folds(session, run.id)] == [0, 1]
        assert [file.name for file in runs.get_artifacts(session, run.id)] == ["augmentations.png"]


def test_attempts_count_from_where_the_work_stands(case: Case, send_from_child: SendFromChild) -> None:
    with case.database.writing() as session:
        session.get_one(Job, case.job_id).attempt = jobs.MAX_ATTEMPTS - 1
    send_from_child(case.checkpoint(0, 1))
    with claimed_work(case.database) as work, pytest.raises(Crashed, match="without a result"):
        case.train.run(work)
    with case.database.reading() as session:
        assert session.get_one(Job, case.job_id).attempt == work.job.attempt == 1


def test_every_part_of_a_run_learns_from_the_weights_that_it_began_with(
    tuning: Case, send_from_child: SendFromChild
) -> None:
    def weights_in_order() -> Digest | None:
        with tuning.database.writing() as session:
            order = tuning.train._make_order(session, session.get_one(Job, tuning.job_id))
        assert order is not None
        return order.spec.weights

    def name(digest: Digest) -> None:
        with tuning.database.writing() as session:
            weights = Weights(network=BackboneName.XCEPTION, name="imagenet", sha256=digest, source={})
            registry.set_weights(session, weights)

    before, after = tuning.store.put(b"weights"), tuning.store.put(b"other weights")
    assert weights_in_order() is None
    name(before)
    assert weights_in_order() == before
    name(after)
    assert weights_in_order() == before
    with tuning.database.reading() as session:
        assert find_unreferenced(session, [before, after]) == []
    with tuning.database.writing() as session:
        assert run_jobs.drop_leftovers(session, tuning.run_id) == [before]
    with tuning.database.reading() as session:
        assert find_unreferenced(session, [before, after]) == [before]


def test_a_child_computes_on_as_many_threads_as_its_place_says(
    case: Case, send_from_child: SendFromChild, tmp_path: Path
) -> None:
    case.train = Train(case.store, replace(training_settings(tmp_path), threads=3))
    send_from_child(OUTCOME)
    case.do()
    assert (tmp_path / "threads").read_text() == "3"


def test_a_child_that_cannot_be_told_is_ended_all_the_same(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop, tmp_path: Path
) -> None:
    case.train = Train(case.store, training_settings(tmp_path), drain_within_s=0.5)
    send_from_child(PROGRESS, OUTCOME, apart_s=600.0)
    loop = start_loop(case.database, case.train)
    until(lambda: case.run().progress.get("stage") == "folds")
    loop.drain()
    loop.join(60)
    assert has_ended(loop)
    settled(case.database, case.job_id, JobState.QUEUED)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_folds_are_jobs_of_their_own_and_the_last_one_owes_the_final_one(
    tuning: Case, send_from_child: SendFromChild
) -> None:
    send_from_child(Prepared())
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FOLD, 0), (JobKind.FOLD, 1)]
    assert tuning.run().state is RunState.RUNNING
    send_from_child(tuning.checkpoint(0, 1), tuning.fold(0))
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FOLD, 1)]
    send_from_child(tuning.fold(1))
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FINAL, 0)]
    send_from_child(OUTCOME)
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [] and tuning.run().state is RunState.SUCCEEDED
    assert tuning.outbox_kinds() == ["started", "fold", "fold", "finished"]
    assert list(tuning.store.digests()) == []


def test_a_run_that_goes_on_owes_only_the_folds_that_are_left(tuning: Case, send_from_child: SendFromChild) -> None:
    with tuning.database.writing() as session:
        runs.add_fold(session, runs.Fold(run_id=tuning.run_id, number=0, outcome_sha256="ab", **FOLD))
    send_from_child(Prepared())
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FOLD, 1)]


def test_progress_of_folds_side_by_side_is_put_together(tuning: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Prepared())
    tuning.do()
    other = STATE.model_copy(update={"fold": 1, "share": 0.25, "spent_s": 1.0, "eta_s": 3.0})
    with tuning.database.writing() as session:
        job = records.claim_next(session, [Queue.CPU], "elsewhere")
        assert job is not None and job.index == 0
        session.get_one(Job, job.id).progress = {"writes": 1, "said": STATE.model_dump()}
    send_from_child(Progress(state=other), EXTRACTED)
    with claimed_work(tuning.database) as work, pytest.raises(Crashed, match="without a result"):
        tuning.train.run(work)
    progress = tuning.run().progress
    assert progress["fraction"] == pytest.approx(0.1 + 0.7 * (0.5 + 0.25) / 2)
    assert progress["fold"] == 1 and progress["eta_s"] == pytest.approx(3.0 + (2.0 + 4.0) / 2)


def test_a_fold_that_fails_ends_the_run_and_the_other_folds(
    tuning: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    send_from_child(Prepared())
    tuning.do()
    send_from_child(Failed.by(TrainingDiverged("no number")))
    start_loop(tuning.database, tuning.train, kind=JobKind.FOLD)
    with tuning.database.reading() as session:
        fold = session.scalars(select(Job.id).where(Job.kind == JobKind.FOLD, Job.index == 0)).one()
    settled(tuning.database, fold, JobState.FAILED)
    assert tuning.jobs(JobState.CANCELLED) == [(JobKind.FOLD, 1)]
    assert tuning.run().state is RunState.FAILED
    assert (tuning.run().error or {})["code"] == "training-diverged"
    assert tuning.outbox_kinds() == ["started", "finished"]


def test_a_fold_of_a_run_that_is_over_changes_nothing(tuning: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Prepared())
    tuning.do()
    kept = tuning.checkpoint(0, 1)
    send_from_child(kept, tuning.fold(0))
    with claimed_work(tuning.database) as work:
        complete = tuning.train.run(work)
        with tuning.database.writing() as session:
            other = session.scalars(select(Job).where(Job.kind == JobKind.FOLD, Job.index == 1)).one()
            assert run_jobs.mark_failed(session, other, {"code": "crashed", "detail": "elsewhere"})
        with tuning.database.writing() as session:
            complete(session)
    assert tuning.run().state is RunState.FAILED
    with tuning.database.reading() as session:
        assert list(runs.get_folds(session, tuning.run_id)) == []
    assert list(tuning.store.digests()) == [kept.sha256], "the fold goes on from it if the run is tried again"
    assert tuning.outbox_kinds() == ["started", "finished"]


def test_a_fold_of_an_attempt_that_was_given_up_has_lost_its_lease(
    tuning: Case, send_from_child: SendFromChild
) -> None:
    send_from_child(Prepared())
    tuning.do()
    with claimed_work(tuning.database) as work:
        send_from_child(Failed.by(OutOfMemory("too much")))
        loop = LocalWorker(tuning.database, Queue.CPU, dict.fromkeys(JobKind, tuning.train), "there", QUICK)
        assert loop.work()
        assert tuning.jobs(JobState.CANCELLED) == [(JobKind.FOLD, 0)], "its holder has not even noticed"
        with pytest.raises(Stopped):
            work.write(lambda session: None)
    send_from_child(Prepared())
    tuning.do()
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FOLD, 0), (JobKind.FOLD, 1)]


@pytest.mark.parametrize("last", ["prepared", "a fold", "the last fold"])
@ON_SQLITE
def test_a_run_that_is_cancelled_in_the_last_moment_of_a_part_ends(
    tuning: Case, send_from_child: SendFromChild, last: str
) -> None:
    send_from_child(Prepared())
    if last != "prepared":
        tuning.do()
        send_from_child(tuning.fold(0))
    if last == "the last fold":
        tuning.do()
        send_from_child(tuning.fold(1))
    with claimed_work(tuning.database) as work:
        complete = tuning.train.run(work)
        with tuning.database.writing() as session:
            assert not run_jobs.request_cancel(session, tuning.run_id), "somebody works on it"
        with tuning.database.writing() as session:
            complete(session)
            jobs.finish(session, work.lease, JobState.SUCCEEDED)
    assert tuning.jobs(JobState.QUEUED) == [] and tuning.run().state is RunState.CANCELLED
    assert tuning.outbox_kinds()[-1] == "finished" and list(tuning.store.digests()) == []


@pytest.mark.parametrize("is_better", [True, False])
def test_only_a_version_that_is_better_than_a_constant_answer_becomes_champion(
    case: Case, send_from_child: SendFromChild, is_better: bool
) -> None:
    send_from_child(OUTCOME.model_copy(update={"metrics": {"baseline": {"is_better": is_better}}}))
    case.do()
    with case.database.reading() as session:
        assert [alias for _, alias, _ in registry.get_all_aliases(session)] == ["champion"] * is_better


def test_a_run_whose_end_came_before_it_was_cancelled_has_succeeded(case: Case, send_from_child: SendFromChild) -> None:
    send_from_child(OUTCOME)
    with claimed_work(case.database) as work:
        complete = case.train.run(work)
        with case.database.writing() as session:
            run_jobs.request_cancel(session, case.run_id)
        with case.database.writing() as session:
            complete(session)
            jobs.finish(session, work.lease, JobState.SUCCEEDED)
    assert case.run().state is RunState.SUCCEEDED and case.outbox_kinds() == ["started", "finished"]


def test_a_run_that_is_cancelled_while_memory_runs_out_is_not_begun_anew(
    tuning: Case, send_from_child: SendFromChild
) -> None:
    def change(session: Session) -> None:
        run_jobs.request_cancel(session, tuning.run_id)
        assert run_jobs.restart_with_half_batch(session, session.get_one(Job, tuning.job_id)) is None

    with tuning.database.writing() as session:
        assert records.claim_next(session, [Queue.CPU], "here") is not None
    with tuning.database.writing() as session:
        change(session)
    assert tuning.run().batch_size is None and tuning.jobs(JobState.QUEUED) == []


def test_what_the_end_of_a_run_needs_is_kept_until_that_end_is_committed(
    tuning: Case, send_from_child: SendFromChild
) -> None:
    outcomes = [tuning.fold(number) for number in range(2)]
    send_from_child(Prepared())
    tuning.do()
    for outcome in outcomes:
        send_from_child(outcome)
        tuning.do()
    send_from_child(OUTCOME)

    def lose_the_connection(complete: Complete) -> None:
        with tuning.database.writing() as session:
            complete(session)
            raise Unavailable("The connection was cut before COMMIT.")

    with claimed_work(tuning.database) as work:
        complete = tuning.train.run(work)
        with pytest.raises(Unavailable):
            lose_the_connection(complete)
    assert set(tuning.store.digests()) == {ended.outcome for ended in outcomes}


def test_two_folds_that_end_at_once_owe_one_final_job(tuning: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Prepared())
    tuning.do()
    together = threading.Barrier(2)

    def end(number: int) -> None:
        with tuning.database.writing() as session:
            job = records.claim_next(session, [Queue.CPU], f"worker {number}")
            assert job is not None
        together.wait()
        message = tuning.fold(job.index)
        with tuning.database.writing() as session:
            jobs.hold(session, jobs.Lease(job.id, job.lease_epoch))
            tuning.train._complete(session, job, message)
            jobs.finish(session, jobs.Lease(job.id, job.lease_epoch), JobState.SUCCEEDED)

    threads = [threading.Thread(target=end, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.FINAL, 0)]


# --- memory ---------------------------------------------------------------------------------------------------------


def out_of_memory(case: Case, send_from_child: SendFromChild, times: int) -> None:
    """Have the run's next jobs run out of memory."""
    send_from_child(Failed.by(OutOfMemory("too much")))
    loop = LocalWorker(case.database, Queue.CPU, dict.fromkeys(JobKind, case.train), "here", QUICK)
    for _ in range(times):
        assert loop.work()


def test_a_run_that_runs_out_of_memory_is_tried_once_at_half_the_batch(
    case: Case, send_from_child: SendFromChild
) -> None:
    with case.database.writing() as session:
        runs.add_fold(session, runs.Fold(run_id=case.run_id, number=0, outcome_sha256="ab" * 32, **FOLD))
        runs.add_checkpoint(session, case.run_id, 1, 3, records.digest("checkpoint"), 9)
    out_of_memory(case, send_from_child, times=2)
    run = case.run()
    assert (run.state, run.batch_size) == (RunState.FAILED, run.recipe["batch_size"] // 2)
    assert (run.error or {})["code"] == "out-of-memory"
    states = [payload["state"] for kind, payload in case.events() if kind is EventKind.STATE]
    assert states == ["queued", "running", "queued", "running", "failed"]
    assert case.checkpoints() == {}, "what was trained with another batch does not count"
    with case.database.reading() as session:
        assert list(runs.get_folds(session, case.run_id)) == []


def test_a_fold_that_runs_out_of_memory_begins_the_whole_run_anew(tuning: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Prepared())
    tuning.do()
    with tuning.database.writing() as session:
        elsewhere = records.claim_next(session, [Queue.CPU], "elsewhere")
    assert elsewhere is not None and elsewhere.index == 0
    out_of_memory(tuning, send_from_child, times=1)
    run = tuning.run()
    assert (run.state, run.batch_size) == (RunState.QUEUED, run.recipe["batch_size"] // 2)
    assert tuning.jobs(JobState.QUEUED) == [(JobKind.TRAIN, 0)]

    def late(session: Session) -> None:
        tuning.train._complete(session, elsewhere, tuning.fold(0))
        tuning.train.cancelled(session, elsewhere)
        tuning.train.failed(session, elsewhere, OutOfMemory("too much, too late"))
        tuning.train.requeued(session, elsewhere, None)

    with tuning.database.writing() as session:
        late(session)
    assert tuning.run().state is RunState.QUEUED, "a fold of the attempt that was given up changes nothing"
    with tuning.database.reading() as session:
        assert list(runs.get_folds(session, tuning.run_id)) == []


# --- cut wires ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_commit_whose_answer_is_cut_off_is_written_once(tuning: Case, send_from_child: SendFromChild) -> None:
    with lost_commits(tuning.database) as (through, wire):
        loop = LocalWorker(through, Queue.CPU, dict.fromkeys(JobKind, tuning.train), "here", QUICK)

        def work() -> None:
            """Do the next job; a claim whose answer was cut off is held by nobody who knows, until it is taken over."""
            while True:
                try:
                    assert loop.work()
                except Unavailable:
                    if tuning.jobs(JobState.RUNNING):
                        assert sweep_twice(tuning.database, tuning.train) == 1
                else:
                    loop.runner.close()  # the child has finished its part and cannot do another one
                    return

        send_from_child(Prepared())
        work()
        for number in (0, 1):
            epochs = [EpochEnded(fold=number, epoch=epoch, metrics={}) for epoch in (1, 2)]
            send_from_child(*epochs, tuning.checkpoint(number, 1), tuning.fold(number))
            work()
        send_from_child(OUTCOME)
        work()
        assert wire.cuts > 5
    assert {kind for kind, _ in tuning.jobs(JobState.QUEUED)} <= {JobKind.PUBLISH} and not tuning.jobs(JobState.RUNNING)
    assert tuning.run().state is RunState.SUCCEEDED
    events = tuning.events()
    assert [payload["fold"] for kind, payload in events if kind is EventKind.FOLD] == [0, 1]
    assert [payload["epoch"] for kind, payload in events if kind is EventKind.EPOCH] == [1, 2, 1, 2]
    assert tuning.outbox_kinds().count("finished") == 1 and tuning.outbox_kinds().count("fold") == 2
    with tuning.database.reading() as session:
        assert records.count(session, ModelVersion) == 1
    assert list(tuning.store.digests()) == []
