"""What clients do to connections of a real server, through sockets: too much, too many, too slowly, or nothing."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn
from waiting import until

from api.app import DrainingServer, create_app
from api.connections import HEAD_BYTES, PIPELINED, SPARE_CONNECTIONS
from settings import Settings

POST = b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\n"
Serve = Callable[..., "Client"]


class Client:
    """Opens connections to one server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.opened = ExitStack()

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = self.opened.enter_context(socket.create_connection(self.address, timeout=60))
        connection.sendall(sent)
        return connection

    def get(self, path: str) -> int:
        asking = http.client.HTTPConnection(*self.address, timeout=60)
        asking.request("GET", path)
        status = asking.getresponse().status
        asking.close()
        return status


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that the server sends until it closes the connection."""
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
    except ConnectionResetError:
        pass
    return received


@pytest.fixture
def serve(settings: Settings) -> Iterator[Serve]:
    """Serve with limits on a port of its own; its clients' connections are closed in the end."""
    with ExitStack() as stack:

        def start(**limits: Any) -> Client:
            app = create_app(settings.model_copy(update=limits))
            config = uvicorn.Config(
                app, log_level="critical", ws="none", timeout_keep_alive=1, timeout_graceful_shutdown=1
            )
            server = DrainingServer(config, app.state.services.shutdown, app.state.connections)
            listening = socket.create_server(("127.0.0.1", 0), backlog=512)
            client = Client(listening.getsockname())
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()

            def stop() -> None:
                client.opened.close()
                server.should_exit = True
                thread.join()

            stack.callback(stop)
            return client

        yield start


def test_a_head_or_a_trailer_without_end_is_refused_before_it_is_complete(serve: Serve) -> None:
    client = serve()
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    fields = b"".join(b"x%d: y\r\n" % number for number in range(2000))
    for begin, piece in [
        (b"GET /", b"x" * 20_000),
        (b"GET / HTTP/1.1\r\nX: ", b"x" * 20_000),
        (b"GET / HTTP/1.1\r\n", fields),
        (chunked + b"0\r\nX: ", b"x" * 20_000),
        (chunked + b"0\r\n", fields),
        (chunked + b"1; x=", b"x" * 20_000),
        (b"", b"\r\n" * 10_000),
    ]:
        connection = client.connect(begin)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(piece * 2000)
    # The answer is lost where a client sends on after it. One that stops is told.
    for begin, status in [(b"GET /", 414), (b"GET / HTTP/1.1\r\nX: ", 431)]:
        answer = read_to_end(client.connect(begin + b"x" * HEAD_BYTES))
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b"application/problem+json" in answer
        assert b"x-request-id" in answer and b"connection: close" in answer
    assert client.get("/healthz") == 200


def test_bytes_that_are_no_request_are_a_problem_too(serve: Serve) -> None:
    answer = read_to_end(serve().connect(b"\x16\x03\x01 hello\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ") and b"urn:espalier:problem:request-malformed" in answer


def test_trailers_do_not_become_headers_of_their_request(serve: Serve) -> None:
    connection = serve().connect(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    connection.sendall(b"Idempotency-Key: " + b"x" * 300 + b"\r\n\r\n")
    answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 422 ") and b"Idempotency-Key" not in answer


def test_a_client_that_waits_too_long_with_its_request_is_told_and_one_that_sends_nothing_is_closed(
    serve: Serve,
) -> None:
    client = serve(head_s=0.1, body_stall_s=0.1)
    half_head = client.connect(b"GET /healthz HTTP/1.1\r\nHost")
    half_body = client.connect(POST + b"Content-Length: 10\r\n\r\n{")
    silent = client.connect()
    after_an_answer = client.connect(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\r\n")
    unread = client.connect(b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{")
    assert read_to_end(half_head).startswith(b"HTTP/1.1 408 ")
    told = read_to_end(half_body)
    assert told.startswith(b"HTTP/1.1 408 ") and b"Received 1 bytes in all" in told
    assert read_to_end(silent) == b""
    assert re.findall(rb"HTTP/1.1 (\d+)", read_to_end(after_an_answer)) == [b"200"]
    assert re.findall(rb"HTTP/1.1 (\d+)", read_to_end(unread)) == [b"404"]


def test_beyond_the_limit_the_longest_idle_connection_is_closed_and_health_answers(serve: Serve) -> None:
    client = serve(connections=16, head_s=600.0, body_stall_s=600.0)
    silent = [client.connect() for _ in range(100)]
    assert client.get("/healthz") == 200
    for closed in silent[:80]:
        assert read_to_end(closed) == b""
    silent[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert read_to_end(silent[-1]).startswith(b"HTTP/1.1 200 "), "the last to come stayed"


def test_while_all_connections_are_busy_probes_are_answered_and_others_are_told_to_come_back(serve: Serve) -> None:
    client = serve(connections=16, head_s=600.0, body_stall_s=600.0)
    busy = [client.connect(POST + b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n") for _ in range(16)]
    assert {one.recv(100) for one in busy} == {b"HTTP/1.1 100 Continue\r\n\r\n"}
    assert client.get("/api/v1/runs") == 503
    assert client.get("/healthz") == client.get("/readyz") == 200
    crowd = [client.connect(POST + b"Content-Length: 10\r\n\r\n{") for _ in range(4 * SPARE_CONNECTIONS)]
    answers = {read_to_end(one)[:13] for one in crowd}
    assert b"HTTP/1.1 503 " in answers
    assert answers <= {b"HTTP/1.1 503 ", b""}, "one may be closed for the next before its head is read"
    busy.pop().close()
    until(lambda: client.get("/api/v1/runs") == 200)
    metrics = http.client.HTTPConnection(*client.address, timeout=60)
    metrics.request("GET", "/metrics")
    assert b'espalier_connections_closed_total{reason="' in metrics.getresponse().read()
    metrics.close()


def test_a_connection_sends_only_few_requests_ahead_of_their_answers(serve: Serve) -> None:
    client = serve()
    request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    few = read_to_end(client.connect(request * (PIPELINED - 1) + last))
    assert few.count(b"HTTP/1.1 200 ") == PIPELINED
    assert read_to_end(client.connect(request * 4000)).count(b"HTTP/1.1 200 ") <= PIPELINED + 1


@pytest.mark.parametrize(("descriptors", "connections"), [(256, 64), (128, SPARE_CONNECTIONS), (4096, 1000)])
def test_descriptors_are_kept_back_for_all_that_is_no_connection(descriptors: int, connections: int) -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}));"
            "from api.connections import connection_limits; from settings import Settings;"
            "print('limit', connection_limits(Settings()).connections)",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"limit {connections}" in said
    assert ("ulimit -n" in said) == (connections < 1000)
