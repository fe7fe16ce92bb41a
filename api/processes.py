"""Several API processes on one port: starts them, replaces what dies, ends them in order. Knows no route.

They share one socket, which the supervisor binds: whoever is idle takes the next connection, and connections that wait
there outlive the process that dies. Each is a process as there would be one alone, told its part of the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import structlog
import uvicorn
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from api import metrics
from api.socket_drain import ACCEPT_BACKLOG_S, DRAIN_S, stop_accepting
from settings import Settings

# Libraries take 3 s to load, and many times that on a busy machine; nobody is held to hang before.
LOADS_WITHIN_S = 120.0
# A process that does not answer its supervisor for this long is replaced.
HANGS_AFTER_S = 5

log = structlog.get_logger()


def divided(settings: Settings) -> dict[str, str]:
    """Return what each process finds in its environment: its part of the engine's threads and of the memory."""
    count = settings.api_processes
    return {
        "ESPALIER_API_PROCESSES": "1",
        "ESPALIER_THREADS": str(max(1, settings.engine_threads // count)),
        "ESPALIER_SHELF_BYTES": str(max(1, settings.shelf_bytes // count)),
    }


def shares(processors: Sequence[int], count: int) -> list[set[int]]:
    """Return the processors of each process: no two have the same if there are enough.

    Else a process' decoding takes the processors from another's engine. (OpenVINO's own binding, the same in every
    process, its issue 32444, is off: see `inference.engine`.)
    """
    found = len(processors)
    if count > found:
        return [{processors[number % found]} for number in range(count)]
    return [set(processors[number * found // count : (number + 1) * found // count]) for number in range(count)]


def run(settings: Settings, make_server: Callable[[], uvicorn.Server]) -> None:
    """Serve with as many processes as settings say until told to stop.

    `make_server` is called in each of them; a module must have it under its name.
    """
    config = uvicorn.Config(
        "",  # every process makes its own
        host=settings.api_host,
        port=settings.api_port,
        log_level="warning",
        workers=settings.api_processes,
        timeout_worker_healthcheck=HANGS_AFTER_S,
    )
    with tempfile.TemporaryDirectory(prefix="espalier-metrics-") as folder:
        os.environ |= {metrics.FOLDER: folder, **divided(settings)}
        Supervisor(config, config.bind_socket(), make_server, Path(folder)).run()


class Supervisor(Multiprocess):
    """Uvicorn's supervisor, for processes that take long to start and make their server themselves."""

    def __init__(
        self, config: uvicorn.Config, shared: socket, make_server: Callable[[], uvicorn.Server], folder: Path
    ) -> None:
        """Take signals over. `folder` is where the metrics of all processes are."""
        hangups = signal.getsignal(signal.SIGHUP)
        super().__init__(config, [shared])
        if hangups is signal.SIG_IGN:  # by nohup
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._make_server = make_server
        self._folder = folder
        self._shares = shares(processors(), config.workers)

    def init_processes(self) -> None:
        self.processes = [self._start(place) for place in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        """Replace what died or hangs, however often: what the others answer must not end with it."""
        for place, process in enumerate(self.processes):
            if process.is_alive(self.config.timeout_worker_healthcheck):
                continue
            process.kill()
            process.join()
            log.error("an API process died or hung; it is replaced", process=process.pid, exit_code=process.exitcode)
            assert process.pid is not None
            metrics.forget(self._folder, process.pid)
            self.processes[place] = self._start(place)

    def terminate_all(self) -> None:
        """Tell all to end. They go on for a moment; before the last of them goes, the port takes no more."""
        super().terminate_all()
        time.sleep(DRAIN_S - ACCEPT_BACKLOG_S)
        for shared in self.sockets:
            stop_accepting(shared.fileno())
            shared.close()

    def handle_hup(self) -> None:
        """End, as one process alone does when its terminal closes."""
        self.handle_term()

    def handle_ttin(self) -> None:
        """Stay as many: the machine is divided among them."""

    def handle_ttou(self) -> None:
        """Stay as many."""

    def _start(self, place: int) -> Process:
        process = _Process(self.config, self.sockets, self._make_server)
        with _confined_to(self._shares[place]):  # which the process inherits, before it loads anything
            process.start()
        return process


class _Process(Process):
    """One API process, as its supervisor holds it."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket], make_server: Callable[[], uvicorn.Server]
    ) -> None:
        super().__init__(config, sockets)
        self._make_server = make_server
        self._began = time.monotonic()

    def is_alive(self, timeout: float = HANGS_AFTER_S) -> bool:
        """Say whether it runs and answers; of one that may still be loading its libraries, whether it runs."""
        if time.monotonic() < self._began + LOADS_WITHIN_S:
            return self.process.is_alive()
        return super().is_alive(timeout)

    def target(self, sockets: list[socket] | None = None) -> None:
        """Serve; this runs in the process."""
        threading.Thread(target=_end_with_supervisor, name="supervisor", daemon=True).start()
        self._server = self._make_server()
        super().target(sockets)


def _end_with_supervisor() -> None:
    """Wait until the supervisor is gone, however it went, and end as it would have asked."""
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    supervisor.join()
    os.kill(os.getpid(), signal.SIGTERM)


def processors() -> list[int]:
    """Return the processors that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def _confined_to(share: set[int]) -> Iterator[None]:
    """Have what is started meanwhile run on these processors alone, where the system can."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
