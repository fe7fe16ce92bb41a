"""The HTTP connections of this process: how many there may be, and how long and how large what they send may be.

All that a client without a key can do happens here, so everything is bounded: connections by number (the longest idle
one is closed first, and file descriptors are kept back for the work of the others), heads and trailers by bytes, and
every wait for the client by time. Knows no route.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

import structlog
import uuid_utils
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from api import problems
from errors import AddressTooLong, EspalierError, HeadersTooLarge, RequestMalformed, RequestTimeout
from settings import Settings

# Bytes of a head or of trailers on the wire. The limits of `api.middleware` are smaller, but it sees only whole heads.
HEAD_BYTES = 64 * 1024
# Bytes of a body that must arrive within the setting `body_stall_s`.
BODY_STEP_BYTES = 4096
# Requests that one connection may send ahead of their answers. Browsers send none.
PIPELINED = 32
# Connections beyond the limit, so that probes are answered while all others are busy.
SPARE_CONNECTIONS = 16
# Descriptors for everything but connections: the database, stored files, libraries.
SPARE_DESCRIPTORS = 128
_LOG_EVERY_S = 10.0
_ACCEPTED_AT_ONCE = 32
_PAUSE_S = 0.05

log = structlog.get_logger()


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of one process: their number, and seconds to wait for a head and for more of a body."""

    connections: int
    head_s: float
    body_stall_s: float


