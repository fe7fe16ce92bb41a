"""Alembic's entry point, which runs migrations and compares the database with the records of `models/`.

It uses the connection of its caller, if there is one, and otherwise the database of the settings.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON, Connection

from models.base import Base, Utc
from models.session import Database
from settings import Settings


def render_type(kind: str, item: Any, autogenerate: AutogenContext) -> str | Literal[False]:
    """Render the column types of `models/` as plain SQLAlchemy types in a new migration.

    So an old migration stays the same if `models/` changes.
    """
    if kind == "type" and isinstance(item, Utc):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):
        autogenerate.imports.add("from sqlalchemy.dialects.postgresql import JSONB")
        return 'sa.JSON().with_variant(JSONB(), "postgresql")'
    return False


def migrate(connection: Connection) -> None:
    """Run the pending migrations on this connection, in its transaction."""
    context.configure(
        connection=connection, target_metadata=Base.metadata, render_as_batch=True, render_item=render_type
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with Database(Settings().database).engine.begin() as own:
        migrate(own)
