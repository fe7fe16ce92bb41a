"""What every process checks before it starts: its settings, its data folder and its database.

What cannot be is told in one sentence with what to do about it, never by a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from artifacts.addresses import hide_password
from errors import EngineMissing, StoreRefused, Unavailable
from models.session import Database
from settings import Settings, variable_name

UMASK = 0o077


class CannotStart(Exception):
    """The process cannot start as it is configured. The message says why and what to do."""


@contextmanager
def exit_with_a_sentence() -> Iterator[None]:
    """End the process with status 1 and a sentence on standard error if the block finds that it cannot start."""
    try:
        yield
    except CannotStart as error:
        sys.exit(str(error))
    except (StoreRefused, EngineMissing) as error:
        sys.exit(error.detail)


def load_settings() -> Settings:
    """Return the settings of this process. Raises CannotStart with one line for each invalid setting."""
    try:
        return Settings()
    except ValidationError as error:
        raise CannotStart("\n".join(_sentence(item["loc"], item["msg"]) for item in error.errors())) from error


def load_settings_or_exit() -> Settings:
    """Return the settings of this process, or end it with a sentence."""
    try:
        return load_settings()
    except CannotStart as error:
        sys.exit(str(error))


def _sentence(location: tuple[int | str, ...], message: str) -> str:
    """Return what is wrong with a setting. Messages of our own validators begin with the name of the variable."""
    message = message.removeprefix("Value error, ")
    return f"{variable_name(str(location[0]))}: {message}" if location and "ESPALIER_" not in message else message


def prepare_folder(folder: Path) -> None:
    """Make the data folder if there is none; only this user may read what this process writes from now on.

    Raises CannotStart if the folder cannot be made or written to.
    """
    os.umask(UMASK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable_folder(folder, error.strerror or str(error)) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise unusable_folder(folder, "this user may not write to it")


def unusable_folder(folder: Path, reason: str) -> CannotStart:
    """Return the error for a data folder that cannot be used."""
    return CannotStart(f"The data folder {folder} cannot be used: {reason}. Set ESPALIER_VAR to a folder that you own.")


def open_database(settings: Settings, *, must_answer: bool = False) -> Database:
    """Return the database of the settings. Raises CannotStart if it cannot be opened.

    A server that is away may come back, so it only matters if the database `must_answer`. An SQLite file must always
    open.
    """
    try:
        database = Database(settings.database)
    except OSError as error:
        raise _unusable_database(settings, error) from error
    if must_answer or database.is_sqlite:
        try:
            database.ping()
        except (Unavailable, DBAPIError) as error:
            database.close()
            raise _unusable_database(settings, error.__cause__ or error) from error
    return database


@contextmanager
def database_must_answer(settings: Settings) -> Iterator[None]:
    """Raise CannotStart if the database does not answer, or refuses something, in the block."""
    try:
        yield
    except (Unavailable, DBAPIError) as error:
        raise _unusable_database(settings, error.__cause__ if isinstance(error, Unavailable) else error) from error


def _unusable_database(settings: Settings, cause: BaseException | None) -> CannotStart:
    told = cause.orig if isinstance(cause, DBAPIError) and cause.orig is not None else cause
    text = told.strerror if isinstance(told, OSError) and told.strerror else str(told).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(told).__name__
    if settings.database_url is None:
        remedy = "Set ESPALIER_VAR to a folder that you own."
    else:
        remedy = "Check DATABASE_URL, and that the database is running and writable."
    return CannotStart(
        f"The database {hide_password(settings.database)} cannot be used: {hide_password(reason)}. {remedy}"
    )
