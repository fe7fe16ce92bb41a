"""Starts the whole service for tests, on free ports, and sends requests to it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).parent.parent

QUICK = {
    "backbone": "vgg16",
    "weights": "random",
    "features_from": "block1",
    "image_size": 32,
    "epochs": 5,
    "optimizer": {"learning_rate": 0.05},
    "folds": {"k": 2},
}


# Ports below the range that the system uses for outgoing connections: such a connection could take a port before its
# server does. Each process of a test session has its own ports.
_PORTS = itertools.count(
    10_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw10")[2:]) % 11) + os.getpid() % 1_000
)


def free_port() -> int:
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Service:
    """A running service, with an HTTP client for it."""

    process: subprocess.Popen[str]
    var: Path
    port: int
    mlflow_url: str
    http: httpx2.Client
    environment: dict[str, str]

    def upload(self, name: str, archive: bytes, wait: bool = True) -> dict[str, Any]:
        """Upload an archive and return the data set, by default once it is ready or rejected."""
        answer = self.http.post("/api/v1/datasets", params={"name": name}, content=archive)
        assert answer.status_code == 202, answer.text
        return self.settled(f"/api/v1/datasets/{answer.json()['id']}") if wait else answer.json()

    def train(self, dataset: str, name: str, wait: bool = True, **recipe: Any) -> dict[str, Any]:
        """Start a run with a quick recipe and return it, by default at its end."""
        order = {"dataset": dataset, "name": name, "recipe": {**QUICK, **recipe}}
        answer = self.http.post("/api/v1/runs", json=order)
        assert answer.status_code == 202, answer.text
        return self.settled(f"/api/v1/runs/{answer.json()['id']}") if wait else answer.json()

    def settled(self, url: str, within_s: float = 120) -> dict[str, Any]:
        """Return the JSON at `url` once its state is final."""
        busy = ("uploaded", "ingesting", "queued", "running")
        return self.until(url, lambda found: found["state"] not in busy, within_s)

    def until(self, url: str, is_so: Any, within_s: float = 120) -> dict[str, Any]:
        """Return the JSON at `url` once `is_so(json)` is true."""
        deadline = time.monotonic() + within_s
        while True:
            answer = self.http.get(url)
            assert answer.is_success, answer.text
            found: dict[str, Any] = answer.json()
            if is_so(found):
                return found
            assert time.monotonic() < deadline, f"still not so after {within_s} s: {found}"
            time.sleep(0.2)

    def is_ready(self) -> bool:
        """Return whether all checks of /readyz succeed."""
        try:
            return all(check["ok"] for check in self.http.get("/readyz").json()["checks"].values())
        except httpx2.TransportError:
            return False

    def events(self, run: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the events of an ended run in their order, as (kind, payload)."""
        text = self.http.get(f"/api/v1/runs/{run}/events").text
        blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
        return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]

    def find(self, name: str) -> psutil.Process:
        """Return the first process of the service whose command holds `name`."""
        found = self.all_of(name)
        assert found, f"no process of {name}"
        return found[0]

    def all_of(self, name: str) -> list[psutil.Process]:
        """Return the processes of the service whose commands hold `name`."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # a zombie, too
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @contextmanager
    def another_worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run a second worker on the same data during a block."""
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "cpu", "-n", "another@%h"]
        environment = self.find("worker.app").environ()  # which names the broker of this service
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            try:
                yield process
            finally:
                process.terminate()

    def end(self, number: signal.Signals) -> None:
        """End the service by a signal, and check that none of its processes is left."""
        running = self.processes()
        self.process.send_signal(number)
        self.process.wait(60)
        _, alive = psutil.wait_procs(running, timeout=60)
        assert not alive and self.processes() == [], f"{number.name} left something"

    def processes(self) -> list[psutil.Process]:
        """Return every process of the service, also those whose parent has died."""
        found = {process for process in psutil.process_iter() if self._owns(process)}
        with suppress(psutil.NoSuchProcess):
            found |= {*psutil.Process(self.process.pid).children(recursive=True)}  # Valkey overwrites its environment
        return sorted(found, key=lambda process: process.pid)

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("ESPALIER_VAR") == str(self.var)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


@contextmanager
def started(var: Path, **settings: str) -> Iterator[Service]:
    """Start the service as a user does, and wait until it is ready. Kill processes that are left at the end."""
    port, mlflow_port = free_port(), free_port()
    environment = os.environ | {
        "ESPALIER_VAR": str(var),
        "ESPALIER_API_PORT": str(port),
        "ESPALIER_MLFLOW_PORT": str(mlflow_port),
        "ESPALIER_WEIGHTS_URL": "http://127.0.0.1:9/nobody-listens-here",
        "ESPALIER_WEIGHTS_CACHE": str(var / "no-cache"),
        "ESPALIER_FREE_DISK_BYTES": "1000000",
        "ESPALIER_LOOK_EVERY_S": "1",
        "ESPALIER_CANCEL_EVERY_S": "0.5",
        "ESPALIER_RENEW_EVERY_S": "1",
        "ESPALIER_LET_GO_S": "10",
        "ESPALIER_LEASE_S": "15",
        "ESPALIER_PREDICT_DEADLINE_S": "30",
        "ESPALIER_MLFLOW_TIMEOUT_S": "30",
        **settings,
    }
    with (
        subprocess.Popen(
            [sys.executable, "-m", "ops.up"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
        ) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        service = Service(process, var, port, f"http://127.0.0.1:{mlflow_port}", http, environment)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert "Espalier is ready" in first, first + process.stdout.read()
            yield service
        finally:
            for left in service.processes():
                left.kill()
