"""Projects, which own all other records. There is only one project today.

Every owned record has a column for its project, so that more projects need no change of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, ForeignKey, String
from sqlalchemy.orm import InstrumentedAttribute, Mapped, mapped_column

from models.base import Base, now

DEFAULT_PROJECT = "prj_default"


class Project(Base):
    """A project: a namespace for data sets, runs and models."""

    __tablename__ = "project"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


@dataclass(frozen=True)
class Principal:
    """Who sends a request; `project_id` is the only project whose records the request may see."""

    project_id: str = DEFAULT_PROJECT


def owner(*, primary_key: bool = False) -> Mapped[str]:
    """Return a foreign key column for the project that owns a record."""
    return mapped_column(ForeignKey("project.id"), index=not primary_key, primary_key=primary_key)


def scope(project_id: InstrumentedAttribute[str], principal: Principal) -> ColumnElement[bool]:
    """Return the SQL condition that limits a query to the records of the principal's project."""
    return project_id == principal.project_id
