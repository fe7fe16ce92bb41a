"""The base class of all records, their ids, and column types that work on both SQLite and PostgreSQL."""

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
"""The clock that `now` reads. A simulation sets a different clock for each simulated machine."""

NO_KEY_UPDATE = {"key_share": True}
"""Arguments of `with_for_update` for a lock that still lets other transactions insert rows referencing the locked row.

PostgreSQL calls it `FOR NO KEY UPDATE`. Rows of the outbox, for example, reference a run.
"""

Json = JSON().with_variant(JSONB(), "postgresql")


class Utc(TypeDecorator[datetime]):
    """A column for a time in UTC. SQLite does not store time zones, so UTC is added when a value is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("Expected a datetime with a time zone. Received one without. This is a bug.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def text_enum(kind: type[StrEnum]) -> Enum:
    """Return a column type that stores the values of the enum `kind` as text, with a CHECK constraint."""
    return Enum(
        kind,
        native_enum=False,
        create_constraint=True,
        length=32,
        name=kind.__name__.lower(),
        values_callable=lambda members: [member.value for member in members],
    )


class Base(DeclarativeBase):
    """Base class of all records, with naming conventions for constraints."""

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
    """Return a new id such as `run_0199…`. It contains a UUIDv7, so ids sort by the time of their creation."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def now() -> datetime:
    """Return the current time in UTC. It is used for display, and to estimate which workers are alive.

    Leases of jobs never depend on this time, since the clocks of two machines may differ.
    """
    return wall_clock.get()()
