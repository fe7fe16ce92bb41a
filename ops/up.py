"""Runs the whole service on this machine under a supervisor. Run as `python -m ops.up`, or `make up`.

The service consists of the API, a worker for each queue, MLflow, a broker (Valkey, unless REDIS_URL names one) and by
default SQLite. The supervisor restarts processes that die and rotates their logs. Ctrl-C stops everything. For
production, use docker-compose.yml.
"""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

import environments
from artifacts.bucket_store import open_store
from errors import StoreRefused
from ops.migrate import open_migrated
from ops.valkey_binary import get_binary_path
from settings import Settings, sqlite_url
from startup import UMASK, CannotStart, load_settings, prepare_folder, unusable_folder

# Seconds in which the API must answer, and after that in which all other parts must.
ANSWERS_WITHIN_S = 300.0
READY_WITHIN_S = 30.0
# The supervisor first stops all programs with the highest priority number together, then those with the next lower one.
# A worker gives its job back within 25 s.
_WORKER_STOP_S = 30
STOP_WITHIN_S = 60

_ROOT = Path(__file__).parent.parent
# The variable from which the supervisor has the folder of our code, in which it starts all programs.
_CODE = "ESPALIER_CODE"
_TRAINING_QUEUES = ("cpu", "gpu")

# The address at which to reach a service on this machine, for each address on which it may listen.
_ASK_AT = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}  # noqa: S104


_LOG_BYTES = "20MB"
_LOGS_KEPT = 3

console = Console(highlight=False)


@dataclass(frozen=True)
class Program:
    """A process that the supervisor runs.

    Attributes:
        name: the program's name in the supervisor and of its log.
        command: the command with its arguments.
        priority: the supervisor starts programs in ascending order of this number and stops them in descending order.
        stop_s: seconds after SIGTERM until the supervisor kills the process.
        environment: environment variables in addition to those of the supervisor.
    """

    name: str
    command: Sequence[str]
    priority: int
    stop_s: int
    environment: Mapping[str, str] = field(default_factory=dict)
    is_trusted: bool = True
    """Whether it has the environment of this process, in which there may be keys and passwords."""


