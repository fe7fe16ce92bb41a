"""The child's end of the two pipes to its worker: it sends messages, and receives orders and answers."""

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
    """Sends the messages of this child process to its worker, and receives orders and answers from the worker."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._orders: queue.Queue[Order] = queue.Queue()
        self._lock = threading.Lock()
        self._on_drain: Callable[[], None] = lambda: None

    def listen(self) -> None:
        """Start a thread that receives orders and answers. It kills this process when the worker is gone."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def send(self, message: ChildMessage) -> None:
        """Send a message to the worker. When this returns, the message is written to the pipe."""
        with self._lock:
            self._outgoing.write(line_of(message))
            self._outgoing.flush()

    def ask(self, question: Question, kind: type[AnswerT]) -> AnswerT:
        """Send a question to the worker, wait for the answer and return it.

        Raises TypeError if the answer is not an instance of `kind`.
        """
        self.send(question)
        answer = self._answers.get()
        if not isinstance(answer, kind):
            raise TypeError(f"Expected {kind.__name__} to {question!r}. Received {answer!r}. This is a bug.")
        return answer

    def next_order(self) -> Order:
        """Wait for the next order of the worker and return it."""
        return self._orders.get()

    def on_drain(self, write_down: Callable[[], None]) -> None:
        """Register the function to call when the worker asks this process to exit before its work is done.

        Another thread calls `write_down`, which should write the last checkpoints. Then the process exits.
        """
        self._on_drain = write_down

    def _listen(self) -> None:
        try:
            for line in self._incoming:
                if line.endswith("\n"):  # otherwise the worker died while it wrote this line
                    self._receive(parse_worker_message(line))
        finally:  # without this thread, nothing would ever stop this process
            os.killpg(0, signal.SIGKILL)

    def _receive(self, message: WorkerMessage) -> None:
        match message:
            case Drain():
                self._on_drain()
                with self._lock:  # wait until another thread has written its whole message
                    os._exit(0)
            case DigestAnswer() | ChoiceAnswer() | Stored():
                self._answers.put(message)
            case _:
                self._orders.put(message)
