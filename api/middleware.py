"""The middleware around every request: request id, size limits, allowed hosts, API key, metrics. Knows no route.

A page of any web site can make a browser send requests to a service on loopback that needs no key. Two checks prevent
this. The Host header must be allowed, which stops foreign DNS names that point to this machine. And if a request of a
browser changes something, it must come from a page of this service.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import structlog
import uuid_utils
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import problems
from api.connections import Connections
from api.key_guard import KeyGuard
from api.metrics import Metrics
from errors import AddressTooLong, EspalierError, Forbidden, HeadersTooLarge, Overloaded, RequestInvalid

URL_BYTES = 8 * 1024
HEADER_BYTES = 16 * 1024

# These paths need no API key: probes, and the documentation, which contains only public information.
PUBLIC_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json", "/swagger/", "/favicon.ico")
_SAFE = ("GET", "HEAD", "OPTIONS")

log = structlog.get_logger()


class ShutdownState:
    """Whether this process is about to end.

    If so, every answer closes its connection, so that clients reconnect to another process.
    """

    is_draining = False


class RequestMiddleware:
    """The outermost middleware. Refuses requests before they reach a route, and counts all answers."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str],
        api_key: str | None,
        metrics: Metrics,
        shutdown: ShutdownState,
        connections: Connections,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._guard = KeyGuard(api_key) if api_key is not None else None
        self._metrics = metrics
        self._shutdown = shutdown
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid_utils.uuid7().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500
        asked = scope["method"]
        is_bare = False  # whether the answer has no body
        if asked == "HEAD":  # answered as GET without its body; the server's own scope stays HEAD
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_bare
            if is_bare:
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if _is_known(scope, message["status"], headers):
                    message["status"] = 304
                    del headers["content-length"], headers["content-type"]
                status = message["status"]
                is_bare = asked == "HEAD" or status == 304
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if self._shutdown.is_draining or self._connections.is_crowded:
                    headers["Connection"] = "close"
            await send(message)
            if is_bare:
                await send({"type": "http.response.body", "body": b""})

        try:
            with structlog.contextvars.bound_contextvars(request=request_id):
                refusal = self._refusal(scope)
                if refusal is not None:
                    await problems.response(refusal, request_id)(scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count_request(asked, route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> EspalierError | None:
        """Return the error with which to refuse a request, or None to pass the request on."""
        headers = Headers(scope=scope)
        url_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        if url_bytes > URL_BYTES:
            return AddressTooLong(f"The URL has {url_bytes} bytes; the limit is {URL_BYTES} bytes.")
        header_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if header_bytes > HEADER_BYTES:
            return HeadersTooLarge(f"The request headers have {header_bytes} bytes; the limit is {HEADER_BYTES} bytes.")
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # PostgreSQL refuses NUL in text
            return RequestInvalid("The URL contains a NUL character (%00), which no name or id may contain.")
        host = headers.get("host", "")
        if "*" not in self._hosts and _without_port(host) not in self._hosts:
            return Forbidden(
                f"Expected a Host header with {' or '.join(self._hosts)}. Received {host!r}. If the service has this "
                "name, add it to ESPALIER_ALLOWED_HOSTS."
            )
        if scope["method"] not in _SAFE and _is_cross_site(headers, host):
            return Forbidden("The browser sent this request from a page of another web site, which is not allowed.")
        refusal = self._key_refusal(scope, headers)
        scope["state"]["may_see_details"] = refusal is None
        if scope["path"].startswith(PUBLIC_PATHS):
            return None
        if refusal is not None:
            return refusal
        if self._connections.is_crowded:
            limit = self._connections.limits.connections
            return Overloaded(
                f"All {limit} connections that the API may keep open are busy. Try again soon, or raise "
                "ESPALIER_CONNECTIONS."
            )
        return None

    def _key_refusal(self, scope: Scope, headers: Headers) -> EspalierError | None:
        """Return why the key of a request is refused, or None if it is right or none is needed."""
        if self._guard is None:
            return None
        host, _ = scope.get("client") or ("", 0)
        return self._guard.check(headers.get("authorization", ""), host)


def _is_known(scope: Scope, status: int, headers: MutableHeaders) -> bool:
    """Return whether the client already has this answer: its ETag is in If-None-Match (RFC 9110, 13.1.2)."""
    sent = Headers(scope=scope).get("if-none-match")
    tag = headers.get("etag")
    if sent is None or tag is None or status not in (200, 206) or scope["method"] != "GET":
        return False
    return sent.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in sent.split(",")]


def _without_port(host: str) -> str:
    """Return the host name in a Host header, without the port. An IPv6 address keeps its brackets."""
    name, separator, port = host.rpartition(":")
    return name if separator and port.isdigit() and not name.endswith(":") else host


def _is_cross_site(headers: Headers, host: str) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != host
