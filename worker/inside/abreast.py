"""The parts of a run that a child learns side by side, mostly one alone: how far they are together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# What a head's epochs are typically worth of a part whose network learns along; only the bar's evenness depends on it.
_OF_HEAD = 0.05


@dataclass
class _Part:
    """A part that is being learned, in epochs: of the head, and of the network with it (0: it stays frozen).

    Epochs take about equally long since the part `begun` to count them.
    """

    head: int
    network: int
    begun: float
    done: float
    flush: Callable[[], None]
    unfrozen_after: int | None = None

    @property
    def most(self) -> int:
        return (self.head if self.unfrozen_after is None else self.unfrozen_after) + self.network

    @property
    def share(self) -> float:
        if not self.network or not self.head:
            return min(1.0, self.done / self.most)
        if self.unfrozen_after is None:
            return _OF_HEAD * min(1.0, self.done / self.head)
        return _OF_HEAD + (1 - _OF_HEAD) * min(1.0, (self.done - self.unfrozen_after) / self.network)

    @property
    def left(self) -> float:
        return max(0.0, self.most - self.done)

    @property
    def is_foreseeable(self) -> bool:
        """Say whether the epochs that were counted tell what the others will take."""
        return not self.network or self.unfrozen_after is not None


@dataclass
class Abreast:
    """What is being learned; a fold leaves when it has ended.

    Its time counts from when the first of those that are there began.
    """

    now: Callable[[], float] = time.monotonic
    _parts: dict[int | None, _Part] = field(default_factory=dict)
    _ended: float = 0.0
    _begun_at: float = 0.0
    _counted_since: float = 0.0

    def begin(self, number: int | None, head: int, network: int, done: float, flush: Callable[[], None]) -> None:
        """Take in a fold, or the final fit (None), of at most so many epochs of head and network.

        Args:
            number: which it is.
            head: epochs of the head alone.
            network: epochs of the network with it; 0 if it stays frozen.
            done: epochs that a checkpoint brought.
            flush: keeps how far it is.
        """
        if not self._parts:
            self._ended, self._begun_at = 0.0, self.now()
            self._counted_since = self._begun_at
        # Without a head that learns alone the network learns from the beginning.
        self._parts[number] = _Part(head, network, done, done, flush, unfrozen_after=None if head else 0)

    def unfreeze(self, number: int | None, epochs: int) -> dict[str, Any]:
        """Count anew, for from now on, after so many epochs of the head, the network learns along; return as `move`."""
        part = self._parts[number]
        part.unfrozen_after = epochs
        part.begun = part.done = max(part.done, float(epochs))
        self._ended, self._counted_since = 0.0, self.now()
        return self.move(number, part.done)

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
        now = self.now()
        new = self._ended + sum(part.done - part.begun for part in parts)
        left = sum(part.left for part in parts)
        is_known = new > 0 and all(part.is_foreseeable for part in parts)
        most = self._parts[number].most
        return {
            "stage": "final" if number is None else "folds",
            "fold": number,
            "folds": len(parts),
            "share": sum(part.share for part in parts),
            "epoch": min(int(epochs) + 1, most),
            "epochs": most,
            "spent_s": now - self._begun_at,
            "eta_s": left * (now - self._counted_since) / new if is_known else None,
        }