def connection_limits(settings: Settings) -> ConnectionLimits:
    """Return the limits of the settings; fewer connections if the process may not open enough file descriptors.

    Each connection may need a second descriptor, for the file that it sends or receives.
    """
    descriptors = _raise_descriptor_limit()
    possible = max(SPARE_CONNECTIONS, (descriptors - SPARE_DESCRIPTORS) // 2)
    if possible < settings.connections:
        log.warning(
            "fewer connections than ESPALIER_CONNECTIONS; raise `ulimit -n`",
            connections=possible,
            descriptors=descriptors,
        )
    return ConnectionLimits(min(settings.connections, possible), settings.head_s, settings.body_stall_s)


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of file descriptors to the hard one, as far as the system allows, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 2**20


class Connections:
    """The open connections of one event loop.

    Attributes:
        limits: what they may do.
    """

    def __init__(self, limits: ConnectionLimits, count_closed: Callable[[str], None] = lambda reason: None) -> None:
        """`count_closed` is called with the reason for every connection that is closed for a limit."""
        self.limits = limits
        self._count_closed = count_closed
        self._open: set[BoundedProtocol] = set()
        self._arriving = 0
        self._idle: dict[BoundedProtocol, None] = {}  # the longest idle one first
        self._closed: Counter[str] = Counter()
        self._logged_at = float("-inf")

    def make_protocol(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> BoundedProtocol:
        """Return the protocol of one new connection; uvicorn's own protocols take the same arguments."""
        return BoundedProtocol(config=config, server_state=server_state, app_state=app_state, connections=self)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_crowded(self) -> bool:
        """Whether there are more than the limit, all of them busy, so that only probes are answered."""
        return len(self._open) > self.limits.connections

    def expect(self) -> None:
        """Count a connection that was accepted; `add` or `give_up` follows."""
        self._arriving += 1

    def give_up(self) -> None:
        """Forget a connection that was expected."""
        self._arriving -= 1

    def add(self, connection: BoundedProtocol) -> None:
        """Add a connection that was expected; it is idle."""
        self._arriving -= 1
        self._open.add(connection)
        self._idle[connection] = None

    def remove(self, connection: BoundedProtocol) -> None:
        """Remove a connection that is closed or is being closed; does nothing if that was done."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def mark(self, connection: BoundedProtocol, *, is_idle: bool) -> None:
        """Record whether a connection is idle, that is, whether none of its requests is being answered."""
        if not is_idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def make_room(self) -> bool:
        """Close the longest idle connections until one more fits; return False if there is no room for it."""
        while len(self._open) + self._arriving >= self.limits.connections and self._idle:
            self.abort(next(iter(self._idle)), "idle-for-longest")
        return len(self._open) + self._arriving < self.limits.connections + SPARE_CONNECTIONS

    def abort(self, connection: BoundedProtocol, reason: str) -> None:
        """Close a connection at once."""
        self.count(reason)
        self.remove(connection)
        connection.transport.abort()

    def count(self, reason: str) -> None:
        """Count a connection that is closed for a limit."""
        self._closed[reason] += 1
        self._count_closed(reason)

    def sweep(self, now: float) -> None:
        """Close the connections whose clients keep this process waiting too long; call it about once a second.

        `now` is the loop's time. Logs what was closed, at most every ten seconds.
        """
        for connection in list(self._open):
            connection.check(now)
        if self._closed and now >= self._logged_at + _LOG_EVERY_S:
            log.warning(
                "connections closed for a limit",
                **{reason.replace("-", "_"): number for reason, number in self._closed.items()},
                now_open=len(self._open),
                limit=self.limits.connections,
            )
            self._closed.clear()
            self._logged_at = now


class _Phase(Enum):
    HEAD = "head"
    BODY = "body"
    COMPLETE = "complete"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It counts what arrives through the callbacks of asyncio and of the parser.

    `phase` is how far the last request has been read; `due_at` is the loop's time until which more of it must arrive.
    """

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.registry = connections
        self.phase = _Phase.HEAD
        self.due_at: float | None = None
        self.refusal: EspalierError | None = None
        self.has_progress = False
        self.idle_bytes = 0  # received since the last head or byte of a body was complete
        self.url_bytes = self.head_bytes = 0
        self.body_bytes = 0
        self.write_paused_at: float | None = None
        self.closing_since: float | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request has no complete answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    # --- asyncio -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.due_at = self.loop.time() + self.registry.limits.head_s
        self.registry.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.registry.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.phase is _Phase.COMPLETE and not self.is_answering:
            self.expect_head()
        self.has_progress = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        self.idle_bytes = 0 if self.has_progress else self.idle_bytes + len(data)
        if self.idle_bytes > HEAD_BYTES:
            self.refuse(self.too_large())
        self.registry.mark(self, is_idle=not self.is_answering)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_paused_at = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.write_paused_at = None

    # --- the parser ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.url_bytes = self.head_bytes = self.body_bytes = 0
        if self.phase is not _Phase.HEAD:
            self.expect_head()

    def on_url(self, url: bytes) -> None:
        self.url_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_bytes += len(name) + len(value) + len(b": \r\n")
        if self.head_bytes > HEAD_BYTES:
            self.refusal = self.too_large()
            raise self.refusal
        if self.phase is _Phase.HEAD:  # else a trailer, which must not change the headers of its request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self.refusal = RequestMalformed(
                f"Expected at most {PIPELINED} requests ahead of their answers. Received more. Wait for the answers."
            )
            raise self.refusal
        super().on_headers_complete()
        self.has_progress = True
        self.phase = _Phase.BODY
        self.due_at = self.loop.time() + self.registry.limits.body_stall_s

    def on_body(self, body: bytes) -> None:
        self.has_progress = True
        before, self.body_bytes = self.body_bytes, self.body_bytes + len(body)
        if before // BODY_STEP_BYTES != self.body_bytes // BODY_STEP_BYTES and self.is_answering:
            self.due_at = self.loop.time() + self.registry.limits.body_stall_s
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.has_progress = True
        self.phase = _Phase.COMPLETE
        self.due_at = None
        super().on_message_complete()

    # --- uvicorn ---------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.phase is _Phase.BODY and not self.is_answering:  # nobody will read the rest
            self.due_at = self.loop.time() + self.registry.limits.head_s
        self.registry.mark(self, is_idle=not self.is_answering)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser or a callback above refused."""
        self.refuse(self.refusal or RequestMalformed("Expected a request of HTTP/1.1. Received something else."))

    # --- limits ----------------------------------------------------------------------------------------------------

    def expect_head(self) -> None:
        """Wait for the next head."""
        self.phase = _Phase.HEAD
        self.due_at = self.loop.time() + self.registry.limits.head_s
        self.idle_bytes = 0

    def too_large(self) -> EspalierError:
        """Return the error for a head, or for trailers, above the limit."""
        if self.url_bytes > HEAD_BYTES:
            return AddressTooLong(f"Expected a URL of at most {HEAD_BYTES} bytes. Received a longer one.")
        return HeadersTooLarge(f"Expected headers of at most {HEAD_BYTES} bytes together. Received more.")

    def refuse(self, error: EspalierError) -> None:
        """Answer with a problem if no answer has begun, and close the connection."""
        self.registry.count(error.code)
        if self.is_answering and (self.cycle.response_started or self.phase is not _Phase.BODY or self.pipeline):
            self.registry.remove(self)
            self.transport.abort()
            return
        self.transport.write(_raw_answer(error))
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client keeps it waiting too long."""
        limits = self.registry.limits
        if self.transport.is_closing():  # the client does not read the end of what was written
            self.closing_since = now if self.closing_since is None else self.closing_since
            if now > self.closing_since + limits.body_stall_s:
                self.registry.abort(self, "unread-answer")
        elif self.write_paused_at is not None and now > self.write_paused_at + limits.body_stall_s:
            self.registry.abort(self, "unread-answer")
        elif self.due_at is None or now <= self.due_at:
            pass
        elif self.flow.read_paused:  # not the client is slow, but this process
            self.due_at = now + limits.body_stall_s
        elif self.phase is _Phase.BODY and self.is_answering:
            self.refuse(
                RequestTimeout(
                    f"Expected the end of the body, or {BODY_STEP_BYTES} more bytes of it, within "
                    f"{limits.body_stall_s:g} s. Received {self.body_bytes} bytes in all. Send the request again."
                )
            )
        elif self.phase is _Phase.HEAD and self.url_bytes and not self.is_answering:
            self.refuse(
                RequestTimeout(f"Expected all headers of the request within {limits.head_s:g} s. Received a part.")
            )
        else:
            self.registry.abort(self, "silent" if self.phase is _Phase.HEAD else "unread-body")


class Acceptor:
    """Accepts the connections of one listening socket while there is room for them."""

    def __init__(
        self, listening: socket.socket, connections: Connections, make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        """Start to accept, in the running event loop."""
        self.listening = listening
        self._connections = connections
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._arriving: set[asyncio.Task[object]] = set()
        listening.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stop accepting, and close the socket."""
        self._loop.remove_reader(self.listening)
        self.listening.close()

    def _resume(self) -> None:
        if self.listening.fileno() >= 0:
            self._loop.add_reader(self.listening, self._accept)

    def _pause(self) -> None:
        """Leave new connections in the backlog for a moment."""
        self._loop.remove_reader(self.listening)
        self._loop.call_later(_PAUSE_S, self._resume)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            if not self._connections.make_room():
                self._connections.count("no-room")
                self._pause()
                return
            try:
                accepted, _address = self.listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept a connection", error=str(error), now_open=len(self._connections))
                self._pause()
                return
            accepted.setblocking(False)
            self._connections.expect()
            arriving = self._loop.create_task(self._connect(accepted))
            self._arriving.add(arriving)
            arriving.add_done_callback(self._arriving.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, accepted)
        except OSError:  # the client is gone
            self._connections.give_up()
            accepted.close()


def listen(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Return a listening socket for each address of the host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
    return [socket.create_server(address[:2], family=family, backlog=backlog) for family, address in addresses]


def _raw_answer(error: EspalierError) -> bytes:
    """Return a whole answer with a problem, for a request that never reached the application."""
    request_id = uuid_utils.uuid7().hex
    answer = problems.response(error, request_id)
    lines = [f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}".encode()]
    lines += [name + b": " + value for name, value in answer.raw_headers]
    lines += [b"x-request-id: " + request_id.encode(), b"connection: close", b"", bytes(answer.body)]
    return b"\r\n".join(lines)
