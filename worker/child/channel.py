"""The child's end of the conversation with its worker: JSON lines out through a pipe, and in through standard input."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import IO, Any


class Channel:
    """Messages to the worker, and its answers and orders."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._on_drain: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Begin to take in what the worker says, and die with it."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def send(self, type: str, **fields: Any) -> None:
        """Send a message."""
        with self._lock:
            self._outgoing.write(json.dumps({"type": type, **fields}) + "\n")
            self._outgoing.flush()

    def ask(self, type: str, **fields: Any) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        self.send(type, **fields)
        return self._answers.get()

    def next_order(self) -> dict[str, Any]:
        """Wait for an order."""
        return self._orders.get()

    def on_drain(self, keep: Callable[[], None]) -> None:
        """Have `keep` called, on another thread, when this process is about to end before its work is done."""
        self._on_drain = keep

    def _listen(self) -> None:
        try:
            for line in self._incoming:
                if line.endswith("\n"):  # else the worker died in the middle of a message
                    self._take_in(json.loads(line))
        finally:  # whatever goes wrong here, nobody would ever tell this process to end
            os.killpg(0, signal.SIGKILL)

    def _take_in(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "order":
                self._orders.put(message)
            case "drain":
                self._on_drain()
                with self._lock:  # a message that is half written is finished first
                    os._exit(0)
            case _:
                self._answers.put(message)
