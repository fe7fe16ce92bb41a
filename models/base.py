"""What all records share: naming of constraints, ids, and column types that mean the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

import uuid_utils
from sqlalchemy import JSON, DateTime, Dialect, Enum, MetaData, TypeDecorator
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase

wall_clock: ContextVar[Callable[[], datetime]] = ContextVar("wall_clock", default=lambda: datetime.now(UTC))
"""What `now` reads: a simulation gives each of its machines a clock of its own."""

NO_KEY_UPDATE = {"key_share": True}
"""`FOR NO KEY UPDATE`: a row is held to be changed, not deleted; others may still add rows that name it (outbox)."""

Json = JSON().with_variant(JSONB(), "postgresql")


class Utc(TypeDecorator[datetime]):
    """A moment in UTC. SQLite drops zones, so values are made aware again when read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("Expected a moment with a time zone. Received a naive one. This is a bug.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def text_enum(kind: type[StrEnum]) -> Enum:
    """Return a column type for `kind`: its values as text, with a CHECK."""
    return Enum(
        kind,
        native_enum=False,
        create_constraint=True,
        length=32,
        name=kind.__name__.lower(),
        values_callable=lambda members: [member.value for member in members],
    )


class Base(DeclarativeBase):
    """The root of all records."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: Utc(), dict[str, Any]: Json, list[Any]: Json}


def new_id(prefix: str) -> str:
    """Return a new id such as `run_0199…`: a UUIDv7, so that ids sort by time of creation."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def now() -> datetime:
    """Return the present moment in UTC: for display, and for guesses which workers are there.

    Who holds a job never hangs on it.
    """
    return wall_clock.get()()
