"""The worker's side of views: what the child makes of a finished run, and what becomes of its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import sample
from buckets import EACH_STORE_SLOWLY
from networks import layered
from PIL import Image
from records import PRINCIPAL
from safetensors.numpy import save as save_tensors
from sqlalchemy import select
from waiting import until
from working import SendFromChild, StartLoop, claimed_work, look, settled

from artifacts import manifest
from artifacts.bundle import Bundle, Dense
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.manifest import Row
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store, digest_of
from errors import Crashed
from models import dataset as datasets
from models import job as jobs
from models import registry
from models import run as runs
from models import view as views
from models.dataset import DatasetVersion
from models.job import JobKind, JobState, Queue
from models.outbox import Outbox
from models.run import Run
from models.session import Database
from models.view import View, ViewKind, ViewState
from recipes.layers import Activation
from recipes.recipe import Precision, Recipe, Resize, Task
from worker.handlers.ingest import Purge
from worker.handlers.view import ComputeView
from worker.messages import Failed, ViewOutcome, ViewProgress

IMAGES = 48
RECIPE = {
    "backbone": "vgg16",
    "weights": "random",
    "features_from": "block5",
    "image_size": 32,
    "epochs": 2,
    "task": "binary",
    "folds": {"k": 2},
}


@dataclass
class Case:
    """A finished run on red and blue images that has answered each of them wrongly."""

    database: Database
    store: Store
    features: Path
    run_id: str
    images: list[Digest]

    @property
    def handler(self) -> ComputeView:
        return ComputeView(self.store, str(self.features), ImageLimits(), 1)

    def ask(self, kind: ViewKind, key: str = "") -> tuple[str, str]:
        """Ask for a view; return it and its job."""
        with self.database.writing() as session:
            view, job = views.request_view(session, session.get_one(Run, self.run_id), kind, key)
            assert job is not None
            return view.id, job.id

    def view(self, view_id: str) -> View | None:
        with self.database.reading() as session:
            return session.get(View, view_id)

    def content(self, view_id: str) -> bytes:
        view = self.view(view_id)
        assert view is not None and view.sha256 is not None, view
        return self.store.read(Digest(view.sha256))


@pytest.fixture
def case(sqlite: Database, store: Store, tmp_path: Path) -> Case:
    colours = ((200, 50, 40), (40, 60, 200))
    images = [store.put(sample.png(number, colours[number % 2], side=8)) for number in range(IMAGES)]
    network = store.put(layered())
    layer = Dense(np.zeros((4, 1), np.float32), np.zeros(1, np.float32), Activation.LINEAR)
    bundle = Bundle(
        task=Task.BINARY,
        labels=("blue", "red"),
        backbone=network,
        engine="openvino",
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=8,
        resize=Resize.SQUASH,
        layers=(layer,),
        golden_input=np.zeros((1, 8, 8, 3), np.uint8),
        golden_output=np.zeros((1, 1), np.float32),
    )
    folds = (np.arange(IMAGES, dtype=np.int16) % 4 // 2)[None]
    logits = np.where(np.arange(IMAGES) % 2 == 0, -2.0, 2.0).astype(np.float32)[None, :, None]
    accepted = [records.accepted(f"{number:02}.png", label=("red", "blue")[number % 2]) for number in range(IMAGES)]
    rows = [
        Row(one.row.path, image, one.row.labels, None, None, one.row.split)
        for one, image in zip(accepted, images, strict=True)
    ]
    with sqlite.writing() as session:
        version = records.ready_version(session)
        version.manifest_sha256 = store.put(manifest.dump(rows))
        version.classes = [{"name": name, "images": IMAGES // 2, "groups": IMAGES // 2} for name in ("blue", "red")]
        recipe = Recipe.model_validate(RECIPE).model_copy(update={"task": Task.BINARY})
        run = runs.create_run(session, PRINCIPAL, version.id, "colours", recipe)
        runs.start_run(session, run.id)
        runs.succeed_run(session, run.id, {"accuracy": 1.0}, 1.0)
        file = store.put(save_tensors({"folds": folds, "logits": logits}))
        runs.add_artifact(session, run.id, RunFile.OUT_OF_FOLD, file, 1, "application/octet-stream")
        registry.add_model_version(session, PRINCIPAL, "colours", run.id, store.put(bundle.dump()), network)
        return Case(sqlite, store, tmp_path / "features", run.id, images)


@EACH_STORE_SLOWLY
def test_the_child_lists_layers_and_draws_what_one_makes_of_an_image(case: Case, start_loop: StartLoop) -> None:
    start_loop(case.database, case.handler, kind=JobKind.VIEW, queue=Queue.INGEST)
    layers, job = case.ask(ViewKind.LAYERS)
    settled(case.database, job, JobState.SUCCEEDED, within_s=180)
    assert json.loads(case.content(layers)) == [
        {"name": "first", "height": 8, "width": 8, "channels": 4},
        {"name": "pool", "height": 4, "width": 4, "channels": 4},
    ]
    picture, job = case.ask(ViewKind.ACTIVATIONS, views.activations_key(case.images[0], "pool"))
    settled(case.database, job, JobState.SUCCEEDED, within_s=180)
    view = case.view(picture)
    assert view is not None and (view.state, view.progress, view.error) == (ViewState.SUCCEEDED, None, None)
    data = case.content(picture)
    assert len(data) == view.size_bytes
    sheet = Image.open(BytesIO(data))
    assert sheet.format == "PNG" and sheet.size == (2 * 98, 2 * 130)


@pytest.mark.slow
def test_the_child_measures_a_learning_curve(case: Case, start_loop: StartLoop) -> None:
    start_loop(case.database, case.handler, kind=JobKind.VIEW)
    view_id, job = case.ask(ViewKind.LEARNING_CURVE)
    settled(case.database, job, JobState.SUCCEEDED, within_s=300)
    curve = json.loads(case.content(view_id))
    assert [point["images"] for point in curve["points"]] == [2, 4, 10, 16, 24]
    assert curve["metric"] == "accuracy" and curve["points"][-1]["score"] == 0.0, "which the run itself has measured"
    assert curve["points"][-2]["score"] == 1.0, "the colours are easily told apart"
    assert curve["law"] is not None and curve["twice"]["images"] == 48 and curve["sentence"]
    with case.database.reading() as session:
        files = {file.name: file for file in runs.get_artifacts(session, case.run_id)}
        picture = case.store.read(Digest(files[RunFile.LEARNING_CURVE].sha256))
        assert Image.open(BytesIO(picture)).format == "PNG" and files[RunFile.LEARNING_CURVE].size_bytes == len(picture)
        assert [(row.kind, row.payload) for row in session.scalars(select(Outbox))] == [
            ("file", {"name": RunFile.LEARNING_CURVE})
        ]


def progress(fraction: float) -> ViewProgress:
    return ViewProgress(fraction=fraction, eta_s=3.0)


def outcome(case: Case) -> ViewOutcome:
    return ViewOutcome(file=case.store.put(b"curve"), picture=case.store.put(b"picture"))


def test_progress_is_told_while_the_child_works_and_cancelling_stops_it(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    send_from_child(progress(0.25), outcome(case), apart_s=600.0)
    view_id, job = case.ask(ViewKind.LEARNING_CURVE)
    start_loop(case.database, case.handler, kind=JobKind.VIEW)
    settled(case.database, job, JobState.RUNNING)

    def shown() -> Any:
        view = case.view(view_id)
        return view and view.progress

    until(lambda: shown() == {"fraction": 0.25, "eta_s": 3.0})
    with case.database.writing() as session:
        views.request_cancel(session, [session.get_one(Run, case.run_id).dataset_version_id])
    settled(case.database, job, JobState.CANCELLED)
    assert case.view(view_id) is None


def test_a_child_that_failed_is_told_and_the_next_one_may_succeed(
    case: Case, send_from_child: SendFromChild, start_loop: StartLoop
) -> None:
    error = {"code": "training-diverged", "detail": "The loss is no longer a number."}
    send_from_child(Failed(error=error))
    view_id, job = case.ask(ViewKind.LEARNING_CURVE)
    start_loop(case.database, case.handler, kind=JobKind.VIEW)
    settled(case.database, job, JobState.FAILED)
    view = case.view(view_id)
    assert view is not None and (view.state, view.error) == (ViewState.FAILED, error)
    with case.database.writing() as session:
        assert views.pop_failure(session, view_id) == error
    send_from_child(progress(0.5), outcome(case))
    again, job = case.ask(ViewKind.LEARNING_CURVE)
    settled(case.database, job, JobState.SUCCEEDED)
    assert case.content(again) == b"curve"


def test_a_view_whose_worker_was_lost_waits_again(case: Case, send_from_child: SendFromChild) -> None:
    send_from_child(progress(0.5), outcome(case))
    view_id, job = case.ask(ViewKind.LEARNING_CURVE)
    with claimed_work(case.database) as work:
        case.handler.run(work)
        with case.database.writing() as session:
            jobs.give_back(session, work.lease)
            case.handler.requeued(session, work.job, None)
    view = case.view(view_id)
    assert view is not None and (view.state, view.progress) == (ViewState.QUEUED, None)
    assert look(case.database, job).state is JobState.QUEUED


def test_what_was_removed_with_another_view_that_was_the_same_is_put_anew(
    case: Case, send_from_child: SendFromChild
) -> None:
    message = outcome(case)
    send_from_child(message)
    view_id, _ = case.ask(ViewKind.LEARNING_CURVE)
    with claimed_work(case.database) as work:
        complete = case.handler.run(work)
        case.store.delete(message.file, message.picture)
        work.write(complete)
    assert case.content(view_id) == b"curve" and case.store.has(message.picture)


def test_a_view_that_nobody_wants_any_more_leaves_no_files(case: Case, send_from_child: SendFromChild) -> None:
    message = outcome(case)
    send_from_child(message)
    view_id, _ = case.ask(ViewKind.LEARNING_CURVE)
    with claimed_work(case.database) as work:
        complete = case.handler.run(work)
        with case.database.writing() as session:
            views.cancel_view(session, view_id)
        work.write(complete)
        assert not case.store.has(message.file) and not case.store.has(message.picture)
    with case.database.reading() as session:
        assert RunFile.LEARNING_CURVE not in {file.name for file in runs.get_artifacts(session, case.run_id)}
        assert records.count(session, Outbox) == 0


def test_a_view_that_was_given_up_before_starts_no_child(case: Case, send_from_child: SendFromChild) -> None:
    send_from_child(Failed.by(Crashed("It died.")))
    view_id, _ = case.ask(ViewKind.LAYERS)
    with case.database.writing() as session:
        views.cancel_view(session, view_id)
    with claimed_work(case.database) as work:
        case.handler.run(work)


def test_deleting_a_data_set_takes_its_pictures_along_and_leaves_the_numbers(case: Case, start_loop: StartLoop) -> None:
    shared = case.store.put(b"seen by two runs")
    kept = {}
    for number, (kind, file) in enumerate(((ViewKind.ACTIVATIONS, b"picture"), (ViewKind.LEARNING_CURVE, b"curve"))):
        view_id, job = case.ask(kind, str(number) if kind.shows_images else "")
        kept[kind] = case.store.put(file)
        with case.database.writing() as session:
            records.job_of(session, view_id).state = JobState.SUCCEEDED
            views.succeed_view(session, view_id, kept[kind], 1)
    with case.database.writing() as session:
        runs.add_artifact(session, case.run_id, "other.png", shared, 1, "image/png")
        again = views.request_view(session, session.get_one(Run, case.run_id), ViewKind.ACTIVATIONS, "shared")[0]
        records.job_of(session, again.id).state = JobState.SUCCEEDED
        views.succeed_view(session, again.id, shared, 1)
        dataset = records.dataset_of(session, session.scalars(select(DatasetVersion)).one())
        datasets.delete_dataset(dataset)
        job = jobs.add_job(session, dataset.project_id, JobKind.PURGE, Queue.INGEST, dataset.id).id
    start_loop(case.database, Purge(case.store), kind=JobKind.PURGE, queue=Queue.INGEST)
    settled(case.database, job, JobState.SUCCEEDED)
    with case.database.reading() as session:
        assert [view.kind for view in views.get_views(session, case.run_id)] == [ViewKind.LEARNING_CURVE]
    assert not case.store.has(kept[ViewKind.ACTIVATIONS])
    assert case.store.has(kept[ViewKind.LEARNING_CURVE]) and case.store.has(shared)
    assert not case.store.has(digest_of(b"picture"))
