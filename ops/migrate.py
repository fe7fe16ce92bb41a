"""Migrates the database to the newest schema. Run as `python -m ops.migrate`, before other processes start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from models.session import Database
from settings import Settings
from startup import CannotStart, database_must_answer, exit_with_a_sentence, load_settings, open_database

_SCRIPTS = Path(__file__).parent.parent / "migrations"


def upgrade(database: Database, revision: str = "head") -> None:
    """Run the migrations up to `revision`, by default all of them."""
    with database.engine.begin() as connection:
        command.upgrade(_config(connection), revision)


def downgrade(database: Database, revision: str = "base") -> None:
    """Undo the migrations down to `revision`, by default all of them."""
    with database.engine.begin() as connection:
        command.downgrade(_config(connection), revision)


def open_migrated(settings: Settings) -> Database:
    """Return the database of the settings with the newest schema. Raises CannotStart if that cannot be."""
    database = open_database(settings, must_answer=True)
    try:
        with database_must_answer(settings):
            upgrade(database)
    except CommandError as error:
        database.close()
        raise CannotStart(
            f"The schema of the database is not one of this version of Espalier: {error}. Start the version that used "
            "the database last, or restore a backup."
        ) from error
    except CannotStart:
        database.close()
        raise
    return database


def _config(connection: object) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def main() -> None:
    """Run all migrations on the database that is named in the settings."""
    with exit_with_a_sentence():
        open_migrated(load_settings()).close()


if __name__ == "__main__":
    main()