def client(settings: Settings, timeout_s: float = 30.0) -> httpx2.Client:
    """Return an HTTP client for the API on this machine, which sends the API key."""
    headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
    host = _ASK_AT.get(settings.api_host, settings.api_host)
    base = f"http://[{host}]:{settings.api_port}" if ":" in host else f"http://{host}:{settings.api_port}"
    # The service runs on this machine, so no proxy is used.
    return httpx2.Client(base_url=base, headers=headers, timeout=timeout_s, trust_env=False)


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Start the service, wait until it is ready, and stop it at the end of the block.

    Yields the process of the supervisor. Raises CannotStart if the API does not answer. If another part is not ready in
    time, the service runs without it, and the console says so.
    """
    folder = settings.var.absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_end_us())
        make_private(folder)
        stack.enter_context(_locked(folder))
        _check_port(settings.api_host, settings.api_port, "ESPALIER_API_PORT")
        if settings.mlflow_url is None:
            _check_port("127.0.0.1", settings.mlflow_port, "ESPALIER_MLFLOW_PORT")
        _check_store(settings)
        open_migrated(settings).close()
        # The path of a unix socket may have only about 100 bytes, so the socket is not in the data folder.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espalier-")))
        environment = os.environ | {
            "ESPALIER_VAR": str(folder),
            "REDIS_URL": settings.redis_url or f"redis+socket://{sockets / 'valkey.sock'}",
            "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"))),
        }
        config = folder / "supervisord.conf"
        _write_config(config, folder, programs(settings, folder, sockets))
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--silent", "--configuration", str(config)],
            cwd=folder,
            env=environment | {_CODE: str(_ROOT)},
            start_new_session=True,  # so that Ctrl-C reaches only this process, which then stops the supervisor
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        stack.callback(_stop, supervisor)
        _wait_until_ready(settings, supervisor, folder)
        yield supervisor


def programs(settings: Settings, folder: Path, sockets: Path) -> list[Program]:
    """Return the programs that the supervisor runs: workers, API, and if they are not configured, MLflow and broker."""
    found = [
        *workers(settings),
        Program("api", [sys.executable, "-m", "api.app"], 30, stop_s=15),
    ]
    if settings.mlflow_url is None:
        found.append(mlflow_server(settings.mlflow_port, folder / "mlflow"))
    if settings.redis_url is None:
        binary = shutil.which("valkey-server") or shutil.which("redis-server") or str(get_binary_path())
        serve = [binary, "--port", "0", "--unixsocket", str(sockets / "valkey.sock"), "--unixsocketperm", "700"]
        # Messages need not survive a restart, because jobs are in the database.
        keep_nothing = ["--save", "", "--appendonly", "no", "--dir", str(sockets)]
        found.append(Program("broker", [*serve, *keep_nothing], 10, stop_s=5, is_trusted=False))
    return found


# Files and folders that Espalier makes in its data folder, one of which shows that the folder is Espalier's.
_OUR_FILES = frozenset({"lock", "espalier.db", "store", "cache", "features", "pixels", "mlflow", "logs"})


def make_private(folder: Path) -> None:
    """Let only this user open the data folder, and read whatever this process and those that it starts write.

    Raises CannotStart if that is impossible, or would lock others out of a folder that they share with Espalier.
    """
    prepare_folder(folder)
    found = {file.name for file in folder.iterdir()}
    is_ours = not found or bool(found & _OUR_FILES)
    if not is_ours or folder.stat().st_mode & stat.S_ISVTX or folder in (Path.home(), Path(folder.anchor)):
        raise unusable_folder(folder, "it has files of other programs, and Espalier would make it private")
    try:
        folder.chmod(0o700)
    except OSError as error:
        raise unusable_folder(folder, error.strerror or str(error)) from error


def workers(settings: Settings) -> list[Program]:
    """Return the Celery workers: `settings.workers` for each queue that trains, and one for each other queue.

    Workers of a training queue divide the processors among them, unless `settings.threads` sets their threads.
    """
    return [worker for queue in settings.queues for worker in _workers_of(settings, queue)]


def _workers_of(settings: Settings, queue: str) -> list[Program]:
    if settings.workers == 1 or queue not in _TRAINING_QUEUES:
        return [_worker(queue, queue)]
    threads = settings.threads or max(1, settings.engine_threads // settings.workers)
    environment = {"ESPALIER_THREADS": str(threads)}
    return [_worker(queue, f"{queue}-{number}", environment) for number in range(1, settings.workers + 1)]


def _worker(queue: str, name: str, environment: Mapping[str, str] | None = None) -> Program:
    command = [sys.executable, "-m", "celery", "--app", "worker.app", "worker", "--queues", queue]
    # Celery workers need not talk to each other (gossip, mingle), because they coordinate through the database.
    alone = ["--hostname", f"{name}@%h", "--without-gossip", "--without-mingle", "--loglevel", "WARNING"]
    return Program(f"worker-{name}", [*command, *alone], 40, _WORKER_STOP_S, environment or {})


def mlflow_server(port: int, folder: Path) -> Program:
    """Return a program that runs MLflow's server as a single process.

    The command `mlflow server` starts uvicorn in a child process. If the command is killed, the child survives and
    keeps the port, so the supervisor could not restart the server. Therefore this program runs uvicorn directly, and
    serves only the paths that Espalier needs (`worker.mlflow_server`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = sqlite_url(folder / "mlflow.db")
    environment = {
        # These variables are private to MLflow: `mlflow server` passes its options to uvicorn in them. There are no
        # public ones, since variables such as MLFLOW_BACKEND_STORE_URI are options of that command. If an update of
        # MLflow renames them, tests/worker/handlers/test_tracking.py fails, because it starts this program.
        "_MLFLOW_SERVER_FILE_STORE": rows,
        "_MLFLOW_SERVER_REGISTRY_STORE": rows,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": (folder / "artifacts").as_uri(),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # would start eight more processes, for language models
    }
    serve = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port)]
    serve.append("worker.mlflow_server:app")
    return Program("mlflow", serve, 20, stop_s=5, environment=environment, is_trusted=False)


