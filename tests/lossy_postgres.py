"""A proxy to PostgreSQL that breaks the connection after every other COMMIT, before its response arrives.

The transaction is committed, but the client does not know.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import URL

from models.session import Database


class LossyProxy:
    """Passes bytes between clients and a server, except the response to every other COMMIT."""

    def __init__(self, server: str) -> None:
        self.cuts = 0
        self._commits = 0
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._server)
            is_cut = threading.Event()
            back = threading.Thread(target=self._answer, args=(client, server, is_cut), daemon=True)
            back.start()
            with suppress(OSError):
                while data := client.recv(65_536):
                    if b"COMMIT" in data:
                        self._commits += 1
                        if self._commits % 2 == 0:
                            is_cut.set()
                    server.sendall(data)
            with suppress(OSError):
                server.shutdown(socket.SHUT_WR)
            back.join(5)

    def _answer(self, client: socket.socket, server: socket.socket, is_cut: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65_536):
                if is_cut.is_set():  # the server has committed
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


@contextmanager
def lost_commits(database: Database) -> Iterator[tuple[Database, LossyProxy]]:
    """Yield the same PostgreSQL database through a proxy that loses responses, and this proxy."""
    url = database.engine.url
    wire = LossyProxy(f"{url.query['host']}/.s.PGSQL.{url.port or 5432}")
    through = Database(URL.create("postgresql+psycopg", "postgres", None, "127.0.0.1", wire.port, url.database))
    try:
        yield through, wire
    finally:
        through.close()
        wire.close()
