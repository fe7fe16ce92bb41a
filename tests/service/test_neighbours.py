"""What the service tells strangers, and what other accounts of its machine reach through what it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import Service
from watching import Act, acts

# The weights of `unreachable` come from there; the setting names it.
OWN = r"\('127\.0\.0\.1', ({api}|{mlflow}|9)\)|'[^']*/espalier-[^']*/valkey\.sock'"
STARTS = (
    ("-m ops.up", "subprocess.Popen", "supervisor.supervisord"),
    ("supervisor.supervisord", "os.fork", ""),
    ("-m celery --app worker.app", "subprocess.Popen", "worker.child"),
    ("-m celery -A worker.app", "subprocess.Popen", "worker.child"),
    # Python's own `platform.processor`; it ends at once.
    ("", "subprocess.Popen", "['uname', '-p']"),
)
KINDS = ("ops.up", "supervisord", "api.app", "ingest@", "cpu@", "tracking@", "worker.child", "worker.mlflow_server")


@pytest.mark.slow
def test_nothing_phones_home_and_no_library_starts_a_process(
    service: Service, colours: dict[str, Any], trained: dict[str, Any], watched: Path
) -> None:
    quantised = service.train(colours["id"], "quantised", precision="int8")  # with NNCF and ONNX Runtime
    assert quantised["state"] == "succeeded", quantised
    service.until(f"/api/v1/runs/{quantised['id']}", lambda run: run["mlflow_url"] is not None)
    found = acts(watched)
    assert [act for act in found if not is_ours(act, service)] == []
    assert [kind for kind in KINDS if not any(kind in act.command for act in found)] == []


def is_ours(act: Act, service: Service) -> bool:
    """Say whether we did this, and not a library on its own account."""
    if act.event == "socket.connect":
        mlflow = service.mlflow_url.rpartition(":")[2]
        return bool(re.fullmatch(OWN.format(api=service.port, mlflow=mlflow), act.arguments[1]))
    if act.event.startswith("socket."):
        return act.arguments[0] == "'127.0.0.1'"
    started = act.arguments[1] if act.arguments else ""
    return any(who in act.command and act.event == event and what in started for who, event, what in STARTS)


def test_a_data_folder_that_exists_becomes_its_owners_alone(service: Service) -> None:
    assert service.var.stat().st_mode & 0o777 == 0o700  # it was made for all
    for path in (service.var / "espalier.db", service.var / "logs", service.var / "logs" / "api.log"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("program", ["worker.mlflow_server", "valkey"])
def test_a_neighbour_that_needs_no_key_has_none(service: Service, program: str) -> None:
    assert service.environment["PGPASSWORD"] == "of-a-neighbour"
    if program == "valkey":  # it overwrites its environment in memory
        command = (service.var / "supervisord.conf").read_text()
        assert "of-a-neighbour" not in command and "/usr/bin/env -i" in command
    else:
        assert "PGPASSWORD" not in service.find(program).environ()


@pytest.mark.parametrize(
    "path",
    [
        "/ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/gateway/secrets/list",
        "/api/2.0/mlflow/webhooks",
        "/ajax-api/3.0/jobs/1",
        "/ajax-api/3.0/mlflow/mcp-servers",
        "/v1/traces",
        "/docs",
    ],
)
def test_mlflow_serves_nothing_but_tracking_and_the_registry(service: Service, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx2.request(method, service.mlflow_url + path, trust_env=False)
        assert answer.status_code == 404 and answer.json()["error_code"] == "ENDPOINT_NOT_FOUND"


@pytest.mark.parametrize(
    "path", ["/", "/ajax-api/3.0/mlflow/server-info", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"]
)
def test_the_pages_of_mlflow_are_served(service: Service, path: str) -> None:
    assert httpx2.get(service.mlflow_url + path, trust_env=False).status_code == 200


@pytest.mark.parametrize("name", ["artifact_location", "artifactLocation"])
def test_no_experiment_of_mlflow_reads_a_folder_of_this_machine(service: Service, name: str) -> None:
    asked = {"name": f"a-folder-by-{name}", name: "file:///etc"}
    answer = httpx2.post(f"{service.mlflow_url}/api/2.0/mlflow/experiments/create", json=asked, trust_env=False)
    assert answer.status_code == 400 and "artifact_location" in answer.json()["message"]
