"""Projects, which own all records. There is one today; a column in every owned record allows more without migration."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, ForeignKey, String
from sqlalchemy.orm import InstrumentedAttribute, Mapped, mapped_column

from models.base import Base, now

DEFAULT_PROJECT = "prj_default"


class Project(Base):
    """A namespace for data sets, runs and models."""

    __tablename__ = "project"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


@dataclass(frozen=True)
class Principal:
    """The sender of a request, and the project it may see."""

    project_id: str = DEFAULT_PROJECT


def owner(*, primary_key: bool = False) -> Mapped[str]:
    """Return the foreign key column of a record's project."""
    return mapped_column(ForeignKey("project.id"), index=not primary_key, primary_key=primary_key)


def scope(project_id: InstrumentedAttribute[str], principal: Principal) -> ColumnElement[bool]:
    """Return the condition that limits a query to the project of the principal."""
    return project_id == principal.project_id
