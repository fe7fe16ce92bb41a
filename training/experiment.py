"""One run from images to a bundle, to be read like the method section of a paper. Knows no rows, queues or HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save as save_tensors

from artifacts import manifest
from artifacts.bundle import Bundle, Dense, Float32
from artifacts.catalogue import CATALOGUE, BackboneName
from artifacts.features import FeatureCache, Features, FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits, Pixels
from artifacts.layout import Split
from artifacts.recipe import Mode, Recipe, Task
from artifacts.store import Digest, Store
from errors import TrainingDiverged
from inference import heads
from inference.engine import OpenVinoEngine
from training import backbones, describe, evaluate
from training.arrays import drop_unused, load_maps, load_pixels
from training.augment import contact_sheet
from training.checkpoint import Keeper
from training.export import EXPORT_VERSION, export
from training.extract import Extraction, extract
from training.finetune import Material
from training.learn import Frozen, Learned, Learner, Lesson, Listener, Tuning, final_plan
from training.outcome import FoldOutcome, FoldResult
from training.pixels import Decoder, Loaded, Source
from training.split import Fold, Indices, make_folds
from training.targets import targets_of


@dataclass(frozen=True)
class BackboneKey:
    """What an exported backbone was made from."""

    network: BackboneName
    weights: Digest
    cut: str
    size: int
    export_version: int = EXPORT_VERSION


class Registry(Protocol):
    """What the outside knows of backbones, and is told of new ones."""

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        """Return the digest of the export that counts for a key, or None."""
        ...

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Tell of an export; return the digest that counts, which may be an earlier one's."""
        ...


class Reporter(Protocol):
    """Who is told how far the experiment is, and keeps what it can go on from."""

    def stage(self, name: str) -> None:
        """Tell that a stage begins."""
        ...

    def images(self, done: int, total: int) -> None:
        """Tell how many images the present stage has seen to."""
        ...

    def extracted(self, extraction: Extraction) -> None:
        """Tell what extraction had to compute."""
        ...

    def part(self, number: int | None, epochs: int) -> Part:
        """Begin a fold, or the final fit (None), of `epochs` epochs at most; return who hears of it and keeps it."""
        ...

    def fold(self, outcome: FoldOutcome) -> None:
        """Tell that a fold ended."""
        ...

    def file(self, name: str, data: bytes, media_type: str) -> None:
        """Keep a file with the run, before its end."""
        ...


class Part(Listener, Keeper, Protocol):
    """One fold, or the final fit: hears how it goes, and keeps its checkpoints."""


