"""The whole service as a user starts it: `ops.up` with SQLite, Valkey, API, worker and MLflow, on free ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
import sample
from running import ROOT, Service, free_port


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    var = tmp_path_factory.mktemp("service") / "var"
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
        "ESPALIER_LET_GO_S": "5",
        "ESPALIER_LEASE_S": "8",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.up"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "ready" in first, first + process.stdout.read()
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield Service(process, var, port, f"http://127.0.0.1:{mlflow_port}", http)
    left = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    process.stdout.close()
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not alive, f"Ctrl-C left {alive}"


@pytest.fixture(scope="session")
def colours(service: Service) -> dict[str, Any]:
    """A ready data set of 3 x 20 images."""
    return service.upload("colours", sample.zipped(sample.coloured(per_class=20)))


@pytest.fixture(scope="session")
def trained(service: Service, colours: dict[str, Any]) -> dict[str, Any]:
    """A finished run on it, the first of the model `colours`."""
    run = service.train(colours["id"], "colours")
    assert run["state"] == "succeeded", run
    return run
