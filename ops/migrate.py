"""Migrates the database to the newest schema. Run as `python -m ops.migrate`, before other processes start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from models.session import Database
from settings import Settings

_SCRIPTS = Path(__file__).parent.parent / "migrations"


def upgrade(database: Database, revision: str = "head") -> None:
    """Run the migrations up to `revision`, by default all of them."""
    with database.engine.begin() as connection:
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str = "base") -> None:
    """Undo the migrations down to `revision`, by default all of them."""
    with database.engine.begin() as connection:
        command.downgrade(_config(connection), revision)


def _config(connection: object) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def main() -> None:
    """Run all migrations on the database that is named in the settings."""
    database = Database(Settings().database)
    upgrade(database)
    database.close()


if __name__ == "__main__":
    main()
