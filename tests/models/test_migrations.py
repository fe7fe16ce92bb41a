from __future__ import annotations

from dataclasses import replace

import pytest
import records
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

import models.all  # noqa: F401 - every record, so that the comparison is complete
from models import comparison as comparisons
from models import job as jobs
from models import view as views
from models.base import Base
from models.dataset import DatasetVersion
from models.job import Job, JobKind, Queue
from models.outbox import Outbox, add_to_outbox
from models.project import DEFAULT_PROJECT, Project
from models.registry import RegistryRevision
from models.run import Run
from models.session import Database
from models.view import ViewKind
from ops.migrate import downgrade, upgrade


def test_up_down_up_ends_where_the_records_are(empty_database: Database) -> None:
    upgrade(empty_database)
    downgrade(empty_database)
    assert inspect(empty_database.engine).get_table_names() == ["alembic_version"]
    upgrade(empty_database)
    with empty_database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []


def test_an_older_schema_knows_no_comparisons_and_keeps_all_else(database: Database) -> None:
    with database.writing() as session:
        version = records.ready_version(session)
        comparison = records.queued_comparison(session, version)
        run_id = comparisons.get_runs(session, comparison.id)[0].id
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.COMPARE, Queue.CPU, comparison.id)
        add_to_outbox(session, run_id, "comparison", {})
        add_to_outbox(session, run_id, "finished", {})
    downgrade(database, "0001")
    assert not {"comparison", "comparison_run"} & set(inspect(database.engine).get_table_names())
    with database.reading() as session:
        assert session.scalars(select(Job.kind)).all() == [JobKind.TRAIN, JobKind.TRAIN]
        assert session.scalars(select(Outbox.kind)).all() == ["finished"]
    with pytest.raises(IntegrityError, match="ck_job_jobkind"), database.writing() as session:
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.COMPARE, Queue.CPU, "cmp_1")
    upgrade(database)
    with database.writing() as session:
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.COMPARE, Queue.CPU, "cmp_1")


def test_a_schema_without_views_keeps_all_else(database: Database) -> None:
    with database.writing() as session:
        run = records.queued_run(session, records.ready_version(session))
        views.request_view(session, run, ViewKind.LEARNING_CURVE)
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.FOLD, Queue.CPU, run.id)
        add_to_outbox(session, run.id, "file", {"name": "learning-curve.png"})
        add_to_outbox(session, run.id, "finished", {})
        run.features_choice = {"weights": "0" * 64}
    downgrade(database, "0005")
    assert "view" not in inspect(database.engine).get_table_names()
    with database.reading() as session:
        assert session.scalars(select(Job.kind)).all() == [JobKind.FOLD]
        assert session.scalars(select(Outbox.kind)).all() == ["finished"]
    with pytest.raises(IntegrityError, match="ck_job_jobkind"), database.writing() as session:
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.VIEW, Queue.CPU, "view_1")
    upgrade(database)
    with database.writing() as session:
        again = session.get_one(Run, run.id)
        assert again.features_choice is None and again.recipe == run.recipe
        views.request_view(session, again, ViewKind.LEARNING_CURVE)


def test_a_version_from_before_bit_depths_has_16_bits_if_its_images_may_have_them(database: Database) -> None:
    png = records.accepted("1.png")
    jpeg = replace(records.accepted("1.jpg"), facts=replace(png.facts, format="JPEG"))
    with database.writing() as session:
        ids = [records.ready_version(session, image.row.path, [image]).id for image in (png, jpeg)]
    downgrade(database, "0009")
    upgrade(database)
    with database.reading() as session:
        assert [session.get_one(DatasetVersion, version_id).bit_depth for version_id in ids] == [16, None]


@pytest.mark.parametrize(("column", "value"), [("kind", "dance"), ("queue", "dance"), ("state", "dance")])
def test_a_job_table_that_was_written_anew_still_checks_its_values(database: Database, column: str, value: str) -> None:
    with database.writing() as session:
        job_id = jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.TRAIN, Queue.CPU, "run_1").id
    with pytest.raises(IntegrityError), database.writing() as session:
        session.execute(text(f"UPDATE job SET {column} = '{value}' WHERE id = '{job_id}'"))
    with pytest.raises(IntegrityError), database.writing() as session:
        jobs.add_job(session, records.PRINCIPAL.project_id, JobKind.TRAIN, Queue.CPU, "run_1")


def test_a_new_database_has_its_default_project_and_a_revision(database: Database) -> None:
    with database.reading() as session:
        assert session.scalars(select(Project.id)).all() == [DEFAULT_PROJECT]
        assert session.scalars(select(RegistryRevision.revision)).all() == [0]
