from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from buckets import EACH_STORE
from records import PRINCIPAL
from sqlalchemy import String, delete, select, update
from sqlalchemy.orm import Session

from artifacts.store import Digest, Store
from models import comparison as comparisons
from models import dataset as datasets
from models import registry
from models import run as runs
from models import view as views
from models.base import Base
from models.comparison import Comparison
from models.dataset import DatasetVersion, Membership
from models.file_references import (
    delete_unreferenced_after_commit,
    lock_files,
    referenced_files,
    try_delete_unreferenced,
)
from models.registry import Backbone, ModelVersion, QuantisedBackbone, Weights
from models.run import Checkpoint, Fold
from models.session import Database
from models.view import View, ViewKind
from recipes.catalogue import BackboneName


def name_all(session: Session, store: Store) -> dict[str, Digest]:
    """Reference one stored file from every column that can reference a file; return the files by column."""
    files = {}

    def stored(column: str) -> Digest:
        files[column] = store.put(column.encode())
        return files[column]

    version = records.ready_version(session)
    datasets.add_images(session, PRINCIPAL.project_id, version.id, [records.accepted("a.png", "image.sha256")])
    assert stored("image.sha256") == records.digest("image.sha256")
    session.execute(update(DatasetVersion).values(manifest_sha256=stored("dataset_version.manifest_sha256")))
    waiting = datasets.add_version(
        session, records.dataset_of(session, version), stored("dataset_version.archive_sha256")
    )
    assert waiting.number == 2
    run = records.running_run(session, version)
    run.weights_sha256 = stored("run.weights_sha256")
    run.quantised_sha256 = stored("run.quantised_sha256")
    runs.succeed_run(session, run.id, {}, 1.0)
    view, _ = views.request_view(session, run, ViewKind.LEARNING_CURVE)
    views.succeed_view(session, view.id, stored("view.sha256"), 1)
    runs.add_artifact(session, run.id, "report.json", stored("run_artifact.sha256"), 1, "application/json")
    runs.add_fold(session, records.fold(run.id, outcome_sha256=stored("fold.outcome_sha256")))
    runs.add_checkpoint(session, run.id, 0, 1, stored("checkpoint.sha256"), 1)
    bundle, own_backbone = stored("model_version.bundle_sha256"), stored("model_version.backbone_sha256")
    registry.add_model_version(session, PRINCIPAL, "flowers", run.id, bundle, own_backbone)
    comparison = records.queued_comparison(session, version)
    picture, report = stored("comparison.picture_sha256"), stored("comparison.report_sha256")
    for compared in comparisons.get_runs(session, comparison.id):
        runs.fail_run(session, compared.id, {})
    assert comparisons.succeed_comparison(session, comparison.id, {"rows": []}, picture, report)
    backbone = Backbone(
        sha256=stored("backbone.sha256"),
        network=BackboneName.VGG16,
        weights_sha256=records.digest("weights that were built in and are not kept"),
        cut="block5",
        size=224,
        export_version=1,
        manifest={},
    )
    registry.add_backbone(session, backbone)
    registry.add_quantised_backbone(session, records.digest("export"), 1, stored("quantised.sha256"), {})
    weights = Weights(network=BackboneName.VGG16, name="mine", sha256=stored("weights.sha256"), source={})
    registry.set_weights(session, weights)
    return files


@EACH_STORE
def test_files_are_kept_while_any_row_names_them_and_removed_after(database: Database, store: Store) -> None:
    with database.writing() as session:
        files = name_all(session, store)
    unnamed = store.put(b"nobody names this")
    untouched = store.put(b"nobody asks about this")
    asked = [*files.values(), unnamed, records.digest("never stored")]
    with database.writing() as session:
        try_delete_unreferenced(session, store, asked)
        assert referenced_files(session) == {*files.values(), records.digest("archive of flowers")}
    assert [column for column, file in files.items() if not store.has(file)] == []
    assert not store.has(unnamed) and store.has(untouched)
    with database.writing() as session:
        for record in (
            Weights,
            Backbone,
            QuantisedBackbone,
            registry.Alias,
            ModelVersion,
            runs.RunArtifact,
            View,
            Fold,
            Checkpoint,
            Membership,
        ):
            session.execute(delete(record))
        session.execute(delete(datasets.Image))
        session.execute(update(runs.Run).values(weights_sha256=None, quantised_sha256=None))
        session.execute(update(Comparison).values(picture_sha256=None, report_sha256=None))
        session.execute(update(DatasetVersion).values(manifest_sha256=None, archive_sha256=None))
        try_delete_unreferenced(session, store, asked)
    assert [column for column, file in files.items() if store.has(file)] == []


def test_every_column_that_names_a_file_was_tried(database: Database, store: Store) -> None:
    columns = {
        f"{owner.name}.{column.name}"
        for owner in Base.metadata.sorted_tables
        for column in owner.columns
        if column.name.endswith("sha256") and isinstance(column.type, String)
    }
    with database.writing() as session:
        # What a network was made from may go: it is kept itself.
        assert name_all(session, store).keys() == columns - {"backbone.weights_sha256", "quantised.backbone_sha256"}


def test_a_row_of_the_same_transaction_counts(database: Database, store: Store) -> None:
    file = store.put(b"weights")
    with database.writing() as session:
        session.add(Weights(network=BackboneName.VGG16, name="mine", sha256=file, source={}))
        try_delete_unreferenced(session, store, [file])
    assert store.has(file)


def test_a_file_is_not_removed_before_its_name_is_gone_for_good(database: Database, store: Store) -> None:
    file = store.put(b"weights")
    with database.writing() as session:
        session.add(Weights(network=BackboneName.VGG16, name="mine", sha256=file, source={}))

    def forget(error: Exception | None) -> None:
        with database.writing() as session:
            session.execute(delete(Weights))
            delete_unreferenced_after_commit(session, store, [file])
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match="half way"):
        forget(RuntimeError("half way"))
    assert store.has(file)
    forget(None)
    assert not store.has(file)


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_file_that_is_just_being_named_is_not_removed(database: Database, store: Store) -> None:
    file = store.put(b"image")
    asking = threading.Event()

    def remove() -> None:
        with database.writing() as session:
            session.execute(select(1))
            asking.set()
            try_delete_unreferenced(session, store, [file])

    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        lock_files(session)
        session.add(Weights(network=BackboneName.VGG16, name="mine", sha256=file, source={}))
        session.flush()
        removed = pool.submit(remove)
        asking.wait()
        with pytest.raises(TimeoutError):  # it waits for the lock
            removed.result(timeout=0.3)
        session.commit()
        removed.result(timeout=120)
    assert store.has(file)
