"""The revision of the database schema: which one is applied, and which one this code needs. Migrates nothing."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session


def needed_revision() -> str | None:
    """Return the newest revision among the migrations of this code."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    return ScriptDirectory.from_config(config).get_current_head()


def applied_revision(session: Session) -> str | None:
    """Return the revision that the database is at; None if it was never migrated."""
    return MigrationContext.configure(session.connection()).get_current_revision()
