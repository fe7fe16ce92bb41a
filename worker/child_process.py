"""Starts a child process for one job, or for several jobs of one run, exchanges JSON lines with it, and stops it.

The child has a process group of its own. It ends when its standard input closes, so it cannot outlive its worker. The
child sends messages through a separate pipe, because libraries may print: their output goes to standard error.
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

# Marks the end of the pipe in the queue of lines. A real line is never empty, because it ends with a newline.
_END: Final = ""


def store_keys(store: Store) -> dict[str, str]:
    """Return the environment variables with the keys of the bucket; empty if the store is a folder.

    Pass them only to a child that decodes no file before this worker has checked it in another child.
    """
    if store.address.url is None:
        return {}
    keys = {name: value for name, value in os.environ.items() if name.startswith(_STORE_KEYS)}
    return keys | environments.proxies()


def computing_threads(threads: int) -> dict[str, str]:
    """Return the environment variables that limit TensorFlow to `threads` threads.

    TensorFlow reads them only when it is imported. The last digits of a score depend on the number of threads, because
    it changes the order in which sums are computed.
    """
    return {"TF_NUM_INTRAOP_THREADS": str(threads), "TF_NUM_INTEROP_THREADS": str(threads)}


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        return True
    return True


def clear_left_folders() -> None:
    """Remove the temporary folders of child processes whose workers do not exist any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        owner = folder.name.removeprefix(_FOLDERS).split("-")[0]
        if owner.isdigit() and not _is_there(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


class ChildDied(Exception):
    """The child process ended without a result. `signal` is the number of the signal that killed it, or None."""

    def __init__(self, returncode: int, *, for_memory: bool = False) -> None:
        self.for_memory = for_memory
        self.signal = -returncode if returncode < 0 else None
        name = signal.Signals(self.signal).name if self.signal else f"exit status {returncode}"
        self.detail = f"The process ended with {name}."
        super().__init__(self.detail)

    def as_failure(self) -> EspalierError:
        """Return the error for a job that cannot continue after this: OutOfMemory or Crashed."""
        if self.for_memory:
            return OutOfMemory(
                "The kernel killed the process of this job because memory ran out. Use smaller images, a smaller "
                "batch_size or a machine with more memory."
            )
        return Crashed(f"{self.detail} See the worker's log for the reason.")


class ChildEnded(Exception):
    """The child process has done its work and exited. No further message will come."""


class ChildConnection(Protocol):
    """What a handler needs of a child process. `Child` is the real one; the simulator has another."""

    @property
    def is_alive(self) -> bool: ...

    def send(self, message: WorkerMessage) -> None: ...

    def receive(self, work: Work) -> ChildMessage | None: ...

    def drain(self, within_s: float) -> list[ChildMessage]: ...

    def stop(self) -> object: ...


class Child:
    """A running child process. Call `stop` to end it, or use it in a `with` block, which calls `stop` at the end."""

    def __init__(
        self,
        order: Order | None = None,
        environment: Mapping[str, str] | None = None,
        count_kills: Callable[[], int] = count_kills,
    ) -> None:
        """Start a child process and send it `order`, if there is one.

        Raises:
            DiskFull: there is no disk space for its temporary folder.
            Crashed: the system cannot start another process.
        """
        self._count_kills = count_kills
        self._kills = count_kills()
        # The child has its own temporary folder, so that files which it leaves when it is killed are removed with it.
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
            raise Crashed(f"The child process could not be started: {error}.") from error
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
        """Whether the child process is still running."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the child, which is also the id of its process group."""
        return self._process.pid

    def send(self, message: WorkerMessage) -> None:
        """Send one message to the child. If the child has died, do nothing: the next `receive` raises ChildDied."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line_of(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, work: Work) -> ChildMessage | None:
        """Return the next message of the child, or None if there was none for 0.25 s.

        Raises:
            Stopped: the job must stop.
            ChildEnded: the child has done its work and exited.
            ChildDied: the child was killed or exited with an error status.
            EspalierError: the child reported this error.
            Crashed: the child sent a line that is not a message.
        """
        work.check()
        try:
            line = self._lines.get(timeout=_POLL_S)
        except queue.Empty:
            return None
        work.report_progress()
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
        """Ask the child to write its last checkpoints and to exit; return the messages that it sends until then.

        Stop waiting after `within_s`, even if the child is still running.
        """
        until = time.monotonic() + within_s
        self.send(Drain())
        lines: list[str] = []
        while (left_s := until - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left_s)
            except queue.Empty:
                break
            if line == _END:
                self._lines.put(_END)  # the next `receive` must also see the end
                break
            lines.append(line)
        return _messages_in(lines)

    def stop(self) -> list[ChildMessage]:
        """Send SIGTERM to the process group of the child, SIGKILL after 5 s; return the messages not yet received."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
        self._signal(signal.SIGKILL)  # processes that the child started and left running
        unread = self._take_lines()
        while self._reader.is_alive():
            self._reader.join(0.05)
            unread += self._take_lines()
        unread += self._take_lines()  # the reader may have put the last lines just before it ended
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
        """Put each line into the queue unparsed, so that an invalid line raises in `receive` and not in this thread."""
        for line in self._incoming:
            if line.endswith("\n"):  # otherwise the child died while it wrote this line
                self._lines.put(line)
        self._lines.put(_END)


def messages(child: ChildConnection, work: Work) -> Iterator[ChildMessage]:
    """Yield the messages of a child until it exits. Raises the errors of `Child.receive`, except ChildEnded."""
    while True:
        try:
            message = child.receive(work)
        except ChildEnded:
            return
        if message is not None:
            yield message


def _messages_in(lines: Sequence[str]) -> list[ChildMessage]:
    """Parse the last lines of a child. Log and skip a line that is not a message."""
    messages = []
    for line in lines:
        try:
            messages.append(parse_child_message(line))
        except Crashed as error:
            log.error("child sent a line that is not a message", error=error.detail)
    return messages


def _close(stream: IO[str] | None) -> None:
    assert stream is not None
    try:
        stream.close()
    except BrokenPipeError:
        return
