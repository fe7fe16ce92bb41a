"""Writes checkpoints of a fit into the store, and finds the checkpoint from which an interrupted fit continues.

A fit is the training of one fold, or the final fit on all images.
"""

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

# At most one copy per interval: copying the state of a small head can take longer than an epoch.
_COPY_EVERY_S = 0.5
_WRITE_EVERY_S = 1.0
_DISK_PAUSE_S = 60.0


class CheckpointWriter:
    """Writes checkpoints of one fit, but so seldom that they take only a small share of the training time.

    It keeps a copy of a recent state even when it does not write it. `flush` writes this copy.
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
        """Load the newest usable checkpoint of earlier attempts into `found`; None if there is none.

        Args:
            channel: used to report each written checkpoint to the worker.
            store: the store that holds the checkpoints.
            belongs: run, data, weights and recipe. A checkpoint with other values is not used.
            fold: number of the fold, or None for the final fit.
            earlier: stored checkpoints of earlier attempts, the newest first.
            share: fraction of the training time that writing may take, from 0 to 1, for all fits that run at the same
                time together.
            count_fits: returns how many fits run at the same time.
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
        """Copy the state at the end of an epoch, and write it, unless the last copy or checkpoint is too recent.

        `take` returns the state; it is called only if a copy is made.
        """
        now = time.monotonic()
        # Fits that run at the same time share the elapsed time equally.
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
        """Write the last copied state to the store, unless it has been written already."""
        with self._lock:
            pending, self._pending = self._pending, None
            if pending is None:
                return
            started = time.monotonic()
            data = checkpoints.dump(pending, self._mark)
            try:
                digest = self._store.put(data)
            except (DiskFull, StoreUnavailable) as error:  # training continues, and the checkpoint before is kept
                sys.stderr.write(f"Checkpoint not written: {error.detail}\n")
                self._pause_s, self._written_at = _DISK_PAUSE_S, time.monotonic()
                return
            self._channel.send(
                CheckpointWritten(fold=self._fold, epochs=epochs_of(pending), sha256=digest, size_bytes=len(data))
            )
            self._written_at = time.monotonic()
            cost_s = self._written_at - started
            self._pause_s = max(_WRITE_EVERY_S, cost_s / self._share) * max(1, self._count_fits())

    def _find(self, digests: Sequence[Digest]) -> Checkpoint | None:
        """Return the newest checkpoint that is not damaged and belongs to this fit."""
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
    """Return how many epochs were finished at a checkpoint, in all phases of fine-tuning together."""
    if checkpoint is None:
        return 0
    of_head = len(checkpoint.head.trained.history) if checkpoint.head else 0
    return of_head + (len(checkpoint.snapshot.history) if checkpoint.snapshot else 0)
