"""Asks an application as a server does, for what no client of tests can do: to stop in the middle of a body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.testclient import TestClient


def ask(client: TestClient, method: str, path: str, receive: Callable[[], Awaitable[Any]]) -> tuple[int, Any]:
    """Return the status and the JSON of an answer, None if it has no body; `receive` yields the ASGI messages."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    where, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": where,
        "raw_path": where.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000")],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(client.app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return int(sent[0]["status"]), json.loads(body) if body else None