@dataclass(frozen=True)
class Place:
    """Where an experiment runs: folders, limits and threads.

    `features` and `pixels` hold caches, the latter (with maps) up to about `pixels_bytes`.
    """

    store: Store
    features: Path
    pixels: Path
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: digests of stored files, and numbers.

    `training_s` are the seconds of extraction, folds and final fit together. `files` holds what is kept with the run
    under a name: bytes and media type.
    """

    bundle: Digest
    backbone: Digest
    metrics: dict[str, Any]
    training_s: float
    files: dict[str, tuple[bytes, str]] = field(default_factory=dict)


def run(order: Order, place: Place, registry: Registry, report: Reporter) -> Outcome:
    """Train and measure a model: a head on a frozen backbone, or the backbone with it."""
    experiment = Experiment(order, place, registry, report)
    outcomes = [experiment.learn_fold(number) for number in range(len(experiment.folds))]
    return experiment.finish(outcomes)


@dataclass(frozen=True)
class Order:
    """What is to be done.

    Attributes:
        recipe: every default filled in.
        manifest: the data set version, in the store.
        labels: class names in the order of the outputs.
        weights: the backbone's weights, in the store.
    """

    recipe: Recipe
    manifest: Digest
    labels: Sequence[str]
    weights: Digest


class Experiment:
    """A recipe on a data set version: what all its folds read is computed when it is made."""

    def __init__(self, order: Order, place: Place, registry: Registry, report: Reporter) -> None:
        recipe = order.recipe
        self._order, self._place, self._report = order, place, report
        rows = manifest.load(place.store.read(order.manifest))
        self._count = len(rows)
        self._task = Task(recipe.task.value)
        targets = targets_of(self._task, order.labels, rows)
        self._truth = targets.truth
        belongs = manifest.group_rows(rows)
        self._groups = np.array(belongs, dtype=np.intp)
        split = manifest.splits_of(rows, belongs)
        self._trained_on = _rows_in(split, Split.TRAIN)
        self._watched = _rows_in(split, Split.VALIDATION)
        self._held_out = _rows_in(split, Split.TEST)
        self.folds = make_folds(
            self._trained_on,
            targets.strata,
            targets.needed,
            self._groups,
            self._watched,
            k=recipe.folds.k or 0,
            repeats=recipe.folds.repeats,
            validation_fraction=recipe.folds.validation_fraction if recipe.early_stopping else 0.0,
            seed=recipe.seed,
        )

        digests = [row.sha256 for row in rows]
        decoder = Decoder(place.store, _size(recipe), recipe.resize, place.image_limits, place.threads)
        source: Source = decoder
        if recipe.mode is Mode.FINE_TUNING:
            report.stage("pixels")
            drop_unused(place.pixels, place.pixels_bytes)
            self._pixels = load_pixels(digests, decoder, place.pixels, report.images)
            source = Loaded(digests, self._pixels)

        report.stage("backbone")
        self._backbone = _backbone(recipe, recipe.features_from or "", order.weights, place, registry)
        self._engine = OpenVinoEngine(place.store.verified_path(self._backbone), recipe.precision, place.threads)

        report.stage("features")
        features, self._extraction = _features(recipe, digests, self._backbone, self._engine, place, source, report)
        report.extracted(self._extraction)

        frozen = Frozen(recipe, self._task, self._outputs, features, self._truth)
        self._learner: Learner = frozen
        if recipe.mode is Mode.FINE_TUNING:
            if recipe.augmentation is not None:
                shown = contact_sheet(recipe.augmentation, self._pixels[_spread(self._count, _SHOWN)], recipe.seed)
                report.file("augmentations.png", shown, "image/png")
            report.stage("activations")
            material = _material(recipe, digests, self._pixels, order.weights, place, registry, report)
            self._learner = Tuning(recipe, self._task, frozen, place.store.read(order.weights), material, self._truth)

    def learn_fold(self, number: int) -> FoldOutcome:
        """Learn without a fold's test images, then measure on them."""
        self._report.stage("folds")
        started = time.perf_counter()
        fold = self.folds[number]
        part = self._report.part(number, self._learner.plan.epochs)
        lesson = Lesson(fold.train, fold.validation, self._learner.plan, _seed(self._order.recipe, number))
        learned = self._learner.learn(lesson, part, part)
        logits = _finite(learned.logits(fold.test))
        result = FoldResult(
            number=number,
            epochs=len(learned.history),
            best_epoch=learned.best_epoch,
            stopped=learned.stopped,
            metrics=self._fold_metrics(fold, learned, logits),
            history=learned.history,
            seconds=time.perf_counter() - started,
        )
        outcome = FoldOutcome(result, learned.phases, learned.kept, logits)
        self._report.fold(outcome)
        return outcome

    def finish(self, outcomes: Sequence[FoldOutcome], extraction: Extraction | None = None) -> Outcome:
        """Measure over all folds, learn from everything, and write what is served.

        Args:
            outcomes: of every fold, in their order.
            extraction: what the run had to compute, where this experiment found it computed.
        """
        order, place, task, truth = self._order, self._place, self._task, self._truth
        recipe, labels, trained_on, held_out = order.recipe, order.labels, self._trained_on, self._held_out
        extraction = extraction or self._extraction
        started = time.perf_counter()
        shape = (recipe.folds.repeats, self._count, self._outputs)
        out_of_fold = np.full(shape, np.nan, dtype=np.float32)
        fold_of = np.full(shape[:2], -1, dtype=np.int16)
        for fold, outcome in zip(self.folds, outcomes, strict=True):
            out_of_fold[fold.repeat, fold.test] = outcome.logits
            fold_of[fold.repeat, fold.test] = fold.number
        metrics = evaluate.pooled(
            task,
            labels,
            truth[trained_on],
            self._groups[trained_on],
            out_of_fold[:, trained_on],
            [outcome.result.metrics for outcome in outcomes],
        )

        self._report.stage("final")
        plan = final_plan([outcome.phases for outcome in outcomes], [outcome.kept for outcome in outcomes])
        part = self._report.part(None, plan.epochs)
        nothing = np.array([], dtype=np.intp)
        everything = np.union1d(trained_on, self._watched)
        final = self._learner.learn(Lesson(everything, nothing, plan, _seed(recipe, len(self.folds))), part, part)
        if len(held_out):
            groups = self._groups[held_out]
            metrics["test"] = evaluate.held_out(task, labels, truth[held_out], groups, final.logits(held_out))
        backbone, engine = self._backbone, self._engine
        if final.network is not None:
            self._report.stage("export")
            shown_to_both = self._pixels[_spread(self._count, _CHECKED)]
            backbone, metrics["export"] = _export_tuned(recipe, final.network(), shown_to_both, place)
            engine = OpenVinoEngine(place.store.verified_path(backbone), recipe.precision, place.threads)

        self._report.stage("bundle")
        bundle = _bundle(recipe, task, labels, backbone, engine, final.layers)
        description = describe.Description(
            recipe,
            task,
            labels,
            self._count,
            truth[trained_on],
            np.nanmean(out_of_fold[:, trained_on], axis=0),
            metrics,
            [outcome.result for outcome in outcomes],
            plan,
            extraction,
        )
        folds_s = sum(outcome.result.seconds for outcome in outcomes)
        return Outcome(
            bundle=place.store.put(bundle.dump()),
            backbone=backbone,
            metrics=metrics,
            training_s=extraction.seconds + folds_s + time.perf_counter() - started,
            files={
                "out-of-fold.safetensors": (_out_of_fold(fold_of, out_of_fold), "application/octet-stream"),
                "report.md": (describe.report(description).encode(), "text/markdown"),
                **{name: (picture, "image/png") for name, picture in describe.pictures(description).items()},
            },
        )

    @property
    def _outputs(self) -> int:
        return 1 if self._task in (Task.BINARY, Task.REGRESSION) else len(self._order.labels)

    def _fold_metrics(self, fold: Fold, learned: Learned, logits: Float32) -> dict[str, Any]:
        scores = evaluate.score(self._task, self._order.labels, self._truth[fold.test], logits)
        metrics: dict[str, Any] = evaluate.brief(scores)
        metrics["images"] = {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)}
        if len(learned.phases) > 1:
            metrics["phases"] = [asdict(phase) for phase in learned.phases]
            metrics["kept"] = learned.kept
        best = learned.history[learned.best_epoch - 1]
        if "val_loss" in best:
            metrics["gap"] = best["val_loss"] - best["loss"]
        return metrics


