"""An API of several processes on one port, as tests hold it: alone, with models that nobody had to train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import numpy as np
import psutil
import records
from flat import flat_bundle
from networks import mean_colour
from running import ROOT, free_port
from waiting import until

from artifacts.bundle import Dense
from artifacts.store import Store
from models import registry
from models.session import Database
from recipes.layers import Activation


def add_version(database: Database, store: Store, model: str, name: str) -> None:
    """Add the next version of a model, on a network of its own."""
    kernel = np.ones((3, 2), np.float32)
    backbone = store.put(mean_colour(name))
    flat = flat_bundle(backbone)
    golden = flat.golden_input.mean(axis=(1, 2), dtype=np.float32) @ kernel
    layers = (Dense(kernel, np.zeros(2, np.float32), Activation.LINEAR),)
    bundle = replace(flat, engine="openvino", layers=layers, golden_output=golden)
    digest = store.put(bundle.dump())
    with database.writing() as session:
        run = records.queued_run(session, records.ready_version(session, name), model)
        registry.add_model_version(session, records.PRINCIPAL, model, run.id, digest, backbone)


@dataclass
class Several:
    """A running API of two processes."""

    supervisor: psutil.Popen
    port: int

    def client(self) -> httpx2.Client:
        """Return a client of one connection, and so of one process."""
        return httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", limits=httpx2.Limits(max_connections=1), timeout=60
        )

    def post(self, path: str, content: bytes) -> httpx2.Response:
        """Return the answer of whichever process takes a new connection."""
        with self.client() as client:
            return client.post(path, content=content)

    def processes(self) -> set[int]:
        """Return the processes that serve, or begin to."""
        found = set()
        for child in self.supervisor.children():
            with suppress(psutil.NoSuchProcess):  # a zombie, too, until its supervisor has looked
                if "--multiprocessing-fork" in child.cmdline():
                    found.add(child.pid)
        return found

    @contextmanager
    def clients(self) -> Iterator[dict[int, httpx2.Client]]:
        """Yield a client of each process by its number, once both answer."""
        found: dict[int, httpx2.Client] = {}
        with ExitStack() as stack:
            while len(found) < 2:
                client = stack.enter_context(self.client())
                found.setdefault(until(lambda client=client: answering(client), within_s=120), client)
            yield found


def answering(client: httpx2.Client) -> int | None:
    """Return which process answers a client, None while there is none."""
    try:
        detail: str = client.get("/readyz").json()["checks"]["process"]["detail"]
    except httpx2.TransportError:
        return None
    return int(detail.split()[0])


@contextmanager
def several(folder: Path) -> Iterator[Several]:
    """Start the API with two processes; whatever is left at the end is killed."""
    port = free_port()
    (folder / "tmp").mkdir()
    environment = os.environ | {
        "ESPALIER_VAR": str(folder / "var"),
        "ESPALIER_API_PORT": str(port),
        "ESPALIER_API_PROCESSES": "2",
        "ESPALIER_FREE_DISK_BYTES": "0",
        "ESPALIER_PREDICT_DEADLINE_S": "30",
        "TMPDIR": str(folder / "tmp"),
    }
    supervisor = psutil.Popen(
        [sys.executable, "-m", "api.app"], cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.STDOUT
    )
    try:
        yield Several(supervisor, port)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.wait()
