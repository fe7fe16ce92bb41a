"""A running service as tests hold it, and free ports for it."""

from __future__ import annotations

import socket
import subprocess
import time
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[str]
    var: Path
    port: int
    mlflow_url: str
    http: httpx2.Client

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
        """Return what is at `url` once nothing will change any more."""
        busy = ("uploaded", "ingesting", "queued", "running")
        return self.until(url, lambda found: found["state"] not in busy, within_s)

    def until(self, url: str, is_so: Any, within_s: float = 120) -> dict[str, Any]:
        """Return what is at `url` once `is_so` of it."""
        deadline = time.monotonic() + within_s
        while True:
            answer = self.http.get(url)
            assert answer.is_success, answer.text
            found: dict[str, Any] = answer.json()
            if is_so(found):
                return found
            assert time.monotonic() < deadline, f"still not so after {within_s} s: {found}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Return every process of the service."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
