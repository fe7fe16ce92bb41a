"""The schema revision of the database, and the revision that this code needs. Migrates nothing."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session


def needed_revision() -> str | None:
    """Return the schema revision that this code needs: the newest one in `migrations/`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    return ScriptDirectory.from_config(config).get_current_head()


def applied_revision(session: Session) -> str | None:
    """Return the schema revision of the database, or None if no migration was ever run on it."""
    return MigrationContext.configure(session.connection()).get_current_revision()
