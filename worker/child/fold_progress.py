"""The parts of a run that a child learns side by side, mostly one alone: how far they are together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.messages import JobProgress

# What a head's epochs are typically worth of a part whose network learns along; only the bar's evenness depends on it.
_SHARE_OF_HEAD = 0.05


@dataclass
class _Part:
    """A part that is being learned, in epochs: of the head, and of the network with it (0: it stays frozen).

    Attributes:
        done: epochs of both.
        counted_from: what was done when counting began; what came before took another time.
        unfrozen_after: epochs of the head after which the network learns along; None as long as it does not.
    """

    head: int
    network: int
    done: float
    flush: Callable[[], None]
    counted_from: float
    unfrozen_after: int | None

    @property
    def most(self) -> int:
        return (self.head if self.unfrozen_after is None else self.unfrozen_after) + self.network

    @property
    def share(self) -> float:
        if not self.network or not self.head:
            return min(1.0, self.done / self.most)
        if self.unfrozen_after is None:
            return _SHARE_OF_HEAD * min(1.0, self.done / self.head)
        return _SHARE_OF_HEAD + (1 - _SHARE_OF_HEAD) * min(1.0, (self.done - self.unfrozen_after) / self.network)

    @property
    def left(self) -> float:
        return max(0.0, self.most - self.done)

    @property
    def is_foreseeable(self) -> bool:
        """Say whether the epochs that are counted tell what the others will take."""
        return not self.network or self.unfrozen_after is not None


@dataclass
class Abreast:
    """What is being learned; a fold leaves when it has ended.

    Its time counts from when the first of those that are there began.
    """

    now: Callable[[], float] = time.monotonic
    _parts: dict[int | None, _Part] = field(default_factory=dict)
    _ended: float = 0.0
    _brought_s: float = 0.0
    _begun_at: float = 0.0
    _counted_since: float | None = 0.0

    def begin(
        self,
        number: int | None,
        head: int,
        network: int,
        flush: Callable[[], None],
        *,
        done: float = 0.0,
        brought_s: float = 0.0,
    ) -> None:
        """Take in a fold, or the final fit (None), of at most so many epochs of head and network.

        Args:
            number: which it is.
            head: epochs of the head alone; 0 if the network learns from the beginning.
            network: epochs of the network with it; 0 if it stays frozen.
            flush: keeps how far it is.
            done: epochs that a checkpoint brought.
            brought_s: seconds that these took.
        """
        if not self._parts:
            self._ended = self._brought_s = 0.0
            self._begun_at = self._counted_since = self.now()
        self._brought_s += brought_s
        self._parts[number] = _Part(head, network, done, flush, counted_from=done, unfrozen_after=None if head else 0)

    def unfreeze(self, number: int | None, epochs: int) -> JobProgress:
        """Note that the network learns along after so many epochs of the head; return what `move` does.

        Epochs are counted anew from the next `move` on: the first step of a network is also built and compiled.
        """
        part = self._parts[number]
        part.unfrozen_after = epochs
        part.done = max(part.done, float(epochs))
        self._counted_since = None
        return self._said(number)

    def end(self, number: int | None) -> None:
        """Let go of a part."""
        part = self._parts.pop(number, None)
        if part is not None:
            self._ended += part.done - part.counted_from

    def count(self) -> int:
        """Return how many parts are being learned."""
        return len(self._parts)

    def flush(self) -> None:
        """Have each part keep how far it is."""
        for part in list(self._parts.values()):
            part.flush()

    def move(self, number: int | None, epochs: float) -> JobProgress:
        """Note how many epochs of a part are done; return how far all are, as `worker.run_progress` hears it."""
        self._parts[number].done = epochs
        if self._counted_since is None:
            self._ended, self._counted_since = 0.0, self.now()
            for part in self._parts.values():
                part.counted_from = part.done
        return self._said(number)

    def _said(self, number: int | None) -> JobProgress:
        parts, this = self._parts.values(), self._parts[number]
        now = self.now()
        new = self._ended + sum(part.done - part.counted_from for part in parts)
        left = sum(part.left for part in parts)
        eta_s = None
        if self._counted_since is not None and new > 0 and all(part.is_foreseeable for part in parts):
            eta_s = left * (now - self._counted_since) / new
        return JobProgress(
            stage="final" if number is None else "folds",
            fold=number,
            folds=len(parts),
            share=sum(part.share for part in parts),
            epoch=min(int(this.done) + 1, this.most),
            epochs=this.most,
            spent_s=self._brought_s + now - self._begun_at,
            eta_s=eta_s,
        )
