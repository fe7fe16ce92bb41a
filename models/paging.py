"""Key-set pages of queries: a page continues after the last key of the page before, so new rows never shift it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, SQLColumnExpression
from sqlalchemy.orm import Session

Row = TypeVar("Row")


@dataclass(frozen=True)
class PageRequest:
    """At most `limit` rows, from the first one or after the key `after`."""

    limit: int
    after: str | None = None


@dataclass(frozen=True)
class RowPage(Generic[Row]):
    """Rows of one page, and the key that the next page continues after; None on the last page."""

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
        key: a unique column to order by; the newest come first unless `ascending`.
        key_of: returns the key of a result row.
        request: how many rows, and where to continue.
        ascending: whether keys grow from page to page.
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
    """Return one page of a query for one kind of record that has an `id`, the newest first."""
    page = fetch_page(session, query, key, lambda row: str(row[0].id), request)
    return RowPage([row[0] for row in page.rows], page.next_after)
