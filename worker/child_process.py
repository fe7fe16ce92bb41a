"""A child process for a job, or for several about one run: starts it, exchanges JSON lines with it, and ends it.

The child runs in a process group of its own and ends when its standard input closes, so that it cannot outlive its
worker. Messages come through a pipe of their own; whatever libraries print, from their import on, goes to standard
error.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Protocol

import structlog

import environments
from artifacts.store import Store, disk_errors
from errors import Crashed, EspalierError, OutOfMemory
from worker.lease import Work
from worker.messages import ChildMessage, Drain, Failed, Order, WorkerMessage, line_of, parse_child_message
from worker.oom_kills import count_kills

log = structlog.get_logger()

STOP_GRACE_S = 5.0
_POLL_S = 0.25
_WAITING = 1000
_STDERR = 2

_STORE_KEYS = "AWS_"
_FOLDERS = "espalier-child-"

# Stands in the queue of lines for the end of the pipe; no line is empty.
_END: Final = ""


def store_keys(store: Store) -> dict[str, str]:
    """Return the variables that a child needs to open a store: for one that decodes no file of a stranger first."""
    if store.address.url is None:
        return {}
    keys = {name: value for name, value in os.environ.items() if name.startswith(_STORE_KEYS)}
    return keys | environments.proxies()


def computing_threads(threads: int) -> dict[str, str]:
    """Return the variables that limit TensorFlow to so many threads; after its import they have no effect.

    The last digits of scores depend on the number, since sums are made in another order.
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
    """Remove the temporary folders of children whose workers were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        owner = folder.name.removeprefix(_FOLDERS).split("-")[0]
        if owner.isdigit() and not _is_there(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


class ChildDied(Exception):
    """The child ended without a result; `signal` is the number that killed it, or None."""

    def __init__(self, returncode: int, *, for_memory: bool = False) -> None:
        self.for_memory = for_memory
        self.signal = -returncode if returncode < 0 else None
        name = signal.Signals(self.signal).name if self.signal else f"exit status {returncode}"
        self.detail = f"The process ended with {name}."
        super().__init__(self.detail)

    def as_failure(self) -> EspalierError:
        """Return the error that this is for a whole job."""
        if self.for_memory:
            return OutOfMemory(
                "The kernel killed the work for the memory it took. Use smaller images, a smaller batch_size or a "
                "machine with more memory."
            )
        return Crashed(f"{self.detail} The worker's log has more.")


class ChildEnded(Exception):
    """The child has done its work and ended; it will send nothing more."""


class ChildConnection(Protocol):
    """A child as its handler sees it: a `Child`, or one that a simulation plays."""

    @property
    def is_alive(self) -> bool: ...

    def send(self, message: WorkerMessage) -> None: ...

    def receive(self, work: Work) -> ChildMessage | None: ...

    def drain(self, within_s: float) -> list[ChildMessage]: ...

    def stop(self) -> object: ...


class Child:
    """A running child, with its first order or waiting for one; stopped at the end of a `with` block, or by hand."""

    def __init__(
        self,
        order: Order | None = None,
        environment: Mapping[str, str] | None = None,
        count_kills: Callable[[], int] = count_kills,
    ) -> None:
        """Start a child; raise DiskFull if there is no room for it, or Crashed if the system has no more processes."""
        self._count_kills = count_kills
        self._kills = count_kills()
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
                env={**environments.without_secrets(), "TMPDIR": self._folder.name, **(environment or {})},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._incoming.close()
            self._folder.cleanup()
            raise Crashed(f"No process could be started for the work: {error}.") from error
        finally:
            os.close(outgoing)
        self._lines: queue.Queue[str] = queue.Queue(_WAITING)
        self._reader = threading.Thread(target=self._read, name="child-reader", daemon=True)
        self._reader.start()
        if order is not None:
            self.send(order)

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

    def send(self, message: WorkerMessage) -> None:
        """Send one message to the child; that it has died is noticed by `receive`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line_of(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, work: Work) -> ChildMessage | None:
        """Return the child's next message, or None if there was none for a moment.

        Raises:
            Stopped: the job must end.
            ChildEnded: the child has done its work and ended.
            ChildDied: the child ended otherwise.
            EspalierError: the child reported what went wrong; Crashed if it sent a line that is no message.
        """
        work.check()
        try:
            line = self._lines.get(timeout=_POLL_S)
        except queue.Empty:
            return None
        work.moved()
        if line == _END:
            returncode = self._process.wait()
            if returncode:
                is_killed = returncode == -signal.SIGKILL
                raise ChildDied(returncode, for_memory=is_killed and self._count_kills() > self._kills)
            raise ChildEnded
        message = parse_child_message(line)
        if isinstance(message, Failed):
            raise message.as_error()
        return message

    def drain(self, within_s: float) -> list[ChildMessage]:
        """Tell the child to write its last checkpoints and to end; return all messages until then."""
        until = time.monotonic() + within_s
        self.send(Drain())
        lines: list[str] = []
        while (left_s := until - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left_s)
            except queue.Empty:
                break
            if line == _END:
                self._lines.put(_END)  # for the next `receive`
                break
            lines.append(line)
        return _messages_in(lines)

    def stop(self) -> list[ChildMessage]:
        """End the child's whole process group, by SIGTERM and then by SIGKILL; return its unread messages."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        self._signal(signal.SIGKILL)  # whatever the child itself left running
        unread = self._take_lines()
        while self._reader.is_alive():
            self._reader.join(0.05)
            unread += self._take_lines()
        for stream in (self._process.stdin, self._incoming):
            _close(stream)
        self._folder.cleanup()
        return _messages_in(unread)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _take_lines(self) -> list[str]:
        waiting = [self._lines.get_nowait() for _ in range(self._lines.qsize())]
        return [line for line in waiting if line != _END]

    def _read(self) -> None:
        """Queue each line as it is: a broken one is an error of whoever receives it, not of this thread."""
        for line in self._incoming:
            if line.endswith("\n"):  # else the child died in the middle of a message
                self._lines.put(line)
        self._lines.put(_END)


def messages(child: ChildConnection, work: Work) -> Iterator[ChildMessage]:
    """Yield the messages of a child until it ends. Raises what `Child.receive` does, but for ChildEnded."""
    while True:
        try:
            message = child.receive(work)
        except ChildEnded:
            return
        if message is not None:
            yield message


def _messages_in(lines: Sequence[str]) -> list[ChildMessage]:
    """Return the messages of a child that is ending; lines that are none are logged and left out."""
    messages = []
    for line in lines:
        try:
            messages.append(parse_child_message(line))
        except Crashed as error:
            log.error("unreadable message of a child", error=error.detail)
    return messages


def _close(stream: IO[str] | None) -> None:
    assert stream is not None
    try:
        stream.close()
    except BrokenPipeError:
        return
