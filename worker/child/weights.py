"""Downloads pretrained weights that Keras publishes, or creates random ones, and puts them into the store.

This runs in the child process of a job. A download is checked against the MD5 that Keras publishes. The store then
identifies the weights by their SHA-256. All timeouts are short, so that a run on a machine without network fails soon,
with advice.
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
    """Weights in the store: the digest of their file, and where they came from."""

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
    """Put the weights of a backbone into the store and return their digest.

    Raises WeightsUnavailable, whose message says what the user can do.
    """
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
    """Download a published file into `file` and check its MD5. Raises WeightsUnavailable."""
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
    # ValueError: the environment names an invalid proxy. ImportError: that proxy needs a package that is missing.
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise _unavailable(network, published, f"{url} cannot be fetched: {reason}") from error
    if digest.hexdigest() != published.md5:
        raise _unavailable(
            network,
            published,
            f"The file from {url} is damaged: expected MD5 {published.md5}. "
            f"Received {digest.hexdigest()} ({done:,} bytes)",
        )


def _open(client: httpx2.Client, url: str, source: WeightsSource) -> httpx2.Response:
    """Send a GET request and return the response as soon as its headers have arrived.

    The request runs in a thread, because HTTP clients do not limit the time of a name look-up and try each address of a
    host for `connect_s`. After twice `connect_s` without a connection, this raises TimeoutError and leaves the thread
    behind. Otherwise it raises the errors of `client`.
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
        raise TimeoutError("no response in time") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _unavailable(network: BackboneName, published: WeightsFile, what: str) -> WeightsUnavailable:
    name = Path(published.path).name
    return WeightsUnavailable(
        f"{what}. To continue, give this machine network access and start the run again; or download that file on "
        f"another machine and import it with 'make weights BACKBONE={network.value} NAME={IMAGENET} FILE={name}'; "
        "or set ESPALIER_WEIGHTS_URL to a mirror; or train with weights 'random'.",
        network=network.value,
    )


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
