"""A load generator: clients that each send a request, wait for the answer and send the next, over open connections.

All clients share one thread, which takes the least processor time from the server that is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Load:
    """The result of a load.

    Attributes:
        seconds: how long the load lasted.
        statuses: number of answers by HTTP status.
        broken: number of requests that ended without an answer.
        refused: number of connections that could not be opened.
        took_s: the seconds of each request with status 200.
        bodies: the bodies of all answers, if they are kept.
    """

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    refused: int = 0
    took_s: list[float] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Number of answers with status 200 per second."""
        return self.statuses[200] / self.seconds

    def figures(self) -> dict[str, float | dict[str, int]]:
        """Return the numbers for the report of a benchmark."""
        took_ms = 1000 * np.array(self.took_s or [float("nan")])
        return {
            "requests_per_s": round(self.per_second, 2),
            "median_ms": round(float(np.median(took_ms)), 1),
            "p95_ms": round(float(np.percentile(took_ms, 95)), 1),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "broken_connections": self.broken,
        }


def post(path: str, body: bytes, content_type: str = "application/octet-stream") -> bytes:
    """Return the bytes of a POST request."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def form(path: str, field_name: str, file: bytes) -> bytes:
    """Return the bytes of a POST request with one file in a multipart form."""
    edge = "4f1c2b7d9a"
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="{field_name}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return post(path, head.encode() + file + f"\r\n--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}")


def load(
    port: int,
    requests: Sequence[bytes],
    clients: int,
    seconds: float,
    *,
    keeps_bodies: bool = False,
    most: int = 10**9,
    patience_s: float = 120.0,
    per_second: float = float("inf"),
    is_over: Callable[[Load], bool] = lambda found: False,
) -> Load:
    """Send requests from several clients and return the statistics of their answers.

    Args:
        port: the server on this machine.
        requests: the requests, which are sent in turn.
        clients: number of clients.
        seconds: how long to send requests.
        keeps_bodies: whether to keep the bodies of the answers.
        most: number of requests after which to stop, even before `seconds` are over.
        patience_s: a request without an answer after this time counts as broken.
        per_second: rate at which requests are sent as long as a client is free, even if earlier requests are not
            answered yet. By default, every client sends its next request at once.
        is_over: called before each request; if it returns True, the load stops.
    """
    return asyncio.run(_load(port, requests, clients, seconds, keeps_bodies, most, patience_s, per_second, is_over))


async def _load(
    port: int,
    requests: Sequence[bytes],
    clients: int,
    seconds: float,
    keeps_bodies: bool,
    most: int,
    patience_s: float,
    per_second: float,
    is_over: Callable[[Load], bool],
) -> Load:
    found = Load()
    began = time.perf_counter()
    turn = iter(range(most))

    async def client() -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while time.perf_counter() < began + seconds and not is_over(found):
            number = next(turn, None)
            if number is None:
                break
            request = requests[number % len(requests)]
            await asyncio.sleep(began + number / per_second - time.perf_counter())
            sent = time.perf_counter()
            if streams is None:
                try:
                    streams = await asyncio.open_connection("127.0.0.1", port)
                except OSError:  # nothing was sent
                    found.refused += 1
                    await asyncio.sleep(0.05)
                    continue
            try:
                async with asyncio.timeout(patience_s):
                    status, body, closes = await _ask(*streams, request)
            except (OSError, asyncio.IncompleteReadError):  # a timeout is an OSError
                found.broken += 1
                streams = None
                await asyncio.sleep(0.01)
                continue
            found.statuses[status] += 1
            if status == 200:
                found.took_s.append(time.perf_counter() - sent)
            elif status == 503:
                await asyncio.sleep(0.05)  # like a client that obeys Retry-After, but sooner
            if keeps_bodies:
                found.bodies.append(body)
            if closes:
                streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()

    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds = time.perf_counter() - began
    return found


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes, bool]:
    """Return the status, the body, and whether the server closes the connection."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    if "chunked" in lines.get("transfer-encoding", ""):
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(lines["content-length"]))
    return int(head.split(" ", 2)[1]), body, lines.get("connection") == "close"
