"""Trains the parts of a run that are ordered, inside a child process; what several parts need is computed once.

A checkpoint is written at the end of an epoch if that takes a small share of the time; the state of the last epoch is
at hand all the same, for a worker that is about to end.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.bucket_store import open_store
from artifacts.images import IMAGE_RULE
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store
from errors import Corrupt, DiskFull, NotFound, OutOfMemory, StoreUnavailable
from recipes.catalogue import BackboneName
from recipes.filled import parse_filled
from worker.child import weights
from worker.child.channel import Channel
from worker.child.fold_progress import Abreast
from worker.messages import (
    AddBackbone,
    AddQuantised,
    Alive,
    CheckpointWritten,
    ChoiceAnswer,
    DigestAnswer,
    EpochEnded,
    Extracted,
    FileWritten,
    FindBackbone,
    FindFeaturesChoice,
    FindPrecisionChoice,
    FindQuantised,
    FoldEnded,
    JobProgress,
    JsonObject,
    Order,
    Prepared,
    Progress,
    RunOutcome,
    SetFeaturesChoice,
    SetPrecisionChoice,
    Stored,
    StoredFile,
    TrainOrder,
    TrainPart,
    WeightsObtained,
)

if TYPE_CHECKING:
    from training.experiment import Experiment
    from training.fitting.checkpoint import Checkpoint
    from training.fitting.fold_outcome import FoldOutcome
    from training.fitting.learners import Plan
    from training.networks.network_files import BackboneKey
    from training.progress import Extraction

SAY_EVERY_S = 1.0
# Copying the state of a small head takes longer than some of its epochs.
_TAKE_EVERY_S = 0.5
_WRITE_EVERY_S = 1.0
_DISK_PAUSE_S = 60.0
_BEATS = 16


def train(order: Order, channel: Channel) -> None:
    """Carry out an order and then every further one; the process ends when its worker closes the pipe.

    Sends messages of `worker.messages.TrainMessage`; each order ends with Prepared, FoldEnded or RunOutcome.
    """
    desk: _Desk | None = None
    while True:
        if not isinstance(order, TrainOrder):
            raise TypeError(f"Expected a further TrainOrder. Received {order!r}. This is a bug.")
        try:
            if desk is None or not desk.fits(order):
                desk = _Desk(order, channel)
            desk.do(order)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "ResourceExhaustedError":
                # As TensorFlow and JAX say it, neither of which is imported here.
                raise OutOfMemory(f"The network and its batch do not fit into memory: {error}") from error
            raise
        order = channel.next_order()


class _Desk:
    """One experiment, prepared once."""

    def __init__(self, order: TrainOrder, channel: Channel) -> None:
        self._spec = order.spec
        self._channel = channel
        self._store = open_store(order.spec.store)
        self._recipe = parse_filled(order.spec.recipe)
        self._reporter = _Reporter(channel, self._store)
        self._reporter.follow(order)
        self._weights = self._find_weights()
        self._reporter.marked = {
            "run": order.spec.run,
            "manifest": order.spec.manifest,
            "weights": self._weights,
        }
        self._reporter.marked["recipe"] = self._recipe.model_dump(mode="json")
        self._experiment = self._prepare()

    def fits(self, order: TrainOrder) -> bool:
        """Return whether an order is about this experiment."""
        spec, mine = order.spec, self._spec
        return spec.weights in (None, self._weights) and all(
            getattr(spec, name) == getattr(mine, name) for name in ("run", "recipe", "manifest", "labels", "threads")
        )

    def do(self, order: TrainOrder) -> None:
        """Train the part of the run that an order names."""
        self._reporter.follow(order)
        folds = range(len(self._experiment.folds))
        match order.part:
            case TrainPart.PREPARE:
                self._channel.send(Prepared())
            case TrainPart.FOLD:
                self._experiment.learn_fold(order.fold)
            case TrainPart.FINAL:
                self._finish(order, [self._outcome(order, number) for number in folds])
            case TrainPart.ALL:
                left = [number for number in folds if number not in order.outcomes]
                learned = dict(zip(left, self._experiment.learn_folds(left), strict=True))
                self._finish(order, [learned.get(number) or self._outcome(order, number) for number in folds])

    def _finish(self, order: TrainOrder, outcomes: Sequence[FoldOutcome]) -> None:
        outcome = self._experiment.finish(outcomes, order.extraction)
        self._channel.send(
            RunOutcome(
                bundle=outcome.bundle,
                backbone=outcome.backbone,
                metrics=outcome.metrics,
                training_s=outcome.training_s,
                files=tuple(
                    _stored(self._store, name, data, media_type) for name, (data, media_type) in outcome.files.items()
                ),
            )
        )

    def _outcome(self, order: TrainOrder, number: int) -> FoldOutcome:
        from training.fitting import fold_outcome

        return fold_outcome.load(self._store.read(order.outcomes[number]))

    def _find_weights(self) -> Digest | None:
        """Return the stored weights, after download if need be; None for a network from scratch or one to choose."""
        spec, recipe = self._spec, self._recipe
        backbone = recipe.backbone
        if not isinstance(backbone, BackboneName) or recipe.weights is None:
            return None
        if spec.weights is not None:
            return spec.weights

        def downloaded(done_bytes: int, total_bytes: int | None, eta_s: float | None) -> None:
            share = done_bytes / total_bytes if total_bytes else 0.0
            self._channel.send(Progress(state=JobProgress(stage="weights", share=share, eta_s=eta_s)))

        found = weights.obtain(backbone, recipe.weights, self._store, spec.source, downloaded)
        self._channel.ask(
            WeightsObtained(network=backbone, name=recipe.weights, sha256=found.sha256, source=found.source), Stored
        )
        return found.sha256

    def _prepare(self) -> Experiment:
        spec = self._spec
        # TensorFlow takes seconds to import: only now, so that weights that cannot be had are reported at once.
        from training.experiment import Experiment
        from training.networks.network_files import Workspace
        from training.setup import Order as TrainingRequest

        place = Workspace(
            store=self._store,
            features=Path(spec.features),
            pixels=Path(spec.pixels),
            pixels_bytes=spec.pixels_bytes,
            image_limits=spec.image_limits,
            threads=spec.threads,
        )
        candidates = {name: digest for name, digest in spec.candidates.items() if self._store.has(digest)}
        request = TrainingRequest(self._recipe, spec.manifest, spec.labels, self._weights, candidates)
        return Experiment(request, place, _Registry(self._channel), self._reporter)


class _Reporter:
    """Sends what an experiment reports, its progress and that it lives at most once a second."""

    def __init__(self, channel: Channel, store: Store) -> None:
        self.marked: dict[str, Any] = {}
        """What the run's checkpoints belong to."""
        self._channel = channel
        self._store = store
        self._order: TrainOrder | None = None
        self._said_at = 0.0
        self._stage = ""
        self._entered = time.monotonic()
        self._pulse = _Pulse(channel)
        self._abreast = Abreast()

    def follow(self, order: TrainOrder) -> None:
        """Report on this order from now on."""
        self._order = order

    def stage(self, name: str) -> None:
        self._stage, self._entered = name, time.monotonic()
        self._say(JobProgress(stage=name, share=0.0), at_once=True)

    def images(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        spent_s = time.monotonic() - self._entered
        self._pulse.beat()
        if share:  # at 0 it only lives: the stage itself has said that it began
            self._say(JobProgress(stage=self._stage, share=share, eta_s=spent_s * (1 - share) / share))

    def extracted(self, extraction: Extraction) -> None:
        self._channel.send(Extracted(extraction=extraction))

    def part(self, number: int | None, plan: Plan) -> _Part:
        order = self._order
        assert order is not None
        found = order.final_checkpoints if number is None else order.checkpoints.get(number, ())
        share = order.checkpoint_share
        keeper = _Keeper(self._channel, self._store, self.marked, number, found, share, self._abreast.count)
        self._abreast.begin(
            number,
            plan.head,
            plan.network,
            keeper.flush,
            done=_epochs_of(keeper.found),
            brought_s=keeper.found.seconds if keeper.found else 0.0,
        )
        self._channel.on_drain(self._abreast.flush)
        return _Part(self._channel, number, keeper, self._pulse, self._abreast, self._say)

    def fold(self, outcome: FoldOutcome) -> None:
        self._abreast.end(outcome.result.number)
        self._channel.send(FoldEnded(result=outcome.result, outcome=self._store.put(outcome.dump())))

    def file(self, name: RunFile, data: bytes, media_type: str) -> None:
        self._channel.send(FileWritten(file=_stored(self._store, name, data, media_type)))

    def _say(self, state: JobProgress, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            self._channel.send(Progress(state=state))


class _Pulse:
    """Says once a second that work moves, and what a step of it usually takes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._beat_at = self._said_at = time.monotonic()
        self._gaps_s: deque[float] = deque(maxlen=_BEATS)

    def beat(self) -> None:
        """Hear that a step is done."""
        now = time.monotonic()
        self._gaps_s.append(now - self._beat_at)
        self._beat_at = now
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            self._channel.send(Alive(step_s=statistics.median(self._gaps_s)))


class _Part:
    """A fold or the final fit: says how far it is, and keeps its checkpoints."""

    def __init__(
        self,
        channel: Channel,
        number: int | None,
        keeper: _Keeper,
        pulse: _Pulse,
        abreast: Abreast,
        say: Callable[..., None],
    ) -> None:
        self._channel = channel
        self._number = number
        self._keeper = keeper
        self._pulse = pulse
        self._abreast = abreast
        self._say = say

    @property
    def found(self) -> Checkpoint | None:
        return self._keeper.found

    def offer(self, take: Callable[[], Checkpoint]) -> None:
        self._keeper.offer(take)

    def epoch(self, number: int, metrics: dict[str, float]) -> None:
        self._channel.send(EpochEnded(fold=self._number, epoch=number, metrics=metrics))

    def batch(self, epochs: float) -> None:
        self._pulse.beat()
        self._say(self._abreast.move(self._number, epochs))

    def unfrozen(self, epochs: int) -> None:
        self._say(self._abreast.unfreeze(self._number, epochs), at_once=True)


class _Keeper:
    """Writes checkpoints of one part into the store, as often as a share of the time allows."""

    def __init__(
        self,
        channel: Channel,
        store: Store,
        marked: dict[str, Any],
        number: int | None,
        found: Sequence[Digest],
        share: float,
        abreast: Callable[[], int] = lambda: 1,
    ) -> None:
        """Keep checkpoints for a share of the time; all parts that are learned `abreast` have that share together."""
        from training.fitting import checkpoint

        self._abreast = abreast
        self._channel = channel
        self._store = store
        self._number = number
        self._share = share
        self._mark = checkpoint.mark({**marked, "part": number})
        self._lock = threading.Lock()
        self._counted_at = self._taken_at = self._written_at = time.monotonic()
        self._pending: Checkpoint | None = None
        self._pause_s = _WRITE_EVERY_S
        self.found = self._find(found)
        self._spent_s = self.found.seconds if self.found else 0.0

    def offer(self, take: Callable[[], Checkpoint]) -> None:
        """Take the state of an epoch, and write it if it is time."""
        now = time.monotonic()
        # Each moment is divided among those that learn just now.
        self._spent_s += (now - self._counted_at) / max(1, self._abreast())
        self._counted_at = now
        if now - self._taken_at < _TAKE_EVERY_S * (self._share < 1):
            return
        with self._lock:
            self._pending = replace(take(), seconds=self._spent_s)
        self._taken_at = time.monotonic()
        if now - self._written_at >= self._pause_s * (self._share < 1):
            self._write()

    def flush(self) -> None:
        """Write the last state that was taken, if it was not written."""
        self._write()

    def _write(self) -> None:
        from training.fitting import checkpoint

        with self._lock:
            pending, self._pending = self._pending, None
            if pending is None:
                return
            started = time.monotonic()
            data = checkpoint.dump(pending, self._mark)
            try:
                digest = self._store.put(data)
            except (DiskFull, StoreUnavailable) as error:  # the one before stays, and the training goes on
                sys.stderr.write(f"No checkpoint: {error.detail}\n")
                self._pause_s, self._written_at = _DISK_PAUSE_S, time.monotonic()
                return
            epochs = _epochs_of(pending)
            self._channel.send(CheckpointWritten(fold=self._number, epochs=epochs, sha256=digest, size_bytes=len(data)))
            self._written_at = time.monotonic()
            cost_s = self._written_at - started
            self._pause_s = max(_WRITE_EVERY_S, cost_s / self._share) * max(1, self._abreast())

    def _find(self, digests: Sequence[Digest]) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and fits."""
        from training.fitting import checkpoint

        for digest in digests:
            try:
                found = checkpoint.load(self._store.read(digest), self._mark)
            except (Corrupt, NotFound) as error:
                sys.stderr.write(f"A checkpoint cannot be used: {error.detail}\n")
                continue
            if found is not None:
                return found
        return None


def _epochs_of(checkpoint: Checkpoint | None) -> int:
    """Return how many epochs are done at a checkpoint, of all phases."""
    if checkpoint is None:
        return 0
    of_head = len(checkpoint.head.trained.history) if checkpoint.head else 0
    return of_head + (len(checkpoint.snapshot.history) if checkpoint.snapshot else 0)


def _stored(store: Store, name: RunFile, data: bytes, media_type: str) -> StoredFile:
    return StoredFile(name=name, sha256=store.put(data), size_bytes=len(data), media_type=media_type)


class _Registry:
    """Answers an experiment's questions about networks through the worker."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        return self._channel.ask(FindBackbone(**asdict(key)), DigestAnswer).digest

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: JsonObject) -> Digest:
        return self._settled(AddBackbone(**asdict(key), digest=digest, facts=facts))

    def find_quantised(self, backbone: Digest) -> Digest | None:
        return self._channel.ask(FindQuantised(backbone=backbone, image_rule=IMAGE_RULE), DigestAnswer).digest

    def add_quantised(self, backbone: Digest, digest: Digest, facts: JsonObject) -> Digest:
        return self._settled(AddQuantised(backbone=backbone, image_rule=IMAGE_RULE, digest=digest, facts=facts))

    def find_bake_off_result(self) -> JsonObject | None:
        return self._channel.ask(FindFeaturesChoice(), ChoiceAnswer).choice

    def set_bake_off_result(self, facts: JsonObject) -> None:
        self._channel.ask(SetFeaturesChoice(choice=facts, weights=facts["weights"]), Stored)

    def find_precision_decision(self) -> JsonObject | None:
        return self._channel.ask(FindPrecisionChoice(), ChoiceAnswer).choice

    def set_precision_decision(self, facts: JsonObject) -> None:
        self._channel.ask(SetPrecisionChoice(choice=facts), Stored)

    def _settled(self, question: AddBackbone | AddQuantised) -> Digest:
        """Return the file that counts after one was added."""
        digest = self._channel.ask(question, DigestAnswer).digest
        assert digest is not None, "One was added just now, so one counts. This is a bug."
        return digest
