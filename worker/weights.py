"""Gets weights into the store: fetched from Keras' catalogue, made at random. Runs in the child of a job.

A download is checked against the MD5 that Keras publishes, and everything after that goes by our own SHA-256. A machine
without network must hear so at once, with the way out: every wait here is short.
"""

from __future__ import annotations

import hashlib
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from artifacts.catalogue import CATALOGUE, BackboneName, WeightsFile
from artifacts.recipe import IMAGENET, RANDOM
from artifacts.store import Digest, Store
from errors import WeightsUnavailable

Progress = Callable[[int, int | None, float | None], None]

_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Source:
    """Where ImageNet weights come from: a base address, a folder of earlier downloads, and patience in seconds."""

    url: str
    cache: str
    connect_s: float
    stall_s: float


@dataclass(frozen=True)
class Obtained:
    """Weights that lie in the store now, and where they came from."""

    sha256: Digest
    source: dict[str, Any]


def obtain(network: BackboneName, name: str, store: Store, source: Source, progress: Progress) -> Obtained:
    """Put weights into the store. Raises WeightsUnavailable, saying what to do."""
    if name == RANDOM:
        from training import backbones  # brings TensorFlow, which takes seconds: only where it is needed

        return Obtained(store.put(backbones.random_weights(network)), {"kind": "random", "seed": backbones.RANDOM_SEED})
    if name != IMAGENET:
        raise WeightsUnavailable(
            f"No weights named {name!r} have been imported for {network.value}. Import them with "
            f"'make weights BACKBONE={network.value} NAME={name} FILE=…', or use 'imagenet' or 'random'."
        )
    published = CATALOGUE[network].imagenet
    with tempfile.TemporaryDirectory() as folder:
        file = Path(source.cache).expanduser() / Path(published.path).name
        origin = str(file)
        if not file.is_file() or _md5(file) != published.md5:
            file = Path(folder) / "weights.h5"
            origin = f"{source.url.rstrip('/')}/{published.path}"
            _download(network, published, source, file, progress)
        from training import backbones

        facts = {"kind": "imagenet", "from": origin, "md5": published.md5}
        return Obtained(store.put(backbones.import_weights(network, file)), facts)


def _download(network: BackboneName, published: WeightsFile, source: Source, file: Path, progress: Progress) -> None:
    """Fetch a published file and check its MD5. Raises WeightsUnavailable."""
    url = f"{source.url.rstrip('/')}/{published.path}"
    timeout = httpx2.Timeout(source.stall_s, connect=source.connect_s)
    started = time.monotonic()
    digest = hashlib.md5(usedforsecurity=False)
    done = 0
    try:
        _resolve(url, source.connect_s)
        with httpx2.stream("GET", url, timeout=timeout, follow_redirects=True) as answer, file.open("wb") as target:
            answer.raise_for_status()
            total = int(answer.headers["content-length"]) if "content-length" in answer.headers else None
            for chunk in answer.iter_bytes(_CHUNK):
                target.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                speed = done / (time.monotonic() - started)
                progress(done, total, (total - done) / speed if total else None)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _unavailable(network, published, f"{url} cannot be fetched: {error or type(error).__name__}") from error
    if digest.hexdigest() != published.md5:
        raise _unavailable(
            network,
            published,
            f"What {url} sent is damaged: expected MD5 {published.md5}. Received {digest.hexdigest()} ({done:,} bytes)",
        )


def _resolve(url: str, timeout_s: float) -> None:
    """See that the host has an address: no HTTP client bounds this step, and a resolver may hang for a minute."""
    host = httpx2.URL(url).host
    answered: queue.Queue[OSError | None] = queue.Queue()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, None)
            answered.put(None)
        except OSError as error:
            answered.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        error = answered.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no address for {host} within {timeout_s:g} s") from None
    if error is not None:
        raise error


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
