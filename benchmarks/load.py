"""A load generator: clients that each send a request, wait for its answer and send the next, over open connections.

A process of its own would only take the processors from the server it measures all the same; one thread for all
clients takes the least.
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
    """What came of it: answers by status, how long those with 200 took, and how many requests lost their connection."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    refused: int = 0
    took_s: list[float] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Answers with 200, a second."""
        return self.statuses[200] / self.seconds

    def figures(self) -> dict[str, float | dict[str, int]]:
        """Return what is told of it."""
        took_ms = 1000 * np.array(self.took_s or [float("nan")])
        return {
            "requests_per_s": round(self.per_second, 2),
            "median_ms": round(float(np.median(took_ms)), 1),
            "p95_ms": round(float(np.percentile(took_ms, 95)), 1),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "broken_connections": self.broken,
        }


def post(path: str, body: bytes, content_type: str = "application/octet-stream") -> bytes:
    """Return a POST as it goes over the wire."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def form(path: str, field_name: str, file: bytes) -> bytes:
    """Return a POST of one file in a multipart form."""
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
    """Send requests in turn from so many clients, for so long, until so many were sent, or until it is over.

    One that has no answer after `patience_s` counts as broken. With `per_second` they are sent at that rate whatever
    comes of those before, as long as a client is free.
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
                await asyncio.sleep(0.05)  # as a client that was told to come back, only impatient
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
