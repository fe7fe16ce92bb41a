"""A real S3 server for tests, buckets on it, and a network proxy to it that can fail."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import obstore
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from artifacts.bucket_store import BucketStore
from artifacts.store import Digest, StoreAddress

EACH_STORE = pytest.mark.parametrize("store", ["folder", "bucket"], indirect=True)
"""Runs a test once with a folder as the store and once with a bucket."""
EACH_STORE_SLOWLY = pytest.mark.parametrize(
    "store", ["folder", pytest.param("bucket", marks=pytest.mark.slow)], indirect=True
)
"""Runs a test with a folder, and with a bucket only among the slow tests."""

KEYS = {"AWS_ACCESS_KEY_ID": "the-key-of-a-test", "AWS_SECRET_ACCESS_KEY": "the-secret-of-a-test"}

_REGION = "eu-central-1"


def _key(digest: Digest) -> str:
    """Return the key of a file in the bucket."""
    return f"some/where/{digest[:2]}/{digest}"


@dataclass
class Bucket:
    """A bucket on the test server, with the local cache folder of a machine that uses it."""

    name: str
    endpoint: str
    folder: Path
    cache_bytes: int = 10**9

    @property
    def address(self) -> StoreAddress:
        return StoreAddress(
            str(self.folder), f"s3://{self.name}/some/where", self.endpoint, _REGION, cache_bytes=self.cache_bytes
        )

    def store(self) -> BucketStore:
        """Return a store that uses this bucket."""
        return BucketStore(self.address)

    def seen_from(self, folder: Path, endpoint: str | None = None) -> Bucket:
        """Return the same bucket for another machine, whose cache folder is empty."""
        return replace(self, folder=folder, endpoint=endpoint or self.endpoint)

    def objects(self) -> dict[str, bytes]:
        """Return all objects by key, except the object that marks the bucket as used."""
        return {key: bytes(obstore.get(self._direct(), key).bytes()) for key in self._keys()}

    def digests(self) -> set[str]:
        """Return the digests of all files in the bucket."""
        return {key.rpartition("/")[2] for key in self._keys()}

    def write(self, digest: Digest, data: bytes) -> None:
        """Replace the content of a file, as if the disk of the server had damaged it."""
        obstore.put(self._direct(), _key(digest), data)

    def age(self, *digests: Digest) -> None:
        """Change the modification time of these files to two days earlier."""
        of_server = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self.name].keys
        for digest in digests:
            of_server[_key(digest)].last_modified -= timedelta(days=2)

    def _keys(self) -> list[str]:
        found = [meta["path"] for page in obstore.list(self._direct()) for meta in page]
        return [key for key in found if not key.endswith("in-use")]

    def _direct(self) -> S3Store:
        return S3Store(self.name, endpoint=self.endpoint, region=_REGION, client_options={"allow_http": True})


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Run an S3 server and yield its address.

    Requests are handled one at a time. Otherwise moto answers with status 500 if a file is written again while its
    answer to another request about the file is still being sent.
    """
    one_by_one, respond = threading.Lock(), S3Response._key_response

    def respond_alone(self: S3Response, *request: Any) -> Any:
        with one_by_one:
            return respond(self, *request)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with patch.object(S3Response, "_key_response", respond_alone):
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def make_bucket(endpoint: str, folder: Path) -> Bucket:
    """Create a new, empty bucket on the server."""
    name = f"bucket-{secrets.token_hex(6)}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=_REGION,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": _REGION})
    client.close()
    return Bucket(name, endpoint, folder)


@dataclass
class NetworkProxy:
    """A proxy to a server that can be slow, break connections after some bytes, or hang.

    `requests` counts all requests, also those on broken connections. `in_flight` counts the requests that have arrived
    and have no byte of a response yet.
    """

    server: str
    up_bytes: float = float("inf")
    down_bytes: float = float("inf")
    hangs: bool = False
    delay_s: float = 0.0
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def __post_init__(self) -> None:
        self.requests = 0
        self._counting = threading.Lock()
        self._asking: set[socket.socket] = set()
        self._open: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def in_flight(self) -> int:
        return len(self._asking)

    def cut(self, up_bytes: float = 0, down_bytes: float = 0) -> None:
        """Break all connections, present and new, after this many more bytes in each direction."""
        self.carried = {"up": 0, "down": 0}
        self.up_bytes, self.down_bytes = up_bytes, down_bytes

    def mend(self) -> None:
        """Pass on everything again."""
        self.up_bytes = self.down_bytes = float("inf")
        self.hangs = False

    def close(self) -> None:
        self._over.set()
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join()
        for end in [self._socket, *self._open]:
            end.close()

    def _serve(self) -> None:
        while True:
            near, _ = self._socket.accept()
            self._open.append(near)
            if self._over.is_set():
                return
            if not (self.up_bytes and self.down_bytes):
                with self._counting:
                    self.requests += 1
                near.close()
                continue
            host, port = self.server.removeprefix("http://").split(":")
            far = socket.create_connection((host, int(port)))
            self._open.append(far)
            for one, other, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._carry, args=(one, other, way), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._count(one if way == "up" else other, way)
                while self.hangs and not self._over.is_set():
                    time.sleep(0.01)
                time.sleep(self.delay_s)
                left = (self.up_bytes if way == "up" else self.down_bytes) - self.carried[way]
                if left < len(data):
                    break
                self.carried[way] += len(data)
                other.sendall(data)
        with self._counting:
            self._asking -= {one, other}
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, near: socket.socket, way: str) -> None:
        """Update the counts for a piece of a request or response. A connection carries one request after the other."""
        with self._counting:
            if way == "down":
                self._asking.discard(near)
            elif near not in self._asking:
                self._asking.add(near)
                self.requests += 1
