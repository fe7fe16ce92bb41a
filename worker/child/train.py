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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.bucket_store import open_store
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store, StoreAddress
from errors import Corrupt, DiskFull, NotFound, OutOfMemory, StoreUnavailable
from recipes.catalogue import BackboneName
from recipes.filled import parse_filled
from worker.child import weights
from worker.child.channel import Channel
from worker.child.fold_progress import Abreast
from worker.child.weights import Source

if TYPE_CHECKING:
    from training.data.extraction import Extraction
    from training.experiment import Experiment, Outcome
    from training.fitting.checkpoint import Checkpoint
    from training.fitting.fold_outcome import FoldOutcome
    from training.fitting.learners import Plan
    from training.networks.network_files import BackboneKey

SAY_EVERY_S = 1.0
# Copying the state of a small head takes longer than some of its epochs.
_TAKE_EVERY_S = 0.5
_WRITE_EVERY_S = 1.0
_DISK_PAUSE_S = 60.0
_BEATS = 16


def train(order: Mapping[str, Any], channel: Channel) -> None:
    """Do what is ordered, and then what is ordered next, for as long as there is somebody to order it.

    Sends `progress`, `epoch`, `checkpoint`, `fold`, `extraction`, `file` and `alive`, then for each order `prepared`,
    `fold` or `outcome`.
    """
    desk: _Desk | None = None
    while True:
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
    """One experiment, made ready once."""

    def __init__(self, order: Mapping[str, Any], channel: Channel) -> None:
        given = order["experiment"]
        self._given = given
        self._channel = channel
        self._store = open_store(StoreAddress(**given["store"]))
        self._recipe = parse_filled(given["recipe"])
        self._reporter = _Reporter(channel, self._store)
        self._reporter.follow(order)
        self._weights = self._find_weights()
        self._reporter.marked = {"run": given["run"], "manifest": given["manifest"], "weights": self._weights}
        self._reporter.marked["recipe"] = self._recipe.model_dump(mode="json")
        self._experiment = self._prepare()

    def fits(self, order: Mapping[str, Any]) -> bool:
        """Say whether an order is about this experiment."""
        wanted = order["experiment"]
        return wanted["weights"] in (None, self._weights) and all(
            wanted[name] == self._given[name] for name in ("run", "recipe", "manifest", "labels", "threads")
        )

    def do(self, order: Mapping[str, Any]) -> None:
        """Train what is ordered."""
        self._reporter.follow(order)
        folds = range(len(self._experiment.folds))
        match order["part"]:
            case "prepare":
                self._channel.send("prepared")
            case "fold":
                self._experiment.learn_fold(order["fold"])
            case "final":
                self._finish(order, [self._outcome(order, number) for number in folds])
            case "all":
                left = [number for number in folds if str(number) not in order["outcomes"]]
                learned = dict(zip(left, self._experiment.learn_folds(left), strict=True))
                self._finish(order, [learned.get(number) or self._outcome(order, number) for number in folds])

    def _finish(self, order: Mapping[str, Any], outcomes: Sequence[FoldOutcome]) -> None:
        from training.data.extraction import Extraction

        extraction = Extraction(**order["extraction"]) if order["extraction"] else None
        fold_outcome: Outcome = self._experiment.finish(outcomes, extraction)
        files = fold_outcome.files.items()
        self._channel.send(
            "outcome",
            bundle=fold_outcome.bundle,
            backbone=fold_outcome.backbone,
            metrics=fold_outcome.metrics,
            training_s=fold_outcome.training_s,
            files=[_stored(self._store, name, data, media_type) for name, (data, media_type) in files],
        )

    def _outcome(self, order: Mapping[str, Any], number: int) -> FoldOutcome:
        from training.fitting import fold_outcome

        return fold_outcome.load(self._store.read(Digest(order["outcomes"][str(number)])))

    def _find_weights(self) -> Digest | None:
        """Return weights that lie in the store, getting them there if need be; None for a network from scratch."""
        given, recipe = self._given, self._recipe
        backbone = recipe.backbone
        if not isinstance(backbone, BackboneName) or recipe.weights is None:
            return None
        if given["weights"] is not None:
            return Digest(given["weights"])

        def downloaded(done_bytes: int, total_bytes: int | None, eta_s: float | None) -> None:
            share = done_bytes / total_bytes if total_bytes else 0.0
            self._channel.send("progress", state={"stage": "weights", "share": share, "eta_s": eta_s})

        found = weights.obtain(backbone, recipe.weights, self._store, Source(**given["source"]), downloaded)
        self._channel.ask("weights", network=backbone, name=recipe.weights, sha256=found.sha256, source=found.source)
        return found.sha256

    def _prepare(self) -> Experiment:
        given = self._given
        # Imported here and now: TensorFlow takes seconds, and weights that cannot be had should be told before.
        from training.experiment import Experiment
        from training.networks.network_files import Workspace
        from training.setup import Order

        limits = ImageLimits(**{**given["image_limits"], "formats": tuple(given["image_limits"]["formats"])})
        place = Workspace(
            store=self._store,
            features=Path(given["features"]),
            pixels=Path(given["pixels"]),
            pixels_bytes=given["pixels_bytes"],
            image_limits=limits,
            threads=given["threads"],
        )
        candidates = {
            BackboneName(name): Digest(sha256)
            for name, sha256 in given["candidates"].items()
            if self._store.has(Digest(sha256))
        }
        order = Order(self._recipe, Digest(given["manifest"]), given["labels"], self._weights, candidates)
        return Experiment(order, place, _Registry(self._channel), self._reporter)


