"""Calls an ASGI application directly, so that a test can end a request in the middle of its body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.testclient import TestClient


def ask(client: TestClient, method: str, path: str, receive: Callable[[], Awaitable[Any]]) -> tuple[int, Any]:
    """Send a request and return its status and JSON body, or None if there is no body.

    `receive` returns the ASGI messages of the request, one per call.
    """
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
