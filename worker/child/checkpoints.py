"""Writes the checkpoints of one fit into the store, as often as a share of the time allows, and finds earlier ones."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from artifacts.store import Digest, Store
from errors import Corrupt, DiskFull, NotFound, StoreUnavailable
from training.fitting import checkpoint as checkpoints
from training.fitting.checkpoint import Checkpoint
from worker.child.channel import Channel
from worker.messages import CheckpointWritten, JsonObject

# Copying the state of a small head takes longer than some of its epochs.
_COPY_EVERY_S = 0.5
_WRITE_EVERY_S = 1.0
_DISK_PAUSE_S = 60.0


class CheckpointWriter:
    """Takes the checkpoints of a fold, or of the final fit.

    The state of the last epoch is at hand even if writing it was not worth its time: `flush` writes it.
    """

    def __init__(
        self,
        channel: Channel,
        store: Store,
        belongs: JsonObject,
        fold: int | None,
        earlier: Sequence[Digest],
        share: float,
        count_fits: Callable[[], int] = lambda: 1,
    ) -> None:
        """Look for the newest checkpoint that fits.

        Args:
            channel: reports each checkpoint that is written.
            store: where they are.
            belongs: the run, data and weights that the fit's checkpoints depend on.
            fold: the fold, or None for the final fit.
            earlier: checkpoints of earlier attempts, the newest first.
            share: how much of the time writing may take, from 0 to 1, of all fits that run side by side together.
            count_fits: returns how many these are.
        """
        self._channel = channel
        self._store = store
        self._fold = fold
        self._share = share
        self._count_fits = count_fits
        self._mark = checkpoints.mark({**belongs, "part": fold})
        self._lock = threading.Lock()
        self._counted_at = self._copied_at = self._written_at = time.monotonic()
        self._pending: Checkpoint | None = None
        self._pause_s = _WRITE_EVERY_S
        self.found = self._find(earlier)
        self._spent_s = self.found.seconds if self.found else 0.0

    def offer(self, take: Callable[[], Checkpoint]) -> None:
        """Copy the state at the end of an epoch if it is time, and write it if it is time for that."""
        now = time.monotonic()
        # Each moment is divided among the fits that run just now.
        self._spent_s += (now - self._counted_at) / max(1, self._count_fits())
        self._counted_at = now
        if now - self._copied_at < _COPY_EVERY_S * (self._share < 1):
            return
        with self._lock:
            self._pending = replace(take(), seconds=self._spent_s)
        self._copied_at = time.monotonic()
        if now - self._written_at >= self._pause_s * (self._share < 1):
            self.flush()

    def flush(self) -> None:
        """Write the last state that was copied, unless it is written already."""
        with self._lock:
            pending, self._pending = self._pending, None
            if pending is None:
                return
            started = time.monotonic()
            data = checkpoints.dump(pending, self._mark)
            try:
                digest = self._store.put(data)
            except (DiskFull, StoreUnavailable) as error:  # the one before stays, and the training goes on
                sys.stderr.write(f"No checkpoint was written: {error.detail}\n")
                self._pause_s, self._written_at = _DISK_PAUSE_S, time.monotonic()
                return
            self._channel.send(
                CheckpointWritten(fold=self._fold, epochs=epochs_of(pending), sha256=digest, size_bytes=len(data))
            )
            self._written_at = time.monotonic()
            cost_s = self._written_at - started
            self._pause_s = max(_WRITE_EVERY_S, cost_s / self._share) * max(1, self._count_fits())

    def _find(self, digests: Sequence[Digest]) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and fits."""
        for digest in digests:
            try:
                found = checkpoints.load(self._store.read(digest), self._mark)
            except (Corrupt, NotFound) as error:
                sys.stderr.write(f"A checkpoint cannot be used: {error.detail}\n")
                continue
            if found is not None:
                return found
        return None


def epochs_of(checkpoint: Checkpoint | None) -> int:
    """Return how many epochs are done at a checkpoint, of all phases."""
    if checkpoint is None:
        return 0
    of_head = len(checkpoint.head.trained.history) if checkpoint.head else 0
    return of_head + (len(checkpoint.snapshot.history) if checkpoint.snapshot else 0)
