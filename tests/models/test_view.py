from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import records
from records import digest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from artifacts.store import Store
from errors import NotReady
from models import dataset as datasets
from models import job as jobs
from models import run as runs
from models import view as views
from models.dataset import DatasetVersion
from models.file_references import referenced_files
from models.job import Job, JobKind, JobState, Queue
from models.run import Run
from models.session import Database
from models.view import View, ViewKind, ViewState

ERROR = {"code": "crashed", "detail": "It died."}
KEY = views.activations_key(digest("image"), "block1_conv1")


def finished_run(database: Database) -> str:
    with database.writing() as session:
        run = records.running_run(session, records.ready_version(session))
        return runs.succeed_run(session, run.id, {}, 1.0).id


def ask(database: Database, run_id: str, kind: ViewKind = ViewKind.ACTIVATIONS, key: str = KEY) -> tuple[str, bool]:
    """Request a view; return the view, and whether it has an unfinished job."""
    with database.writing() as session:
        view, job = views.request_view(session, session.get_one(Run, run_id), kind, key)
        return view.id, job is not None


def look(database: Database, view_id: str) -> View | None:
    with database.reading() as session:
        return session.get(View, view_id)


def delete(database: Database) -> None:
    """Delete the data set, as its route does."""
    with database.writing() as session:
        version = session.scalars(select(DatasetVersion)).one()
        views.request_cancel(session, [version.id])
        datasets.delete_dataset(records.dataset_of(session, version))


def test_a_view_is_made_before_a_run_that_waited_longer(database: Database) -> None:
    with database.writing() as session:
        run = records.running_run(session, records.ready_version(session))
        older = jobs.add_job(session, run.project_id, JobKind.TRAIN, ViewKind.LEARNING_CURVE.queue, run.id)
        run_id = runs.succeed_run(session, run.id, {}, 1.0).id
    view_id, _ = ask(database, run_id, ViewKind.LEARNING_CURVE, "")
    with database.writing() as session:
        claimed = [records.claim_next(session, [ViewKind.LEARNING_CURVE.queue], "here") for _ in range(2)]
        assert [job.subject_id for job in claimed if job] == [view_id, older.subject_id]


def test_whoever_asks_first_owes_the_job_and_all_others_find_the_view(database: Database) -> None:
    run_id = finished_run(database)
    view_id, has_unfinished = ask(database, run_id)
    assert has_unfinished and ask(database, run_id) == (view_id, False)
    curve_id, has_unfinished = ask(database, run_id, ViewKind.LEARNING_CURVE, "")
    other_id, _ = ask(database, run_id, key=views.activations_key(digest("other"), "block1_conv1"))
    assert has_unfinished and len({view_id, curve_id, other_id}) == 3
    with database.reading() as session:
        found = [records.job_of(session, subject) for subject in (view_id, curve_id)]
        assert [(job.kind, job.queue) for job in found] == [(JobKind.VIEW, Queue.INGEST), (JobKind.VIEW, Queue.CPU)]
        view = views.find_view(session, run_id, ViewKind.ACTIVATIONS, KEY)
        assert view is not None and (view.id, view.state) == (view_id, ViewState.QUEUED)
        assert views.image_and_layer(view) == (digest("image"), "block1_conv1")
        assert views.find_view(session, run_id, ViewKind.LAYERS) is None


def test_many_who_ask_at_the_same_moment_owe_one_job(database: Database) -> None:
    run_id = finished_run(database)
    together = threading.Barrier(6)

    def first(number: int) -> bool:
        together.wait()
        return ask(database, run_id)[1]

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(first, range(6))) == [False] * 5 + [True]
    with database.reading() as session:
        assert (records.count(session, View), len(session.scalars(select(Job)).all())) == (1, 1)


def test_a_view_is_kept_once_for_its_run_kind_and_key(database: Database) -> None:
    run_id = finished_run(database)
    ask(database, run_id)
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(View(run_id=run_id, kind=ViewKind.ACTIVATIONS, key=KEY))


def test_a_view_goes_from_queued_to_succeeded_with_its_file(database: Database) -> None:
    view_id, _ = ask(database, finished_run(database))
    with database.writing() as session:
        view = views.start_view(session, view_id)
        assert view is not None and view.state is ViewState.RUNNING
        views.set_progress(session, view_id, {"fraction": 0.5, "eta_s": 3.0})
    shown = look(database, view_id)
    assert shown is not None and shown.progress == {"fraction": 0.5, "eta_s": 3.0}
    with database.writing() as session:
        views.requeue_view(session, view_id)
    shown = look(database, view_id)
    assert shown is not None and (shown.state, shown.progress) == (ViewState.QUEUED, None)
    with database.writing() as session:
        views.start_view(session, view_id)
        assert views.succeed_view(session, view_id, digest("picture"), 7) is not None
    shown = look(database, view_id)
    assert shown is not None and (shown.state, shown.sha256, shown.size_bytes) == ("succeeded", digest("picture"), 7)
    assert shown.finished_at is not None
    with database.reading() as session:
        assert digest("picture") in referenced_files(session)


