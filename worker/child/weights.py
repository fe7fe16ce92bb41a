"""Puts weights into the store: downloaded from Keras' catalogue, or random. Runs in the child process of a job.

A download is checked against the MD5 that Keras publishes; from then on our own SHA-256 identifies the weights. On a
machine without network the run must fail soon, with advice, so every wait here is short.
"""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from artifacts.store import Digest, Store, disk_errors
from errors import WeightsUnavailable
from recipes.catalogue import CATALOGUE, Backbone, BackboneName, WeightsFile
from recipes.recipe import IMAGENET, RANDOM
from worker.messages import JsonObject, WeightsSource

Progress = Callable[[int, int | None, float | None], None]

_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Obtained:
    """The digest of weights in the store, and their origin."""

    sha256: Digest
    source: JsonObject


def obtain(
    network: BackboneName,
    name: str,
    store: Store,
    source: WeightsSource,
    progress: Progress,
    catalogue: Mapping[BackboneName, Backbone] = CATALOGUE,
) -> Obtained:
    """Put weights into the store. Raises WeightsUnavailable, whose message says what to do."""
    if name == RANDOM:
        from training.networks import backbones

        return Obtained(store.put(backbones.random_weights(network)), {"kind": "random", "seed": backbones.RANDOM_SEED})
    if name != IMAGENET:
        raise WeightsUnavailable(
            f"No weights named {name!r} have been imported for {network.value}. Import them with "
            f"'make weights BACKBONE={network.value} NAME={name} FILE=…', or use 'imagenet' or 'random'."
        )
    published = catalogue[network].imagenet
    with tempfile.TemporaryDirectory() as folder:
        file = Path(source.cache).expanduser() / Path(published.path).name
        origin = str(file)
        if not file.is_file() or _md5(file) != published.md5:
            file = Path(folder) / "weights.h5"
            origin = f"{source.url.rstrip('/')}/{published.path}"
            _download(network, published, source, file, progress)
        from training.networks import backbones

        facts = {"kind": "imagenet", "from": origin, "md5": published.md5}
        return Obtained(store.put(backbones.import_weights(network, file)), facts)


def _download(
    network: BackboneName, published: WeightsFile, source: WeightsSource, file: Path, progress: Progress
) -> None:
    """Download a published file and check its MD5. Raises WeightsUnavailable."""
    url = f"{source.url.rstrip('/')}/{published.path}"
    timeout = httpx2.Timeout(source.stall_s, connect=source.connect_s)
    started = time.monotonic()
    digest = hashlib.md5(usedforsecurity=False)
    done = 0
    try:
        with (
            httpx2.Client(timeout=timeout, follow_redirects=True) as client,
            closing(_open(client, url, source)) as answer,
            file.open("wb") as target,
        ):
            if not answer.is_success:
                raise OSError(f"the server answered {answer.status_code} {answer.reason_phrase}")
            total = int(answer.headers["content-length"]) if "content-length" in answer.headers else None
            for chunk in answer.iter_bytes(_CHUNK):
                with disk_errors():
                    target.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                speed = done / (time.monotonic() - started)
                progress(done, total, (total - done) / speed if total else None)
    # ValueError and ImportError: the environment names a proxy that is malformed or needs a missing package.
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise _unavailable(network, published, f"{url} cannot be fetched: {reason}") from error
    if digest.hexdigest() != published.md5:
        raise _unavailable(
            network,
            published,
            f"What {url} sent is damaged: expected MD5 {published.md5}. Received {digest.hexdigest()} ({done:,} bytes)",
        )


def _open(client: httpx2.Client, url: str, source: WeightsSource) -> httpx2.Response:
    """Send the request in a thread of its own, which a timeout abandons; return the response before its content.

    HTTP clients do not limit the time of a name look-up, and they try each address of a host for `connect_s`. So this
    waits at most twice `connect_s` for the connection to the host or its proxy. Raises what `client` does, or
    TimeoutError.
    """
    is_connected = threading.Event()
    answered: queue.Queue[httpx2.Response | Exception] = queue.Queue()

    def trace(event: str, _: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            is_connected.set()

    def send() -> None:
        try:
            # Without compression, so that progress can compare the received bytes with the Content-Length.
            headers = {"Accept-Encoding": "identity"}
            request = client.build_request("GET", url, headers=headers, extensions={"trace": trace})
            answered.put(client.send(request, stream=True))
        except Exception as error:
            answered.put(error)
        is_connected.set()

    threading.Thread(target=send, name="download", daemon=True).start()
    if not is_connected.wait(2 * source.connect_s):
        raise TimeoutError(f"no connection within {2 * source.connect_s:g} s")
    try:
        answer = answered.get(timeout=source.connect_s + source.stall_s)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _unavailable(network: BackboneName, published: WeightsFile, what: str) -> WeightsUnavailable:
    name = Path(published.path).name
    return WeightsUnavailable(
        f"{what}. Ways out: give this machine network access and start the run again; or fetch that file elsewhere and "
        f"import it with 'make weights BACKBONE={network.value} NAME={IMAGENET} FILE={name}'; or set "
        "ESPALIER_WEIGHTS_URL to a mirror; or train with weights 'random'.",
        network=network.value,
    )


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
