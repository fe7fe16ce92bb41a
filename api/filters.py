"""Filters of lists over HTTP: query parameters that several lists have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Query
from sqlalchemy.orm import Session

from api.problems import short_repr
from api.schemas import Id, Name
from errors import RequestInvalid
from models import dataset as datasets
from models.project import Principal

DatasetQuery = Annotated[Id | None, Query(description="Id of a data set, which may be deleted.")]
NameQuery = Annotated[Name | None, Query()]


def filtered_versions(session: Session, principal: Principal, dataset: str | None) -> Sequence[str] | None:
    """Return the ids of the versions of the data set in a filter; None without a filter.

    Raises RequestInvalid if no data set ever had this id.
    """
    if dataset is None:
        return None
    versions = datasets.find_versions(session, principal, dataset)
    if not versions:
        raise RequestInvalid(
            f"dataset: Expected the id of a data set. Received {short_repr(dataset)}, which no data set has. "
            "GET /api/v1/datasets lists all data sets.",
            field="dataset",
        )
    return versions