def test_a_failure_is_told_once_and_whoever_asks_again_begins_anew(database: Database) -> None:
    run_id = finished_run(database)
    view_id, _ = ask(database, run_id)
    with database.writing() as session:
        records.job_of(session, view_id).state = JobState.FAILED
        views.fail_view(session, view_id, ERROR)
    assert ask(database, run_id) == (view_id, False), "it is there until it was told"
    with database.writing() as session:
        assert views.pop_failure(session, view_id) == ERROR
    with database.writing() as session:
        assert views.pop_failure(session, view_id) is None
    again_id, has_unfinished = ask(database, run_id)
    assert has_unfinished and again_id != view_id
    with database.writing() as session:
        assert views.pop_failure(session, again_id) is None, "it has not failed"


def test_what_is_being_computed_from_deleted_images_ends_and_what_needs_none_goes_on(database: Database) -> None:
    run_id = finished_run(database)
    waiting, _ = ask(database, run_id)
    running, _ = ask(database, run_id, ViewKind.LEARNING_CURVE, "")
    layers, _ = ask(database, run_id, ViewKind.LAYERS, "")
    with database.writing() as session:
        records.job_of(session, running).state = JobState.RUNNING
        views.start_view(session, running)
    delete(database)
    assert look(database, waiting) is None
    with database.writing() as session:
        assert records.job_of(session, waiting).state is JobState.CANCELLED
        assert jobs.is_cancel_requested(session, records.job_of(session, running).id)
        assert records.job_of(session, layers).cancel_requested_at is None
        views.cancel_view(session, running)
    assert look(database, running) is None and look(database, layers) is not None
    for kind, key in ((ViewKind.ACTIVATIONS, KEY), (ViewKind.LEARNING_CURVE, "")):
        with pytest.raises(NotReady, match="and its images were deleted"):
            ask(database, run_id, kind, key)


def test_a_picture_that_comes_after_its_data_set_was_deleted_is_not_kept(database: Database) -> None:
    run_id = finished_run(database)
    picture, _ = ask(database, run_id)
    curve, _ = ask(database, run_id, ViewKind.LEARNING_CURVE, "")
    with database.writing() as session:
        for view_id in (picture, curve):
            records.job_of(session, view_id).state = JobState.RUNNING
            views.start_view(session, view_id)
    delete(database)
    with database.writing() as session:
        assert views.succeed_view(session, picture, digest("picture"), 7) is None
        assert views.succeed_view(session, curve, digest("curve"), 7) is not None, "numbers stay, as a report does"
    assert look(database, picture) is None


def test_what_nobody_wants_any_more_changes_nothing(database: Database) -> None:
    with database.writing() as session:
        assert (
            views.start_view(session, "view_none") is None
            and views.succeed_view(session, "view_none", digest("x"), 1) is None
        )
        views.set_progress(session, "view_none", {})
        views.requeue_view(session, "view_none")
        views.fail_view(session, "view_none", ERROR)
        views.cancel_view(session, "view_none")


def test_pictures_go_with_the_images_they_show_and_curves_stay(database: Database, tmp_path: Path) -> None:
    run_id = finished_run(database)
    store = Store(tmp_path / "store")
    files = {}
    for number in range(5):
        key = views.activations_key(digest(str(number)), "block1_conv1")
        files[key] = store.put(key.encode())
    asked = [ask(database, run_id, key=key)[0] for key in files] + [
        ask(database, run_id, ViewKind.LEARNING_CURVE, "")[0]
    ]
    with database.writing() as session:
        for view_id, file in zip(asked, [*files.values(), digest("curve")], strict=True):
            views.succeed_view(session, view_id, file, 1)
        version = session.scalars(select(DatasetVersion)).one()
        assert views.drop_pictures(session, ["dsv_other"], 10) == (0, [])
        assert views.drop_pictures(session, [version.id], 3) == (3, list(files.values())[:3])
        assert views.drop_pictures(session, [version.id], 3) == (2, list(files.values())[3:])
        assert [view.kind for view in views.get_views(session, run_id)] == [ViewKind.LEARNING_CURVE]
        assert not set(files.values()) & referenced_files(session) and digest("curve") in referenced_files(session)
