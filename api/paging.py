"""Key-set pagination: a cursor is the last key of a page, so that new rows never shift one."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlalchemy import ColumnElement, Select, SQLColumnExpression
from sqlalchemy.orm import Session

from api.problems import short_repr
from errors import RequestInvalid

Row = TypeVar("Row")

LimitQuery = Annotated[int, Query(ge=1, le=200, description="Items in one answer.")]
CursorQuery = Annotated[str | None, Query(description="`next_cursor` of the answer before.")]


def page(
    session: Session,
    query: Select[*tuple[Any, ...]],
    key: SQLColumnExpression[str],
    of: Callable[[Any], str],
    limit: int,
    cursor: str | None,
    *,
    ascending: bool = False,
) -> tuple[Sequence[Any], str | None]:
    """Return one page of `query` by a unique key, and the cursor of the next page or None.

    Args:
        session: an open transaction.
        query: what to list, without order.
        key: the column to page by, the newest first unless `ascending`.
        of: the key of a row.
        limit: rows of a page.
        cursor: where the page before ended; none, or an empty one, asks for the first page.
        ascending: whether keys grow from page to page.

    Raises:
        RequestInvalid: the cursor is none of ours.
    """
    if cursor:
        after = _decode(cursor)
        beyond: ColumnElement[bool] = key > after if ascending else key < after
        query = query.where(beyond)
    rows = session.execute(query.order_by(key if ascending else key.desc()).limit(limit + 1)).all()
    more = len(rows) > limit
    return rows[:limit], _encode(of(rows[limit - 1])) if more else None


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _decode(cursor: str) -> str:
    try:
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError) as error:
        raise _not_ours(cursor) from error
    if "\0" in key:
        raise _not_ours(cursor)
    return key


def _not_ours(cursor: str) -> RequestInvalid:
    return RequestInvalid(f"cursor: expected a next_cursor. Received {short_repr(cursor)}.", field="cursor")