class _Reporter:
    """Sends what an experiment reports, its progress and that it lives at most once a second."""

    def __init__(self, channel: Channel, store: Store) -> None:
        self.marked: dict[str, Any] = {}
        """What the run's checkpoints belong to."""
        self._channel = channel
        self._store = store
        self._order: Mapping[str, Any] = {}
        self._said_at = 0.0
        self._stage = ""
        self._entered = time.monotonic()
        self._pulse = _Pulse(channel)
        self._abreast = Abreast()

    def follow(self, order: Mapping[str, Any]) -> None:
        """Report from now on about what this order asks for."""
        self._order = order

    def stage(self, name: str) -> None:
        self._stage, self._entered = name, time.monotonic()
        self._say(stage=name, share=0.0, at_once=True)

    def images(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        spent_s = time.monotonic() - self._entered
        self._pulse.beat()
        if share:  # at 0 it only lives: the stage itself has said that it began
            self._say(stage=self._stage, share=share, eta_s=spent_s * (1 - share) / share)

    def extracted(self, extraction: Extraction) -> None:
        self._channel.send("extraction", extraction=asdict(extraction))

    def part(self, number: int | None, plan: Plan) -> _Part:
        found = self._order["checkpoints"].get("final" if number is None else str(number), [])
        share = self._order["checkpoint_share"]
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
        self._channel.send("fold", result=asdict(outcome.result), outcome=self._store.put(outcome.dump()))

    def file(self, name: str, data: bytes, media_type: str) -> None:
        self._channel.send("file", file=_stored(self._store, name, data, media_type))

    def _say(self, *, at_once: bool = False, **state: Any) -> None:
        now = time.monotonic()
        if at_once or now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            self._channel.send("progress", state=state)


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
            self._channel.send("alive", step_s=statistics.median(self._gaps_s))


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
        self._channel.send("epoch", fold=self._number, epoch=number, metrics=metrics)

    def batch(self, epochs: float) -> None:
        self._pulse.beat()
        self._say(**self._abreast.move(self._number, epochs))

    def unfrozen(self, epochs: int) -> None:
        self._say(**self._abreast.unfreeze(self._number, epochs), at_once=True)


class _Keeper:
    """Writes checkpoints of one part into the store, as often as a share of the time allows."""

    def __init__(
        self,
        channel: Channel,
        store: Store,
        marked: Mapping[str, Any],
        number: int | None,
        found: Sequence[str],
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
            self._channel.send("checkpoint", fold=self._number, epochs=epochs, sha256=digest, size_bytes=len(data))
            self._written_at = time.monotonic()
            cost_s = self._written_at - started
            self._pause_s = max(_WRITE_EVERY_S, cost_s / self._share) * max(1, self._abreast())

    def _find(self, digests: Sequence[str]) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and fits."""
        from training.fitting import checkpoint

        for digest in digests:
            try:
                found = checkpoint.load(self._store.read(Digest(digest)), self._mark)
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


def _stored(store: Store, name: str, data: bytes, media_type: str) -> dict[str, Any]:
    return {"name": name, "sha256": store.put(data), "size_bytes": len(data), "media_type": media_type}


class _Registry:
    """Answers an experiment's questions about networks through the worker."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        answer = self._channel.ask("find_backbone", key=asdict(key))["digest"]
        return None if answer is None else Digest(answer)

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        return Digest(self._channel.ask("add_backbone", key=asdict(key), digest=digest, facts=facts)["digest"])

    def find_quantised(self, backbone: Digest) -> Digest | None:
        answer = self._channel.ask("find_quantised", backbone=backbone, image_rule=IMAGE_RULE)["digest"]
        return None if answer is None else Digest(answer)

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        answer = self._channel.ask(
            "add_quantised", backbone=backbone, image_rule=IMAGE_RULE, digest=digest, facts=facts
        )
        return Digest(answer["digest"])

    def find_pick(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._channel.ask("find_pick")["pick"]
        return found

    def set_pick(self, facts: dict[str, Any]) -> None:
        self._channel.ask("set_pick", pick=facts)

    def find_precision_decision(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._channel.ask("find_choice")["choice"]
        return found

    def set_precision_decision(self, facts: dict[str, Any]) -> None:
        self._channel.ask("set_choice", choice=facts)
