"""The parts of a run that a child learns side by side, mostly one alone: how far they are together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Part:
    """A part that is being learned, in epochs."""

    most: int
    begun: float
    done: float
    flush: Callable[[], None]


@dataclass
class Abreast:
    """What is being learned; a fold leaves when it has ended.

    Its time counts from when the first of those that are there began.
    """

    _parts: dict[int | None, _Part] = field(default_factory=dict)
    _ended: float = 0.0
    _begun_at: float = 0.0

    def begin(self, number: int | None, epochs: int, done: float, flush: Callable[[], None]) -> None:
        """Take in a fold, or the final fit (None), of `epochs` at most; `flush` keeps how far it is."""
        if not self._parts:
            self._ended, self._begun_at = 0.0, time.monotonic()
        self._parts[number] = _Part(epochs, done, done, flush)

    def end(self, number: int | None) -> None:
        """Let go of a part."""
        part = self._parts.pop(number, None)
        if part is not None:
            self._ended += part.done - part.begun

    def count(self) -> int:
        """Return how many parts are being learned."""
        return len(self._parts)

    def flush(self) -> None:
        """Have each part keep how far it is."""
        for part in list(self._parts.values()):
            part.flush()

    def move(self, number: int | None, epochs: float) -> dict[str, Any]:
        """Note how many epochs of a part are done; return how far all are, as `worker.progress` hears it."""
        self._parts[number].done = epochs
        parts = self._parts.values()
        spent_s = time.monotonic() - self._begun_at
        new = self._ended + sum(part.done - part.begun for part in parts)
        left = sum(max(0.0, part.most - part.done) for part in parts)
        most = self._parts[number].most
        return {
            "stage": "final" if number is None else "folds",
            "fold": number,
            "folds": len(parts),
            "share": sum(min(1.0, part.done / part.most) for part in parts),
            "epoch": min(int(epochs) + 1, most),
            "epochs": most,
            "spent_s": spent_s,
            "eta_s": left * spent_s / new if new > 0 else None,
        }
