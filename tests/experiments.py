"""Whole runs in this process, for tests: a place, what is known of networks, and what is told of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporting import Exports

from artifacts import manifest
from artifacts.images import ImageLimits
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.run_files import RunFile
from artifacts.store import Digest, Store, digest_at
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.recipe import Recipe, Task
from training import experiment
from training.experiment import Experiment, Outcome
from training.fitting import checkpoint as checkpoints
from training.fitting.checkpoint import Checkpoint
from training.fitting.fold_outcome import FoldOutcome
from training.fitting.learners import Plan
from training.networks.network_files import BackboneKey, Workspace
from training.progress import Epoch, Extraction, FoldResult
from training.setup import TrainingRequest

QUICK: dict[str, Any] = {
    "backbone": "vgg16",
    "weights": "random",
    "features_from": "block1",
    "image_size": 32,
    "epochs": 6,
    "optimizer": {"learning_rate": 0.05},
    "folds": {"k": 3},
}

SPENT_S = 10_000.0


@dataclass
class MemoryRegistry:
    """The registry of an experiment, in memory: exported and quantised networks, and the choices of the last run."""

    exports: dict[BackboneKey, Digest] = field(default_factory=dict)
    quantised: dict[Digest, Digest] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] | None = None
    pick: dict[str, Any] | None = None
    earlier: Callable[[BackboneKey], Digest | None] = lambda key: None

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        if key not in self.exports and (digest := self.earlier(key)) is not None:
            self.exports[key] = digest
        return self.exports.get(key)

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        assert facts["largest_relative_difference"] < 1e-4
        return self.exports.setdefault(key, digest)

    def find_quantised(self, backbone: Digest) -> Digest | None:
        return self.quantised.get(backbone)

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        self.facts = facts
        return self.quantised.setdefault(backbone, digest)

    def find_bake_off_result(self) -> dict[str, Any] | None:
        return self.pick

    def set_bake_off_result(self, facts: dict[str, Any]) -> None:
        self.pick = json.loads(json.dumps(facts))

    def find_precision_decision(self) -> dict[str, Any] | None:
        return self.choice

    def set_precision_decision(self, facts: dict[str, Any]) -> None:
        self.choice = json.loads(json.dumps(facts))


AUGMENTATION = {"rotate_degrees": 10, "zoom": 0.1, "brightness": 0.1}

IsCut = Callable[[int | None, Checkpoint], bool]


class Interrupted(Exception):
    """Raised to interrupt an experiment in a part of it, after this checkpoint."""

    def __init__(self, part: int | None, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.part = part
        self.checkpoint = checkpoint


class RecordingFitListener:
    """Records the reports of one fit, and interrupts it where `is_cut` returns True."""

    def __init__(self, number: int | None, found: Checkpoint | None, is_cut: IsCut) -> None:
        self.number = number
        self.checkpoint = found
        self.epochs: list[int] = []
        self.done: list[float] = []
        self.unfrozen_after: int | None = None
        self._is_cut = is_cut

    def epoch_ended(self, number: int, metrics: Epoch) -> None:
        self.epochs.append(number)

    def epochs_done(self, epochs: float) -> None:
        self.done.append(epochs)

    def network_unfrozen(self, epochs: int) -> None:
        self.unfrozen_after = epochs

    def offer_checkpoint(self, take: Callable[[], Checkpoint]) -> None:
        checkpoint = take()
        if self._is_cut(self.number, checkpoint):
            raise Interrupted(self.number, checkpoint)


@dataclass
class RecordingListener:
    """Records all reports of an experiment."""

    stages: list[str] = field(default_factory=list)
    parts: dict[int | None, RecordingFitListener] = field(default_factory=dict)
    outcomes: list[FoldOutcome] = field(default_factory=list)
    files: dict[RunFile, bytes] = field(default_factory=dict)
    extraction: Extraction | None = None
    since: dict[int | None, Checkpoint] = field(default_factory=dict)
    is_cut: IsCut = lambda part, checkpoint: False

    def stage(self, name: str) -> None:
        if not self.stages or self.stages[-1] != name:
            self.stages.append(name)

    def images(self, done: int, total: int) -> None:
        assert done <= total

    def extracted(self, extraction: Extraction) -> None:
        self.extraction = extraction

    def begin_fit(self, number: int | None, plan: Plan) -> RecordingFitListener:
        self.parts[number] = RecordingFitListener(number, self.since.get(number), self.is_cut)
        return self.parts[number]

    def fold_ended(self, outcome: FoldOutcome) -> None:
        self.outcomes.append(outcome)

    def file(self, name: RunFile, data: bytes, media_type: str) -> None:
        self.files[name] = data

    @property
    def folds(self) -> list[FoldResult]:
        """The results of the folds that have ended."""
        return [outcome.result for outcome in self.outcomes]


def task_of(rows: list[Row], labels: list[str]) -> Task:
    if rows[0].target is not None:
        return Task.REGRESSION
    if any(len(row.labels) != 1 for row in rows):
        return Task.MULTILABEL
    return Task.BINARY if len(labels) == 2 else Task.MULTICLASS


class ExperimentRunner:
    """Runs experiments on images and weights in a store of its own.

    Backbones for the smallest image size are treated as exported by earlier runs, unless `is_new`.
    """

    def __init__(self, folder: Path, exports: Exports, is_new: bool = False) -> None:
        self._exports = exports
        self.store = Store(folder / "store")
        self.place = Workspace(
            store=self.store,
            features=folder / "features",
            pixels=folder / "pixels",
            pixels_bytes=10**9,
            image_limits=ImageLimits(),
            threads=2,
        )
        self.known = MemoryRegistry() if is_new else MemoryRegistry(earlier=self._exported_earlier)
        self.weights: dict[BackboneName, Digest] = {}

    def rows(self, files: dict[str, bytes], split: Split = Split.TRAIN) -> list[Row]:
        return [
            Row(path, self.store.put(data), (path.split("/")[0],), None, None, split) for path, data in files.items()
        ]

    def weights_of(self, name: BackboneName) -> Digest:
        if name not in self.weights:
            file = self._exports.weights(name)
            self.weights[name] = digest = digest_at(file)
            place = self.store.path_for(digest)
            place.parent.mkdir(exist_ok=True)
            place.hardlink_to(file)
        return self.weights[name]

    def _exported_earlier(self, key: BackboneKey) -> Digest | None:
        if key != BackboneKey(key.network, self.weights_of(key.network), key.cut, CATALOGUE[key.network].minimum_size):
            return None
        return self.store.put(self._exports.get(key.network, key.cut).onnx)

    def run(
        self,
        rows: list[Row],
        heard: RecordingListener | None = None,
        candidates: dict[BackboneName, Digest] | None = None,
        **change: Any,
    ) -> tuple[Outcome, RecordingListener]:
        heard = heard or RecordingListener()
        return experiment.run(self._order(rows, candidates, change), self.place, self.known, heard), heard

    def _order(
        self, rows: list[Row], candidates: dict[BackboneName, Digest] | None, change: Mapping[str, Any]
    ) -> TrainingRequest:
        labels = sorted({label for row in rows for label in row.labels})
        counts = [ClassCount(label, 99, 99) for label in labels]
        base = {} if change.get("mode") == "from-scratch" else QUICK
        recipe = fill(Recipe.model_validate({**base, **change}), task_of(rows, labels), counts, groups=99)
        weights = self.weights_of(recipe.backbone) if recipe.backbone and not candidates else None
        return TrainingRequest(recipe, self.store.put(manifest.dump(rows)), labels, weights, candidates or {})

    def run_with_cuts(self, rows: list[Row], cuts: set[tuple[int | None, str, int]], **change: Any) -> Outcome:
        """Run an experiment, interrupt it at each (part, phase, epoch) of `cuts`, and continue from the checkpoint.

        Each checkpoint says that its part took SPENT_S. A fold that has ended is not trained again.
        """
        left = set(cuts)
        since: dict[int | None, Checkpoint] = {}
        ended: list[FoldOutcome] = []
        order = self._order(rows, None, change)

        def is_cut(part: int | None, checkpoint: Checkpoint) -> bool:
            epochs = len(checkpoint.snapshot.history) if checkpoint.snapshot else 0
            place = (part, "network" if checkpoint.head else "head", epochs)
            is_here = place in left
            left.discard(place)
            return is_here

        while True:
            try:
                found = Experiment(
                    order, self.place, self.known, RecordingListener(outcomes=ended, since=since, is_cut=is_cut)
                )
                found.learn_folds(sorted(set(range(len(found.folds))) - {one.result.number for one in ended}))
                outcome = found.finish(sorted(ended, key=lambda one: one.result.number))
            except Interrupted as cut:
                since[cut.part] = replace(kept(cut.checkpoint), seconds=SPENT_S)
            else:
                assert not left, f"never came to {left}"
                return outcome


def kept(checkpoint: Checkpoint) -> Checkpoint:
    """Write a checkpoint and read it again; return the result."""
    found = checkpoints.load(checkpoints.dump(checkpoint, "mine"), "mine")
    assert found is not None
    return found
