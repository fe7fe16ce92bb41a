from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import sample
from buckets import Bucket
from running import ROOT, Service, free_port, started
from waiting import until


def up(var: Path, start: str = "ops.up", **settings: str) -> subprocess.CompletedProcess[str]:
    ports = {name: str(free_port()) for name in ("ESPALIER_API_PORT", "ESPALIER_MLFLOW_PORT")}
    environment = os.environ | {"ESPALIER_VAR": str(var)} | ports | settings
    return subprocess.run(
        [sys.executable, "-m", start], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("setting", ["ESPALIER_API_PORT", "ESPALIER_MLFLOW_PORT"])
def test_a_taken_port_is_told_with_the_way_out(tmp_path: Path, setting: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = up(tmp_path, **{setting: str(port)})
    assert done.returncode == 1
    assert f"Port {port} cannot be used" in done.stdout and f"{setting}={port + 1} make up" in done.stdout


def test_a_second_service_on_the_same_data_is_told(service: Service) -> None:
    done = up(service.var)
    assert done.returncode == 1
    assert "already running" in done.stdout


@pytest.mark.parametrize("start", ["ops.up", "api.app"])
def test_a_bucket_that_does_not_let_us_in_is_told_at_once(tmp_path: Path, bucket: Bucket, start: str) -> None:
    shared = {"ESPALIER_STORE_URL": "s3://nobody-made-this", "ESPALIER_STORE_ENDPOINT": bucket.endpoint}
    done = up(tmp_path, start, **shared)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said
    assert "no bucket s3://nobody-made-this" in said.replace("\n", " ")
    without = up(tmp_path, start, **shared, AWS_ACCESS_KEY_ID="")
    assert without.returncode == 1 and "Set AWS_ACCESS_KEY_ID" in (without.stdout + without.stderr)


def test_what_is_missing_is_told_once_and_what_answers_goes_on_answering(tmp_path: Path) -> None:
    """There is less disk than the reserve, the broker is away, and MLflow never comes: its database is a folder."""
    (tmp_path / "mlflow" / "mlflow.db").mkdir(parents=True)
    port = free_port()
    environment = os.environ | {
        "ESPALIER_VAR": str(tmp_path),
        "ESPALIER_API_PORT": str(port),
        "ESPALIER_MLFLOW_PORT": str(free_port()),
        "ESPALIER_QUEUES": "ingest",
        "ESPALIER_FREE_DISK_BYTES": str(2**60),
        "REDIS_URL": f"redis://127.0.0.1:{free_port()}",
    }
    impatient = "import sys; from ops import up; up.READY_WITHIN_S = 0.1; sys.exit(up.main())"
    with subprocess.Popen(
        [sys.executable, "-c", impatient], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        answers = httpx2.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert answers.status_code == 200 and process.returncode == 130
    assert first.startswith("Espalier is running, but not all of it works yet. Still missing: disk (")
    for part in ("broker (", "jobs wait until the broker answers", "MLflow (no answer at http://127.0.0.1:", "/readyz"):
        assert part in first
    assert "Espalier is" not in rest and f"http://127.0.0.1:{port}/docs" in rest


@pytest.mark.parametrize("name", ["api.app", "--queues cpu", "valkey-server", "mlflow"])
def test_what_dies_is_restarted_and_the_service_answers_again(
    service: Service, trained: dict[str, Any], name: str
) -> None:
    victim = service.find(name)
    victim.send_signal(signal.SIGKILL)
    psutil.wait_procs([victim], timeout=60)
    until(lambda: service.is_ready() and any(process.pid != victim.pid for process in service.all_of(name)))
    answer = service.http.post("/api/v1/models/colours/predict", content=sample.png(1))
    assert answer.status_code == 200


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_as_it_would_have(
    service: Service, colours: dict[str, Any], trained: dict[str, Any]
) -> None:
    run = service.train(colours["id"], "killed", wait=False)
    url = f"/api/v1/runs/{run['id']}"
    service.until(url, lambda found: found["state"] == "running")
    worker = service.find("--queues cpu")
    child = worker.children()
    worker.send_signal(signal.SIGKILL)
    ended = service.settled(url)
    assert ended["state"] == "succeeded"
    assert ended["metrics"] == trained["metrics"], "the same seed on the same images"
    assert ended["model"] == {"name": "killed", "version": 1}
    _, alive = psutil.wait_procs(child, timeout=60)
    assert not alive, "the child must not outlive its worker"


@pytest.fixture
def _hangups_count() -> Iterator[None]:
    """Let what a test starts heed SIGHUP, even where whoever runs the tests ignores it, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_hangups_count")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_however_the_service_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    """The services that other tests share end by Ctrl-C and by SIGTERM, and nothing may be left of them either."""
    with started(tmp_path / "var") as service:
        assert len(service.processes()) >= 5
        service.end(number)
