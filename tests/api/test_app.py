"""What `make_server` makes of a proxy in front of it, through a real socket."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from api.app import make_server
from settings import Settings

Ask = Callable[[str], str]


@pytest.fixture
def ask(settings: Settings) -> Iterator[Ask]:
    """Returns a function: what /docs answers to a proxy at 127.0.0.1, if these proxies are trusted."""
    running = []

    def asked(trusted: str) -> str:
        server = make_server(settings.model_copy(update={"trusted_proxies": trusted}))
        listening = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        connection = http.client.HTTPConnection(*listening.getsockname(), timeout=60)
        connection.request("GET", "/docs", headers={"Host": "localhost", "X-Forwarded-Proto": "https"})
        page = connection.getresponse().read().decode()
        connection.close()
        return page

    yield asked
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    ("trusted", "scheme"),
    [("127.0.0.1,::1", "https"), ("10.0.0.1,127.0.0.0/8", "https"), ("10.0.0.1", "http"), ("172.16.0.0/12", "http")],
)
def test_links_of_the_documentation_have_the_scheme_that_a_trusted_proxy_names(
    ask: Ask, trusted: str, scheme: str
) -> None:
    links = re.findall(r'(?:src|href)="(\w+)://localhost/', ask(trusted))
    assert len(links) >= 3 and set(links) == {scheme}
