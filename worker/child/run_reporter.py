"""Sends the progress of a training to the worker: stages, epochs, checkpoints, and a heartbeat once a second.

`worker.run_progress` estimates the remaining time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from artifacts.run_files import RunFile
from artifacts.store import Store
from training.progress import Epoch, Extraction
from worker.child.channel import Channel
from worker.messages import (
    Alive,
    EpochEnded,
    Extracted,
    FileWritten,
    FoldEnded,
    JobProgress,
    JsonObject,
    Progress,
    StoredFile,
    TrainOrder,
)
from worker.run_progress import ProgressEstimator

if TYPE_CHECKING:
    from training.fitting.checkpoint import Checkpoint
    from training.fitting.fold_outcome import FoldOutcome
    from training.fitting.learners import Plan
    from worker.child.checkpoints import CheckpointWriter

SEND_EVERY_S = 1.0
_STEPS_KEPT = 16


class RunReporter:
    """The `ProgressListener` of a run. It sends progress at most once a second, and every other report at once."""

    def __init__(self, channel: Channel, store: Store, order: TrainOrder) -> None:
        self.order = order
        """The order that the child is carrying out."""
        self.belongs: JsonObject = {}
        """The run, data, weights and recipe; a checkpoint with other values is not used."""
        self._channel = channel
        self._store = store
        self._sent_at = 0.0
        self._estimator = ProgressEstimator(time.monotonic)
        self._heartbeat = Heartbeat(channel)
        self._writers: dict[int | None, CheckpointWriter] = {}

    def stage(self, name: str) -> None:
        self._send(self._estimator.begin_stage(name), at_once=True)

    def images(self, done: int, total: int) -> None:
        self._heartbeat.step()
        if done or not total:  # at 0, `stage` has just sent this progress
            self._send(self._estimator.images_done(done, total))

    def extracted(self, extraction: Extraction) -> None:
        self._channel.send(Extracted(extraction=extraction))

    def file(self, name: RunFile, data: bytes, media_type: str) -> None:
        self._channel.send(FileWritten(file=store_file(self._store, name, data, media_type)))

    def begin_fit(self, fold: int | None, plan: Plan) -> FitReporter:
        from worker.child.checkpoints import CheckpointWriter, epochs_of

        order = self.order
        earlier = order.final_checkpoints if fold is None else order.checkpoints.get(fold, ())
        writer = CheckpointWriter(
            self._channel,
            self._store,
            self.belongs,
            fold,
            earlier,
            order.checkpoint_share,
            self._estimator.count_fits,
        )
        self._writers[fold] = writer
        self._channel.on_drain(self.flush)
        self._estimator.begin_fit(
            fold,
            plan.head,
            plan.network,
            done=epochs_of(writer.found),
            spent_s=writer.found.seconds if writer.found else 0.0,
        )
        return FitReporter(self._channel, fold, writer, self._heartbeat, self._estimator, self._send)

    def fold_ended(self, outcome: FoldOutcome) -> None:
        self._writers.pop(outcome.result.number, None)
        self._estimator.end_fit(outcome.result.number)
        self._channel.send(FoldEnded(result=outcome.result, outcome=self._store.put(outcome.dump())))

    def flush(self) -> None:
        """Write a last checkpoint of every fit that is still running."""
        for writer in list(self._writers.values()):
            writer.flush()

    def _send(self, state: JobProgress, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._sent_at >= SEND_EVERY_S:
            self._sent_at = now
            self._channel.send(Progress(state=state))


class FitReporter:
    """The `FitListener` of one fold, or of the final fit. It sends epochs, progress and checkpoints to the worker."""

    def __init__(
        self,
        channel: Channel,
        fold: int | None,
        writer: CheckpointWriter,
        heartbeat: Heartbeat,
        estimator: ProgressEstimator,
        send: Callable[..., None],
    ) -> None:
        self._channel = channel
        self._fold = fold
        self._writer = writer
        self._heartbeat = heartbeat
        self._estimator = estimator
        self._send = send

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self._writer.found

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        self._channel.send(EpochEnded(fold=self._fold, epoch=number, metrics=metrics))

    def epochs_done(self, epochs: float) -> None:
        self._heartbeat.step()
        self._send(self._estimator.epochs_done(self._fold, epochs))

    def network_unfrozen(self, epochs: int) -> None:
        self._send(self._estimator.network_unfrozen(self._fold, epochs), at_once=True)

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        self._writer.offer(take)


class Heartbeat:
    """Sends `Alive` at most once a second, with the median duration of the last steps."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stepped_at = self._sent_at = time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=_STEPS_KEPT)

    def step(self) -> None:
        """Record that one training step has ended; send `Alive` if the last message is a second old."""
        now = time.monotonic()
        self._steps_s.append(now - self._stepped_at)
        self._stepped_at = now
        if now - self._sent_at >= SEND_EVERY_S:
            self._sent_at = now
            self._channel.send(Alive(step_s=statistics.median(self._steps_s)))


def store_file(store: Store, name: RunFile, data: bytes, media_type: str) -> StoredFile:
    """Put a file of a run into the store; return the message that describes the file to the worker."""
    return StoredFile(name=name, sha256=store.put(data), size_bytes=len(data), media_type=media_type)
