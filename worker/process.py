"""One child process per job: starts it, talks with it in JSON lines, and ends it with all it started.

The child runs in a process group of its own and ends when its standard input closes, so that it cannot outlive its
worker. Messages come through a pipe of their own; whatever libraries print, from their import on, goes to standard
error.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from errors import Crashed, EspalierError, OutOfMemory, from_record
from worker.loop import Stopped, Work

STOP_GRACE_S = 5.0
_POLL_S = 0.25
_WAITING = 1000
_STDERR = 2

# A child decodes files of strangers: what it does not need, they cannot take.
_SECRETS = ("DATABASE_URL", "ESPALIER_API_KEY", "MLFLOW_TRACKING_URI", "REDIS_URL")

Message = dict[str, Any]

_END = object()


class Died(Exception):
    """The child ended without a result; `signal` is the number that killed it, or None."""

    def __init__(self, returncode: int) -> None:
        self.signal = -returncode if returncode < 0 else None
        name = signal.Signals(self.signal).name if self.signal else f"exit status {returncode}"
        self.detail = f"The process ended with {name}."
        super().__init__(self.detail)

    def as_failure(self) -> EspalierError:
        """Return what this means for a whole job: nothing but the kernel sends SIGKILL to a child of ours."""
        if self.signal == signal.SIGKILL:
            return OutOfMemory(
                "The work was killed, most likely for the memory it took. Use smaller images, a smaller batch_size or "
                "a machine with more memory."
            )
        return Crashed(f"{self.detail} The worker's log has more.")


class Child:
    """A running child; use it in a `with` block."""

    def __init__(self, order: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        # Its own: whatever it leaves there when it is killed goes with it.
        self._folder = tempfile.TemporaryDirectory(prefix="espalier-", ignore_cleanup_errors=True)
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
        finally:
            os.close(outgoing)
        self._messages: queue.Queue[Any] = queue.Queue(_WAITING)
        self._reader = threading.Thread(target=self._read, name="child-reader", daemon=True)
        self._reader.start()
        self.send(order)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The child's process id, which is its group's too."""
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message to the child; a child that has died is noticed when it is listened to."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def receive(self, work: Work) -> Message | None:
        """Return the child's next message, or None at its end.

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
                continue
            work.moved()
            if message is _END:
                returncode = self._process.wait()
                if returncode:
                    raise Died(returncode)
                return None
            if message["type"] == "error":
                raise from_record(message["error"])
            return dict(message)

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
