from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
import records
from sqlalchemy import Enum, func, select, table, text, update
from sqlalchemy.exc import IntegrityError, StatementError

from models import job as jobs
from models import registry
from models import view as views
from models.base import Base, new_id
from models.dataset import Dataset
from models.job import JobKind, Queue
from models.registry import Backbone, Weights
from models.session import Database
from models.view import ViewKind
from recipes.catalogue import BackboneName

NOON_IN_ROME = datetime(2024, 7, 1, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=2)))


def test_a_moment_of_any_zone_comes_back_in_utc(database: Database) -> None:
    with database.writing() as session:
        dataset_id = records.ready_version(session).dataset_id
        session.execute(update(Dataset).values(created_at=NOON_IN_ROME))
    with database.reading() as session:
        dataset = session.get_one(Dataset, dataset_id)
        assert dataset.created_at == NOON_IN_ROME
        assert dataset.created_at.tzinfo is UTC
        assert dataset.deleted_at is None


def test_a_moment_without_a_zone_is_refused(database: Database) -> None:
    with pytest.raises(StatementError, match="Received one without"), database.writing() as session:
        session.execute(update(Dataset).values(created_at=datetime(2024, 7, 1)))


def test_moments_are_compared_across_zones(database: Database) -> None:
    with database.writing() as session:
        records.ready_version(session)
        session.execute(update(Dataset).values(created_at=NOON_IN_ROME))
    with database.reading() as session:
        later = NOON_IN_ROME.astimezone(timezone(timedelta(hours=-8))) + timedelta(microseconds=1)
        assert session.scalar(select(Dataset.id).where(Dataset.created_at < later)) is not None
        assert session.scalar(select(Dataset.id).where(Dataset.created_at >= later)) is None


def test_no_enum_column_takes_another_word(database: Database) -> None:
    columns = [
        (owner.name, column.name)
        for owner in Base.metadata.sorted_tables
        for column in owner.columns
        if isinstance(column.type, Enum)
    ]
    assert len(columns) == 13
    with database.writing() as session:
        version = records.ready_version(session, images=[records.accepted("daisy/1.png")])
        run = records.queued_run(session, version)
        jobs.add_job(session, run.project_id, JobKind.TRAIN, Queue.CPU, run.id)
        records.queued_comparison(session, version)
        views.request_view(session, run, ViewKind.LAYERS)
        registry.set_weights(
            session, Weights(network=BackboneName.VGG16, name="mine", sha256=records.digest("weights"), source={})
        )
        backbone = Backbone(
            sha256=records.digest("backbone"),
            network=BackboneName.VGG16,
            weights_sha256=records.digest("weights"),
            cut="block5",
            size=32,
            export_version=1,
            manifest={},
        )
        registry.add_backbone(session, backbone)
    for owner, column in columns:
        with database.reading() as session:
            assert session.scalar(select(func.count()).select_from(table(owner))), f"{owner} has no row to try"
        with pytest.raises(IntegrityError), database.writing() as session:
            session.execute(text(f'UPDATE "{owner}" SET "{column}" = \'purple\''))


def test_ids_say_what_they_name_and_sort_by_creation() -> None:
    ids = [new_id("run") for _ in range(1000)]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert all(one.startswith("run_") and len(one) <= 40 for one in ids)
