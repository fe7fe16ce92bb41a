from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select

import models.job
import models.reference  # noqa: F401
from models.base import Base
from models.project import DEFAULT_PROJECT, Project
from models.registry import RegistryRevision
from models.session import Database
from ops.migrate import downgrade, upgrade


def test_up_down_up_ends_where_the_records_are(empty_database: Database) -> None:
    upgrade(empty_database)
    downgrade(empty_database)
    assert inspect(empty_database.engine).get_table_names() == ["alembic_version"]
    upgrade(empty_database)
    with empty_database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_new_database_has_its_default_project_and_a_revision(database: Database) -> None:
    with database.reading() as session:
        assert session.scalars(select(Project.id)).all() == [DEFAULT_PROJECT]
        assert session.scalars(select(RegistryRevision.revision)).all() == [0]
