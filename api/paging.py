"""Pages of lists over HTTP: the query parameters, and opaque cursors, so that clients do not depend on keys."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from api.problems import short_repr
from api.schemas import Page
from errors import RequestInvalid
from models.paging import PageRequest

Item = TypeVar("Item")

LimitQuery = Annotated[int, Query(ge=1, le=200, description="Maximum number of items in the answer.")]
CursorQuery = Annotated[str | None, Query(description="The `next_cursor` of the previous page.")]


def page_request(limit: int, cursor: str | None) -> PageRequest:
    """Return the page that a client asks for. Without a cursor, or with an empty one, this is the first page.

    Raises RequestInvalid if the cursor was not made by `next_cursor`.
    """
    return PageRequest(limit, _decode(cursor) if cursor else None)


def next_cursor(after: str | None) -> str | None:
    """Return the cursor of the page that starts after the key `after`. On the last page both are None."""
    return None if after is None else base64.urlsafe_b64encode(after.encode()).decode().rstrip("=")


def page_of(items: Sequence[Item], key_of: Callable[[Item], str], limit: int, cursor: str | None) -> Page[Item]:
    """Return one page of a short list that was read as a whole. `key_of` returns the unique key of an item.

    Raises RequestInvalid if the cursor was not made by `next_cursor`, or if its item is gone.
    """
    start = 0
    if cursor:
        keys = [key_of(item) for item in items]
        after = _decode(cursor)
        if after not in keys:
            raise _invalid(cursor)
        start = keys.index(after) + 1
    shown = list(items[start : start + limit])
    return Page(items=shown, next_cursor=next_cursor(key_of(shown[-1])) if start + limit < len(items) else None)


def _decode(cursor: str) -> str:
    try:
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError) as error:
        raise _invalid(cursor) from error
    if "\0" in key:
        raise _invalid(cursor)
    return key


def _invalid(cursor: str) -> RequestInvalid:
    return RequestInvalid(
        f"cursor: Expected the next_cursor of an answer. Received {short_repr(cursor)}.", field="cursor"
    )