def command_line(program: Program, folder: Path) -> list[str]:
    """Return the command of a program, which for an untrusted one starts from an environment without secrets."""
    if program.is_trusted:
        return list(program.command)
    kept = {**environments.without_secrets(), **program.environment, "ESPALIER_VAR": str(folder)}
    return ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in kept.items()), *program.command]


def _write_config(path: Path, folder: Path, supervised: Sequence[Program]) -> None:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config = configparser.RawConfigParser()
    # Paths are relative to the data folder, in which the supervisor runs: the supervisor expands some paths once and
    # others twice, so that no way of writing a percent sign suits both.
    config["supervisord"] = {
        "logfile": "logs/supervisor.log",
        "logfile_maxbytes": _LOG_BYTES,
        "logfile_backups": str(_LOGS_KEPT),
        "pidfile": "supervisord.pid",
        "umask": f"{UMASK:03o}",
    }
    for program in supervised:
        config[f"program:{program.name}"] = {
            "command": _escaped(shlex.join(command_line(program, folder))),
            "environment": ",".join(f"{name}={value}" for name, value in _own_variables(program).items()),
            "directory": f"%(ENV_{_CODE})s",
            "priority": str(program.priority),
            "autorestart": "true",
            "startsecs": "2",
            "startretries": "1000000",
            "stopsignal": "TERM",
            "stopwaitsecs": str(program.stop_s),
            "stopasgroup": "false",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": f"logs/{program.name}.log",
            "stdout_logfile_maxbytes": _LOG_BYTES,
            "stdout_logfile_backups": str(_LOGS_KEPT),
        }
    with path.open("w") as file:
        config.write(file)


def _own_variables(program: Program) -> Mapping[str, str]:
    """Return the variables that the supervisor adds to its own: numbers. Those of others are part of the command."""
    return program.environment if program.is_trusted else {}


