"""Pages of query results. Each page starts after the last key of the page before, so new rows never shift a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, SQLColumnExpression
from sqlalchemy.orm import Session

Row = TypeVar("Row")


@dataclass(frozen=True)
class PageRequest:
    """The part of a list to return: at most `limit` rows, after the row with the key `after`, or from the first row."""

    limit: int
    after: str | None = None


@dataclass(frozen=True)
class RowPage(Generic[Row]):
    """The rows of one page. `next_after` is the `after` of the next page, None on the last page."""

    rows: Sequence[Row]
    next_after: str | None


def fetch_page(
    session: Session,
    query: Select[*tuple[Any, ...]],
    key: SQLColumnExpression[str],
    key_of: Callable[[Any], str],
    request: PageRequest,
    *,
    ascending: bool = False,
) -> RowPage[Any]:
    """Return one page of a query.

    Args:
        session: an open transaction.
        query: what to list, without an order.
        key: a unique column that determines the order, descending unless `ascending`.
        key_of: returns the key of a result row.
        request: how many rows to return, and after which key.
        ascending: whether the smallest key comes first.
    """
    if request.after is not None:
        beyond: ColumnElement[bool] = key > request.after if ascending else key < request.after
        query = query.where(beyond)
    found = session.execute(query.order_by(key if ascending else key.desc()).limit(request.limit + 1)).all()
    rows = found[: request.limit]
    return RowPage(rows, key_of(rows[-1]) if len(found) > request.limit else None)


def fetch_records(
    session: Session, query: Select[Any], key: SQLColumnExpression[str], request: PageRequest
) -> RowPage[Any]:
    """Return one page of a query for records with an `id`, the newest first."""
    page = fetch_page(session, query, key, lambda row: str(row[0].id), request)
    return RowPage([row[0] for row in page.rows], page.next_after)