# Images on the sheet of augmentations, and images that a fine-tuned network is checked on.
_SHOWN = 8
_CHECKED = 16


def _spread(count: int, most: int) -> Indices:
    """Return up to `most` row numbers, evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


def _backbone(recipe: Recipe, cut: str, weights: Digest, place: Place, registry: Registry) -> Digest:
    """Return the digest of the network exported up to a cut, exporting it if nobody has."""
    key = BackboneKey(recipe.backbone, weights, cut, _size(recipe))
    digest = registry.find_backbone(key)
    if digest is None:
        model = backbones.backbone(recipe.backbone, cut, _size(recipe), place.store.read(weights))
        exported = export(model, place.threads)
        digest = registry.add_backbone(key, place.store.put(exported.onnx), exported.facts())
    return digest


def _features(
    recipe: Recipe,
    digests: Sequence[Digest],
    backbone: Digest,
    engine: OpenVinoEngine,
    place: Place,
    source: Source,
    report: Reporter,
) -> tuple[Features, Extraction]:
    """Return the features of every image, float32 [N, D], computing those that no run has computed before."""
    space = FeatureSpace(IMAGE_RULE, _size(recipe), recipe.resize, backbone, recipe.precision)
    cache = FeatureCache(place.features, space, CATALOGUE[recipe.backbone].cuts[recipe.features_from or ""])
    extraction = extract(digests, engine, cache, source, report.images)
    cache.close()
    return cache.rows(digests), extraction


def _material(
    recipe: Recipe,
    digests: Sequence[Digest],
    pixels: Pixels,
    weights: Digest,
    place: Place,
    registry: Registry,
    report: Reporter,
) -> Material:
    """Return what the learning part reads: without augmentation, the frozen part is gone through only once."""
    boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze or "")
    if boundary is None or recipe.augmentation is not None:
        return Material(pixels, are_maps=False)
    frozen = _backbone(recipe, boundary, weights, place, registry)
    engine = OpenVinoEngine(place.store.verified_path(frozen), recipe.precision, place.threads)
    space = FeatureSpace(IMAGE_RULE, _size(recipe), recipe.resize, frozen, recipe.precision)
    return Material(load_maps(digests, pixels, engine, space, place.pixels, report.images), are_maps=True)


def _export_tuned(recipe: Recipe, weights: bytes, images: Pixels, place: Place) -> tuple[Digest, dict[str, Any]]:
    """Export a network that has learned, checked against Keras on its own images; return its digest and the check."""
    model = backbones.backbone(recipe.backbone, recipe.features_from or "", _size(recipe), weights)
    exported = export(model, place.threads, images)
    return place.store.put(exported.onnx), exported.facts()


def _finite(logits: Float32) -> Float32:
    """Return logits that are numbers all. Raises TrainingDiverged."""
    if not np.isfinite(logits).all():
        raise TrainingDiverged("What was learned answers with infinite numbers. Lower optimizer.learning_rate.")
    return logits


def _bundle(
    recipe: Recipe,
    task: Task,
    labels: Sequence[str],
    backbone: Digest,
    engine: OpenVinoEngine,
    layers: tuple[Dense, ...],
) -> Bundle:
    golden_input = _golden_images(_size(recipe))
    return Bundle(
        task=task,
        labels=tuple(labels),
        backbone=backbone,
        engine=engine.name,
        precision=recipe.precision,
        image_rule=IMAGE_RULE,
        size=_size(recipe),
        resize=recipe.resize,
        layers=layers,
        golden_input=golden_input,
        golden_output=heads.logits(layers, engine.features(golden_input)),
    )


def _golden_images(size: int) -> Pixels:
    """Return an image that shows a broken engine: smooth slopes and hard edges in every channel, uint8 [1, s, s, 3]."""
    y, x = np.mgrid[:size, :size]
    slopes = np.stack([255 * x / size, 255 * y / size, 255 * (x + y) / (2 * size)], axis=-1)
    edges = 64 * ((x * 8 // size + y * 8 // size) % 2)
    image: Pixels = (slopes * 0.75 + edges[..., None]).astype(np.uint8)[None]
    return image


def _out_of_fold(fold_of: np.ndarray, logits: np.ndarray) -> bytes:
    """Return the fold of every image (int16 [repeats, N], -1 where it was in none) and its logits there (NaN)."""
    return save_tensors({"folds": fold_of, "logits": logits})


def _rows_in(splits: Sequence[Split], wanted: Split) -> Indices:
    return np.flatnonzero(np.array([split is wanted for split in splits], dtype=bool))


def _size(recipe: Recipe) -> int:
    return recipe.image_size or CATALOGUE[recipe.backbone].size


def _seed(recipe: Recipe, number: int) -> int:
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])