def _escaped(command: str) -> str:
    """Return a quoted command line as the supervisor's configuration needs it.

    The supervisor expands percent signs. It takes a semicolon or a hash sign after a space for a comment, so an empty
    string in quotes comes between the two.
    """
    return re.sub(r"(?<=\s)(?=[;#])", "''", command.replace("%", "%%"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the data folder while the block runs. Raises CannotStart if another service is running on the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CannotStart(
                f"Espalier is already running with the data folder {folder}. Stop it with Ctrl-C in its terminal, or "
                "set ESPALIER_VAR to another folder."
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
                f"Port {port} cannot be used: {error.strerror}. Stop the program that uses the port, or choose another "
                f"port: {setting}={port + 1} make up"
            ) from error


def _check_store(settings: Settings) -> None:
    """If a bucket for stored files is configured, check that it allows access. Raises CannotStart."""
    try:
        open_store(settings.store)
    except StoreRefused as error:
        raise CannotStart(error.detail) from error


def _wait_until_ready(settings: Settings, supervisor: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for all parts of the service, and print that it is ready, or which parts are missing.

    Raises CannotStart if the supervisor ends, or the API does not answer in time.
    """
    answers_until = time.monotonic() + ANSWERS_WITHIN_S
    ready_until: float | None = None
    with console.status("starting …") as status, client(settings, timeout_s=5.0) as api:
        while True:
            if supervisor.poll() is not None:
                raise CannotStart(f"The supervisor ended unexpectedly. The last lines of all logs:\n{_tails(folder)}")
            missing = _missing_parts(settings, api)
            if missing is None and time.monotonic() > answers_until:
                raise CannotStart(
                    f"The API did not answer within {ANSWERS_WITHIN_S:.0f} s. The last lines of all logs:\n"
                    f"{_tails(folder)}"
                )
            if missing is not None:
                ready_until = ready_until or time.monotonic() + READY_WITHIN_S
                if not missing or time.monotonic() > ready_until:
                    break
            status.update(f"starting … waiting for {'the API' if missing is None else ', '.join(missing)}")
            time.sleep(0.3)
    if not missing:
        console.print("[bold green]Espalier is ready.[/]")
    else:  # what answers goes on answering, and what is missing may still come
        console.print(
            f"Espalier is running, but not all of it works yet. Still missing: {'; '.join(missing)}. It is "
            f"started again and again, and GET /readyz shows when it works. The logs are in {folder / 'logs'}.",
            style="bold red",
            markup=False,
            soft_wrap=True,
        )


def _missing_parts(settings: Settings, api: httpx2.Client) -> list[str] | None:
    """Return the parts that do not work yet, each with the reason, or None if the API itself does not answer."""
    try:
        checks: dict[str, Any] = api.get("/readyz").json()["checks"]
    except (httpx2.HTTPError, ValueError, KeyError):
        return None
    missing = [f"{name} ({check['detail']})" for name, check in checks.items() if not check["ok"]]
    if settings.mlflow_url is None and not mlflow_answers(settings.mlflow):
        missing.append(f"MLflow (no answer at {settings.mlflow})")
    return missing


def mlflow_answers(url: str) -> bool:
    """Return whether MLflow's server answers a query of its database. The first query creates the tables."""
    try:
        address = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
        return httpx2.get(address, timeout=5.0, trust_env=False).is_success
    except httpx2.HTTPError:
        return False


def _tails(folder: Path, lines: int = 15) -> str:
    """Return the last `lines` lines of each log, as text."""
    parts = []
    for log in sorted((folder / "logs").glob("*.log")):
        parts += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-lines:]]
    return "\n".join(parts)


@contextlib.contextmanager
def _signals_end_us() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on SIGINT, SIGTERM or SIGHUP."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handled = [number for number in _STOP_SIGNALS if not _is_ignored_on_purpose(number)]
    before = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _is_ignored_on_purpose(number: signal.Signals) -> bool:
    """Return whether a signal should stay ignored: only SIGHUP, which `nohup` has made this process ignore.

    A shell makes background processes (`&`) ignore SIGINT. Espalier handles SIGINT even then.
    """
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _end_with_parent() -> None:
    """Make Linux send SIGTERM to the supervisor if this process is killed, so that the whole service ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _stop(supervisor: subprocess.Popen[bytes]) -> None:
    """Stop the supervisor and its programs. Ignore Ctrl-C meanwhile, since it would leave programs running."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOP_SIGNALS}
    try:
        if supervisor.poll() is None:
            with console.status("stopping …"):
                supervisor.terminate()
                supervisor.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        console.print(
            f"The supervisor (process {supervisor.pid}) did not end within {STOP_WITHIN_S} s. Look for the cause in "
            "supervisor.log, then kill the process."
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def addresses(settings: Settings) -> str:
    """Return the addresses of the API and of MLflow, and the folders of data and logs, as text."""
    return (
        f"API     http://127.0.0.1:{settings.api_port}/docs\n"
        f"MLflow  {settings.mlflow_public}\n"
        f"Data    {settings.var.absolute()}   Logs {settings.var.absolute() / 'logs'}"
    )


def main() -> int:
    """Run the service until Ctrl-C; return the exit status."""
    try:
        settings = load_settings()
        with running(settings) as supervisor:
            console.print(f"Ctrl-C stops it.\n{addresses(settings)}")
            supervisor.wait()
    except CannotStart as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
