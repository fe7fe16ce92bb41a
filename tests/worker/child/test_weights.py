from __future__ import annotations

import gzip
import hashlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from artifacts.store import Store, digest_of
from errors import WeightsUnavailable
from recipes.catalogue import CATALOGUE, BackboneName, WeightsFile
from training.networks import backbones
from worker.child import weights
from worker.child.weights import Obtained, obtain
from worker.messages import WeightsSource

MIB = 1024 * 1024
PATH = "vgg16/weights_notop.h5"
# What is never read as weights, since each of these downloads fails before.
CONTENT = bytes(range(256)) * (4 * MIB // 256)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """A local web server whose answers a test chooses."""

    port: int
    answer: Answer = lambda request: request.send_error(404)
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            server.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = Server(http.server_port)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield server
        http.shutdown()
        thread.join()


@contextmanager
def deaf_port() -> Iterator[int]:
    """Hold a port at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


@pytest.fixture
def mirror() -> Iterator[Server]:
    """Where weights are fetched from."""
    with serving() as server:
        yield server


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set at the end of the test: what a server that says no more waits for."""
    event = threading.Event()
    yield event
    event.set()


@dataclass
class WeightsCase:
    """Where weights come from and go to."""

    store: Store
    temporary: Path
    source: WeightsSource
    reports: list[tuple[int, int | None, float | None]] = field(default_factory=list)

    def obtain(self, content: bytes = CONTENT, name: str = "imagenet") -> Obtained:
        """Obtain weights of VGG16 whose published file has this content."""
        published = WeightsFile(PATH, hashlib.md5(content, usedforsecurity=False).hexdigest())
        entry = replace(CATALOGUE[BackboneName.VGG16], imagenet=published)
        return obtain(
            BackboneName.VGG16,
            name,
            self.store,
            self.source,
            lambda *progress: self.reports.append(progress),
            {BackboneName.VGG16: entry},
        )

    def refusal(self) -> str:
        """Return why the weights cannot be had, seeing that it is said with the ways out, and leaves nothing."""
        with pytest.raises(WeightsUnavailable) as raised:
            self.obtain()
        for way in (
            "network access",
            "'make weights BACKBONE=vgg16 NAME=imagenet FILE=weights_notop.h5'",
            "ESPALIER_WEIGHTS_URL",
            "weights 'random'",
        ):
            assert way in raised.value.detail
        assert self.is_tidy() and list(self.store.digests()) == []
        return raised.value.detail

    def is_tidy(self) -> bool:
        """Say whether no half a file is left anywhere."""
        return not any(self.temporary.iterdir()) and not any((self.store.root / "incoming").iterdir())


@pytest.fixture
def place(store: Store, mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightsCase:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return WeightsCase(
        store, temporary, WeightsSource(mirror.url, str(tmp_path / "cache"), connect_s=20.0, stall_s=60.0)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Weights of VGG16 as the store holds them, and as Keras saves them."""
    network = backbones.build_network(BackboneName.VGG16, 32)
    file = tmp_path_factory.mktemp("made") / "vgg16.weights.h5"
    network.save_weights(file)
    return backbones.dump_weights(network), file.read_bytes()


def sending(content: bytes, announced: int | None = None, status: int = 200) -> Answer:
    """Answer with a content, and with a length that may differ from its own."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(announced or len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def leading_to(url: str) -> Answer:
    """Answer with a redirect."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.end_headers()

    return answer


def is_of(obtained: Obtained, data: bytes, place: WeightsCase) -> bool:
    return obtained.sha256 == digest_of(data) and list(place.store.digests()) == [obtained.sha256] and place.is_tidy()


# --- what comes in ---------------------------------------------------------------------------------------------------


def test_published_weights_are_fetched_and_stored(
    place: WeightsCase, mirror: Server, made: tuple[bytes, bytes]
) -> None:
    weights, file = made
    mirror.answer = sending(file)
    obtained = place.obtain(file)
    assert is_of(obtained, weights, place)
    md5 = hashlib.md5(file, usedforsecurity=False).hexdigest()
    assert obtained.source == {"kind": "imagenet", "from": f"{mirror.url}/{PATH}", "md5": md5}
    assert mirror.asked == [f"/{PATH}"]
    assert place.reports[-1] == (len(file), len(file), 0.0)


def test_a_file_that_keras_has_downloaded_before_is_used(
    place: WeightsCase, mirror: Server, made: tuple[bytes, bytes]
) -> None:
    weights, file = made
    cached = Path(place.source.cache) / "weights_notop.h5"
    cached.write_bytes(file)
    obtained = place.obtain(file)
    assert is_of(obtained, weights, place)
    assert obtained.source["from"] == str(cached)
    assert mirror.asked == [] and place.reports == []


def test_an_earlier_download_that_is_damaged_is_fetched_anew(
    place: WeightsCase, mirror: Server, made: tuple[bytes, bytes]
) -> None:
    weights, file = made
    cached = Path(place.source.cache) / "weights_notop.h5"
    cached.write_bytes(file[:-1])
    mirror.answer = sending(file)
    obtained = place.obtain(file)
    assert is_of(obtained, weights, place)
    assert obtained.source["from"] == f"{mirror.url}/{PATH}"
    assert cached.read_bytes() == file[:-1], "the folder is Keras' own"


def test_a_redirect_is_followed(place: WeightsCase, mirror: Server, made: tuple[bytes, bytes]) -> None:
    weights, file = made
    with serving() as other:
        other.answer = sending(file)
        mirror.answer = leading_to(f"{other.url}/elsewhere")
        assert is_of(place.obtain(file), weights, place)
    assert (mirror.asked, other.asked) == ([f"/{PATH}"], ["/elsewhere"])


def test_random_weights_need_no_network(place: WeightsCase, mirror: Server) -> None:
    obtained = place.obtain(name="random")
    assert is_of(obtained, backbones.random_weights(BackboneName.VGG16), place)
    assert obtained.source == {"kind": "random", "seed": backbones.RANDOM_SEED}
    assert mirror.asked == []


def test_weights_that_nobody_imported_are_asked_for_by_name(place: WeightsCase, mirror: Server) -> None:
    with pytest.raises(WeightsUnavailable, match=r"NAME=places365 FILE=…', or use 'imagenet' or 'random'"):
        place.obtain(name="places365")
    assert mirror.asked == []


# --- progress --------------------------------------------------------------------------------------------------------


def test_a_download_tells_how_far_it_is_and_how_long_it_will_take(
    place: WeightsCase, mirror: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.answer = sending(CONTENT[:-1] + b"x")
    monkeypatch.setattr(weights, "time", SimpleNamespace(monotonic=count(0, 2).__next__))  # 2 s for each look at it
    place.refusal()
    assert place.reports == [(done * MIB, 4 * MIB, 2.0 * (4 - done)) for done in (1, 2, 3, 4)]


def test_a_length_that_is_not_told_is_no_guess(place: WeightsCase, mirror: Server) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(CONTENT[:-1])

    mirror.answer = endless
    assert "is damaged" in place.refusal()
    assert place.reports[-1] == (len(CONTENT) - 1, None, None)


def test_a_mirror_that_would_compress_is_asked_not_to(place: WeightsCase, mirror: Server) -> None:
    def squeezing(request: BaseHTTPRequestHandler) -> None:
        is_squeezed = "gzip" in request.headers.get("Accept-Encoding", "")
        content = gzip.compress(b"x" + CONTENT) if is_squeezed else b"x" + CONTENT
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        if is_squeezed:
            request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        request.wfile.write(content)

    mirror.answer = squeezing
    place.refusal()
    assert place.reports[-1] == (len(CONTENT) + 1, len(CONTENT) + 1, 0.0)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_damaged_download_is_refused(place: WeightsCase, mirror: Server) -> None:
    damaged = b"\x01" + CONTENT[1:]
    mirror.answer = sending(damaged)
    sums = [hashlib.md5(data, usedforsecurity=False).hexdigest() for data in (CONTENT, damaged)]
    assert f"is damaged: expected MD5 {sums[0]}. Received {sums[1]} (4,194,304 bytes)" in place.refusal()


def test_a_download_that_is_cut_off_is_refused(place: WeightsCase, mirror: Server) -> None:
    mirror.answer = sending(CONTENT[: 3 * MIB], announced=len(CONTENT))
    assert "received 3145728 bytes, expected 4194304" in place.refusal()
    assert [done for done, _, _ in place.reports] == [MIB, 2 * MIB, 3 * MIB]


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_file_that_is_not_there_is_told_with_its_status(place: WeightsCase, mirror: Server, status: int) -> None:
    mirror.answer = lambda request: request.send_error(status)
    assert (
        f"{mirror.url}/{PATH} cannot be fetched: the server answered {status} {HTTPStatus(status).phrase}. "
        in place.refusal()
    )


def test_a_redirect_in_a_circle_ends(place: WeightsCase, mirror: Server) -> None:
    mirror.answer = leading_to(f"{mirror.url}/again")
    assert "redirects" in place.refusal()


def test_a_server_that_stops_in_the_middle_is_given_up(
    place: WeightsCase, mirror: Server, over: threading.Event
) -> None:
    def stalling(request: BaseHTTPRequestHandler) -> None:
        sending(CONTENT[: 2 * MIB], announced=len(CONTENT))(request)
        over.wait(120)

    mirror.answer = stalling
    for stall_s in (0.5, 5.0, 60.0):  # what comes before the stall may itself be late on a slow machine
        place.reports.clear()
        place.source = replace(place.source, stall_s=stall_s)
        assert "timed out" in place.refusal()
        if place.reports and place.reports[-1][0] == 2 * MIB:
            return
    raise AssertionError("nothing came before the stall")


def test_a_server_that_takes_the_question_and_says_nothing_is_given_up(
    place: WeightsCase, mirror: Server, over: threading.Event
) -> None:
    def silent(request: BaseHTTPRequestHandler) -> None:
        over.wait(120)

    mirror.answer = silent
    place.source = replace(place.source, stall_s=0.5)
    assert "timed out" in place.refusal()


def test_a_server_that_is_not_there_is_told_at_once(place: WeightsCase) -> None:
    with deaf_port() as port:
        place.source = replace(place.source, url=f"http://127.0.0.1:{port}")
        assert "Connection refused" in place.refusal()


def test_a_name_that_nobody_knows_is_told_at_once(place: WeightsCase) -> None:
    place.source = replace(place.source, url="http://weights.invalid")
    refusal = place.refusal()
    assert "http://weights.invalid/vgg16/weights_notop.h5 cannot be fetched" in refusal
    assert "no connection within" not in refusal, "it was not waited for"


def test_a_look_up_that_hangs_is_given_up(
    place: WeightsCase, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(120) and [])
    place.source = replace(place.source, url="http://weights.invalid", connect_s=0.2)
    assert "no connection within 0.4 s" in place.refusal()


def test_many_addresses_behind_a_wall_do_not_add_up(place: WeightsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as connections:
        walled = connections.enter_context(socket.socket())
        walled.bind(("127.0.0.1", 0))
        walled.listen(0)
        # A full backlog: Linux drops what else asks for a connection, as firewalls do.
        for _ in range(3):
            waiting = connections.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(walled.getsockname())
        address = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", walled.getsockname())
        tried = count(1)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (address for _ in islice(tried, 400)))
        place.source = replace(place.source, url="http://weights.invalid", connect_s=0.3)
        assert "no connection within 0.6 s" in place.refusal()
        assert next(tried) < 16, "most of them were not even tried"


@pytest.mark.parametrize("url", ["", "no address", "ftp://weights.invalid", "http://:80", "http://[::1", "http://a:b"])
def test_an_address_that_is_none_is_told(place: WeightsCase, url: str) -> None:
    place.source = replace(place.source, url=url)
    assert f"{url}/{PATH} cannot be fetched: " in place.refusal()


# --- behind a proxy --------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(mirror: Server) -> Iterator[Server]:
    """A proxy that knows the name `weights.invalid`, which nobody else does."""

    def forward(request: BaseHTTPRequestHandler) -> None:
        url = httpx2.URL(request.path)
        assert url.host == "weights.invalid"
        found = httpx2.get(f"{mirror.url}{url.path}", trust_env=False)
        sending(found.content, status=found.status_code)(request)

    with serving() as server:
        server.answer = forward
        yield server


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_machine_that_knows_no_names_fetches_through_its_proxy(
    place: WeightsCase, mirror: Server, proxy: Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    place.source = replace(place.source, url="http://weights.invalid")
    assert "answered 404" in place.refusal(), "an answer of the mirror"
    mirror.answer = sending(CONTENT[1:])
    assert "is damaged" in place.refusal()
    assert (proxy.asked, mirror.asked) == ([f"http://weights.invalid/{PATH}"] * 2, [f"/{PATH}"] * 2)


def test_a_mirror_in_the_house_is_asked_without_the_proxy(
    place: WeightsCase, mirror: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with deaf_port() as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert "answered 404" in place.refusal()
    assert mirror.asked == [f"/{PATH}"]


def test_a_proxy_that_refuses_is_told(place: WeightsCase, proxy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    place.source = replace(place.source, url="https://weights.invalid")
    assert "501 Unsupported method ('CONNECT')" in place.refusal()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://proxy.invalid:3128", "cannot be fetched: "),
        ("gopher://127.0.0.1", "Unknown scheme for proxy URL"),
        ("socks5://127.0.0.1:9", "socks"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told(
    place: WeightsCase, monkeypatch: pytest.MonkeyPatch, setting: str, reason: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", setting)
    assert reason in place.refusal()
