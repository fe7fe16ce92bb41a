"""The child's end of the pipes to its worker: messages out, and orders and answers in."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import IO, TypeVar

from worker.messages import (
    Answer,
    ChildMessage,
    ChoiceAnswer,
    DigestAnswer,
    Drain,
    Order,
    Question,
    Stored,
    WorkerMessage,
    line_of,
    parse_worker_message,
)

AnswerT = TypeVar("AnswerT", DigestAnswer, ChoiceAnswer, Stored)


class Channel:
    """Sends messages to the worker and takes in what it says."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._orders: queue.Queue[Order] = queue.Queue()
        self._lock = threading.Lock()
        self._on_drain: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Start to read what the worker says, on a thread of its own; kill this process once the worker is gone."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def send(self, message: ChildMessage) -> None:
        """Send a message; it has left this process when this returns."""
        with self._lock:
            self._outgoing.write(line_of(message))
            self._outgoing.flush()

    def ask(self, question: Question, kind: type[AnswerT]) -> AnswerT:
        """Send a question and wait for its answer, which is of this kind."""
        self.send(question)
        answer = self._answers.get()
        if not isinstance(answer, kind):
            raise TypeError(f"Expected {kind.__name__} to {question!r}. Received {answer!r}. This is a bug.")
        return answer

    def next_order(self) -> Order:
        """Wait for the next order."""
        return self._orders.get()

    def on_drain(self, write_down: Callable[[], None]) -> None:
        """Call `write_down`, on another thread, when this process must end before its work is done."""
        self._on_drain = write_down

    def _listen(self) -> None:
        try:
            for line in self._incoming:
                if line.endswith("\n"):  # else the worker died in the middle of a message
                    self._receive(parse_worker_message(line))
        finally:  # whatever goes wrong here, nobody would ever tell this process to end
            os.killpg(0, signal.SIGKILL)

    def _receive(self, message: WorkerMessage) -> None:
        match message:
            case Drain():
                self._on_drain()
                with self._lock:  # a message that is half written is finished first
                    os._exit(0)
            case DigestAnswer() | ChoiceAnswer() | Stored():
                self._answers.put(message)
            case _:
                self._orders.put(message)
