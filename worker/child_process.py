"""A child process for a job, or for several about one run: starts it, talks with it in JSON lines, and ends it.

The child runs in a process group of its own and ends when its standard input closes, so that it cannot outlive its
worker. Messages come through a pipe of their own; whatever libraries print, from their import on, goes to standard
error.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from artifacts.store import Store, disk_errors
from errors import Crashed, EspalierError, OutOfMemory, from_record
from worker.lease import Stopped, Work
from worker.oom_kills import count_kills

STOP_GRACE_S = 5.0
_POLL_S = 0.25
_WAITING = 1000
_STDERR = 2

# A child decodes files of strangers: what it does not need, they cannot take.
_SECRETS = ("DATABASE_URL", "ESPALIER_API_KEY", "MLFLOW_TRACKING_URI", "REDIS_URL", "ESPALIER_STORE_", "AWS_")
_STORE_KEYS = "AWS_"
_FOLDERS = "espalier-child-"

Message = dict[str, Any]

_END = object()


def store_keys(store: Store) -> dict[str, str]:
    """Return the variables that a child needs to open a store: for one that decodes no file of a stranger first."""
    if store.address.url is None:
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(_STORE_KEYS)}


def computing_threads(threads: int) -> dict[str, str]:
    """Return the variables that limit TensorFlow to so many threads; once it is imported they change nothing.

    Scores hang on the number, if only in their last digits: sums are made in another order.
    """
    return {"TF_NUM_INTRAOP_THREADS": str(threads), "TF_NUM_INTEROP_THREADS": str(threads)}


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def clear_left_folders() -> None:
    """Remove what children of workers that were killed have left in the folder for temporary files."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        owner = folder.name.removeprefix(_FOLDERS).split("-")[0]
        if owner.isdigit() and not _is_there(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


class Died(Exception):
    """The child ended without a result; `signal` is the number that killed it, or None."""

    def __init__(self, returncode: int, *, for_memory: bool = False) -> None:
        self.for_memory = for_memory
        self.signal = -returncode if returncode < 0 else None
        name = signal.Signals(self.signal).name if self.signal else f"exit status {returncode}"
        self.detail = f"The process ended with {name}."
        super().__init__(self.detail)

    def as_failure(self) -> EspalierError:
        """Return what this means for a whole job."""
        if self.for_memory:
            return OutOfMemory(
                "The kernel killed the work for the memory it took. Use smaller images, a smaller batch_size or a "
                "machine with more memory."
            )
        return Crashed(f"{self.detail} The worker's log has more.")


class Talking(Protocol):
    """A child as those see it who talk with it: a `Child`, or one that a simulation plays."""

    @property
    def is_alive(self) -> bool: ...

    def order(self, order: Mapping[str, Any]) -> None: ...

    def send(self, message: Mapping[str, Any]) -> None: ...

    def receive(self, work: Work, idle: Callable[[], None] = ...) -> Message | None: ...

    def drain(self, within_s: float) -> list[Message]: ...

    def stop(self) -> object: ...


class Child:
    """A running child, with its first order or waiting for one; stopped at the end of a `with` block, or by hand."""

    def __init__(
        self,
        order: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        count_kills: Callable[[], int] = count_kills,
    ) -> None:
        """Start a child; raise DiskFull if there is no room for it, or Crashed if the system has no more processes."""
        self._count_kills = count_kills
        self._kills = count_kills()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}
        # Its own: whatever it leaves there when it is killed goes with it.
        prefix = f"{_FOLDERS}{os.getpid()}-"
        with disk_errors():
            self._folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        incoming, outgoing = os.pipe()
        self._incoming = os.fdopen(incoming, encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.child", str(outgoing)],
                stdin=subprocess.PIPE,
                stdout=_STDERR,
                pass_fds=(outgoing,),
                start_new_session=True,
                env={**inherited, "TMPDIR": self._folder.name, **(environment or {})},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._incoming.close()
            self._folder.cleanup()
            raise Crashed(f"No process could be started for the work: {error}.") from error
        finally:
            os.close(outgoing)
        self._messages: queue.Queue[Any] = queue.Queue(_WAITING)
        self._reader = threading.Thread(target=self._read, name="child-reader", daemon=True)
        self._reader.start()
        if order is not None:
            self.order(order)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        """Whether the child has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The child's process id, which is its group's too."""
        return self._process.pid

    def order(self, order: Mapping[str, Any]) -> None:
        """Have the child do something."""
        self.send({"type": "order", **order})

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message to the child; a child that has died is noticed when it is listened to."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, work: Work, idle: Callable[[], None] = lambda: None) -> Message | None:
        """Return the child's next message, or None at its end; `idle` is called now and then while there is none.

        Raises:
            Stopped: the job must end.
            Died: the child ended without being done.
            EspalierError: the child said what went wrong.
        """
        while True:
            work.check()
            try:
                message = self._messages.get(timeout=_POLL_S)
            except queue.Empty:
                idle()
                continue
            work.moved()
            if message is _END:
                returncode = self._process.wait()
                if returncode:
                    is_killed = returncode == -signal.SIGKILL
                    raise Died(returncode, for_memory=is_killed and self._count_kills() > self._kills)
                return None
            if message["type"] == "error":
                raise from_record(message["error"])
            return dict(message)

    def drain(self, within_s: float) -> list[Message]:
        """Tell the child to keep how far it is and to end; return all that it has to say until then."""
        until = time.monotonic() + within_s
        self.send({"type": "drain"})
        heard: list[Message] = []
        while (left_s := until - time.monotonic()) > 0:
            try:
                message = self._messages.get(timeout=left_s)
            except queue.Empty:
                break
            if message is _END:
                self._messages.put(_END)  # for whoever listens next
                break
            heard.append(message)
        return heard

    def stop(self) -> list[Message]:
        """End the child's whole group: politely, then not. Return what it had said that nobody has heard."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        self._signal(signal.SIGKILL)  # whatever the child itself left running
        unheard = self._drain()
        while self._reader.is_alive():
            self._reader.join(0.05)
            unheard += self._drain()
        for stream in (self._process.stdin, self._incoming):
            _close(stream)
        self._folder.cleanup()
        return unheard

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _drain(self) -> list[Message]:
        waiting = [self._messages.get_nowait() for _ in range(self._messages.qsize())]
        return [message for message in waiting if message is not _END]

    def _read(self) -> None:
        for line in self._incoming:
            if line.endswith("\n"):  # else the child died in the middle of a message
                self._messages.put(json.loads(line))
        self._messages.put(_END)


def _close(stream: Any) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return


__all__ = ["Child", "Died", "Message", "Stopped"]
