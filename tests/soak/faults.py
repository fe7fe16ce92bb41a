"""Kills, freezes and restarts parts of a running service at random. Knows no recipes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import select

from errors import EspalierError
from models.job import Job, JobState
from models.session import Database

TRAINING_WORKER = "--queues cpu"
"""What the command of the worker that trains holds."""

# Settings with the shortest leases that a busy machine can keep.
TIMINGS = {
    "look_every_s": 1.0,
    "renew_every_s": 1.0,
    "let_go_s": 6.0,
    "lease_s": 10.0,
    "cancel_every_s": 0.5,
    "stall_s": 90.0,
    "mlflow_timeout_s": 5.0,
}


@dataclass
class FaultInjector:
    """Strikes with random faults, and measures how long a killed job takes to continue."""

    var: Path
    database: Database
    restart_database: Callable[[float], None]
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    taken_over_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)

    def strike(self) -> None:
        """Strike with one random fault and count it if it found a victim."""
        kinds: dict[str, tuple[int, Callable[[], bool]]] = {
            "worker killed": (4, lambda: self._kill(TRAINING_WORKER)),
            "trainer killed": (4, lambda: self._kill("worker.child")),
            "api killed": (2, lambda: self._kill("api.app")),
            "mlflow killed": (1, lambda: self._kill("mlflow_server")),
            "broker killed": (2, lambda: self._kill("valkey-server")),
            "worker told to end": (2, lambda: self._signal(TRAINING_WORKER, signal.SIGTERM)),
            "worker frozen past its lease": (2, lambda: self._freeze(TRAINING_WORKER, 1.6 * TIMINGS["lease_s"])),
            "trainer frozen": (2, lambda: self._freeze("worker.child", self.chance.uniform(1, 15))),
            "api frozen": (1, lambda: self._freeze("api.app", self.chance.uniform(1, 5))),
            "database away": (2, self._restart_database),
        }
        names = list(kinds)
        [name] = self.chance.choices(names, [kinds[name][0] for name in names])
        if kinds[name][1]():
            self.done[name] += 1

    def _kill(self, name: str) -> bool:
        watched = self._holders()
        if not self._signal(name, signal.SIGKILL):
            return False
        if name in (TRAINING_WORKER, "worker.child"):
            threading.Thread(target=self._watch, args=(watched,), daemon=True).start()
        return True

    def _signal(self, name: str, number: signal.Signals) -> bool:
        victims = find(self.var, name)
        if not victims:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            self.chance.choice(victims).send_signal(number)
        return True

    def _freeze(self, name: str, seconds: float) -> bool:
        """Suspend a process, a worker together with its child, and resume it later."""
        victims = find(self.var, name)
        if not victims:
            return False
        victim = self.chance.choice(victims)
        with contextlib.suppress(psutil.NoSuchProcess):
            frozen = [victim, *(victim.children(recursive=True) if name == TRAINING_WORKER else ())]
            for process in frozen:
                process.suspend()
            threading.Timer(seconds, _resume, [frozen]).start()
        return True

    def _restart_database(self) -> bool:
        self.restart_database(self.chance.uniform(0.5, 12))
        return True

    def _holders(self) -> dict[str, int]:
        """Return the lease epochs of the trainings that are under way."""
        with contextlib.suppress(EspalierError), self.database.reading() as session:
            kinds = ("train", "fold", "final")
            query = select(Job.id, Job.lease_epoch).where(Job.state == JobState.RUNNING, Job.kind.in_(kinds))
            return {row.id: row.lease_epoch for row in session.execute(query)}
        return {}

    def _watch(self, before: dict[str, int]) -> None:
        """Measure the seconds until a job that lost its worker is queued again, and until another worker runs it."""
        began = time.monotonic()
        freed: set[str] = set()
        while time.monotonic() - began < 300 and before:
            time.sleep(0.1)
            spent_s = time.monotonic() - began
            with contextlib.suppress(EspalierError), self.database.reading() as session:
                for job in session.scalars(select(Job).where(Job.id.in_(list(before)))):
                    is_free = job.state is JobState.QUEUED or job.lease_epoch > before[job.id]
                    if is_free and job.id not in freed:
                        freed.add(job.id)
                        self.taken_over_s.append(spent_s)
                    if job.state is JobState.RUNNING and job.lease_epoch > before[job.id]:
                        self.resumed_s.append(spent_s)
                        del before[job.id]
                    elif job.state not in (JobState.RUNNING, JobState.QUEUED):
                        del before[job.id]


def find(var: Path, name: str) -> list[psutil.Process]:
    """Return the processes of this service whose command contains a name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("ESPALIER_VAR") == str(var) or name == "valkey-server"
            command = " ".join(process.cmdline())
            if is_ours and name in command and (name != "valkey-server" or str(os.getpid()) in _ancestors(process)):
                found.append(process)
    return found


def _ancestors(process: psutil.Process) -> list[str]:
    return [str(parent.pid) for parent in process.parents()]


def _resume(frozen: Sequence[psutil.Process]) -> None:
    for process in reversed(frozen):
        with contextlib.suppress(psutil.Error):
            process.resume()
