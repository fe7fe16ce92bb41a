"""One run from images to a bundle, to be read like the method section of a paper. Knows no rows, queues or HTTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from training.augment import contact_sheet
from training.export import EXPORT_VERSION, export
from training.extract import Extraction, extract
from training.finetune import Material, computed_maps
from training.fit import Epoch
from training.learn import Frozen, Learned, Learner, Tuning, final_plan
from training.pixels import Decoder, Loaded, Source, drop_pixels, load_pixels
from training.split import Fold, Indices, make_folds
from training.targets import Truth, targets_of


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
    """Who is told how far the run is."""

    def progress(self, **state: Any) -> None:
        """Replace the progress: stage, fraction, fold, folds, epoch, epochs, eta_s."""
        ...

    def alive(self) -> None:
        """Tell that the run moves; may be called for every batch, since a run that says nothing for long is stopped."""
        ...

    def epoch(self, fold: int | None, number: int, metrics: Epoch) -> None:
        """Tell that an epoch ended; fold None is the final fit."""
        ...

    def fold(self, result: FoldResult) -> None:
        """Tell that a fold ended."""
        ...

    def file(self, name: str, data: bytes, media_type: str) -> None:
        """Keep a file with the run, before its end."""
        ...


@dataclass(frozen=True)
class Place:
    """Where an experiment runs: folders, limits and threads.

    `features` and `pixels` hold caches, the latter up to about `pixels_bytes`.
    """

    store: Store
    features: Path
    pixels: Path
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int


@dataclass(frozen=True)
class FoldResult:
    """What one fold measured on its test images."""

    number: int
    epochs: int
    best_epoch: int
    stopped: str
    metrics: dict[str, Any]
    history: list[Epoch]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: digests of stored files, and numbers.

    `files` holds what is kept with the run under a name: bytes and media type.
    """

    bundle: Digest
    backbone: Digest
    metrics: dict[str, Any]
    extraction: dict[str, Any]
    files: dict[str, tuple[bytes, str]] = field(default_factory=dict)


def run(
    recipe: Recipe,
    version_manifest: Digest,
    labels: Sequence[str],
    weights: Digest,
    place: Place,
    registry: Registry,
    report: Reporter,
) -> Outcome:
    """Train and measure a classifier: a head on a frozen backbone, or the backbone with it.

    Args:
        recipe: what to do, every default filled in.
        version_manifest: the data set version, in the store.
        labels: class names in the order of the outputs.
        weights: the backbone's weights, in the store.
        place: where to work.
        registry: backbones known so far.
        report: told of progress, epochs and folds.
    """
    clock = _Progress(recipe.mode, report)
    rows = manifest.load(place.store.read(version_manifest))
    task = Task(recipe.task.value)
    targets = targets_of(task, labels, rows)
    truth = targets.truth
    belongs = manifest.group_rows(rows)
    groups = np.array(belongs, dtype=np.intp)
    split = manifest.splits_of(rows, belongs)
    trained_on = _rows_in(split, Split.TRAIN)
    watched = _rows_in(split, Split.VALIDATION)
    held_out = _rows_in(split, Split.TEST)

    k, repeats = recipe.folds.k or 0, recipe.folds.repeats
    folds = make_folds(
        trained_on,
        targets.strata,
        targets.needed,
        groups,
        watched,
        k=k,
        repeats=repeats,
        validation_fraction=recipe.folds.validation_fraction if recipe.early_stopping else 0.0,
        seed=recipe.seed,
    )

    with contextlib.ExitStack() as stack:
        digests = [row.sha256 for row in rows]
        decoder = Decoder(place.store, _size(recipe), recipe.resize, place.image_limits, place.threads)
        source: Source = decoder
        if recipe.mode is Mode.FINE_TUNING:
            clock.enter("pixels")
            drop_pixels(place.pixels, place.pixels_bytes)
            pixels = load_pixels(digests, decoder, place.pixels, clock.images)
            source = Loaded(digests, pixels)

        clock.enter("backbone")
        backbone = _backbone(recipe, recipe.features_from or "", weights, place, registry)
        engine = OpenVinoEngine(place.store.verified_path(backbone), recipe.precision, place.threads)

        clock.enter("features")
        started = time.perf_counter()
        features, extraction = _features(recipe, digests, backbone, engine, place, source, clock)
        extraction_s = time.perf_counter() - started

        frozen = Frozen(recipe, task, _outputs(task, labels), features, truth, report.alive)
        learner: Learner = frozen
        if recipe.mode is Mode.FINE_TUNING:
            if recipe.augmentation is not None:
                shown = contact_sheet(recipe.augmentation, pixels[_spread(len(rows), _SHOWN)], recipe.seed)
                report.file("augmentations.png", shown, "image/png")
            clock.enter("activations")
            material = stack.enter_context(_material(recipe, pixels, weights, place, registry, clock))
            learner = Tuning(recipe, task, frozen, place.store.read(weights), material, truth)

        clock.enter("folds")
        out_of_fold = np.full((repeats, len(rows), _outputs(task, labels)), np.nan, dtype=np.float32)
        fold_of = np.full((repeats, len(rows)), -1, dtype=np.int16)
        results, phases, kept = [], [], []
        for fold in folds:
            learned = _learn_fold(recipe, learner, fold, len(folds), clock, report)
            logits = _finite(learned.logits(fold.test))
            out_of_fold[fold.repeat, fold.test] = logits
            fold_of[fold.repeat, fold.test] = fold.number
            results.append(_fold_result(task, labels, fold, learned, truth, logits))
            phases.append(learned.phases)
            kept.append(learned.kept)
            report.fold(results[-1])
            clock.fold_done(len(folds))

        metrics = evaluate.pooled(
            task,
            labels,
            truth[trained_on],
            groups[trained_on],
            out_of_fold[:, trained_on],
            [result.metrics for result in results],
        )

        clock.enter("final")
        plan = final_plan(phases, kept)
        final = learner.learn(
            np.union1d(trained_on, watched),
            np.array([], dtype=np.intp),
            plan,
            _seed(recipe, len(folds)),
            lambda number, epoch: clock.final_epoch(number, plan.epochs, epoch),
        )
        if len(held_out):
            metrics["test"] = evaluate.held_out(task, labels, truth[held_out], groups[held_out], final.logits(held_out))
        if final.network is not None:
            clock.enter("export")
            shown_to_both = pixels[_spread(len(rows), _CHECKED)]
            backbone, facts = _export_tuned(recipe, final.network(), shown_to_both, place)
            metrics["export"] = facts
            engine = OpenVinoEngine(place.store.verified_path(backbone), recipe.precision, place.threads)

    clock.enter("bundle")
    bundle = _bundle(recipe, task, labels, backbone, engine, final.layers)
    guesses = np.nanmean(out_of_fold[:, trained_on], axis=0)
    description = describe.Description(
        recipe, task, labels, len(rows), truth[trained_on], guesses, metrics, results, plan, extraction
    )
    return Outcome(
        bundle=place.store.put(bundle.dump()),
        backbone=backbone,
        metrics=metrics,
        extraction={**asdict(extraction), "seconds": round(extraction_s, 3)},
        files={
            "out-of-fold.safetensors": (_out_of_fold(fold_of, out_of_fold), "application/octet-stream"),
            "report.md": (describe.report(description).encode(), "text/markdown"),
            **{name: (picture, "image/png") for name, picture in describe.pictures(description).items()},
        },
    )


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
    clock: _Progress,
) -> tuple[Features, Extraction]:
    """Return the features of every image, float32 [N, D], computing those that no run has computed before."""
    space = FeatureSpace(IMAGE_RULE, _size(recipe), recipe.resize, backbone, recipe.precision)
    cache = FeatureCache(place.features, space, CATALOGUE[recipe.backbone].cuts[recipe.features_from or ""])
    extraction = extract(digests, engine, cache, source, clock.images)
    cache.close()
    return cache.rows(digests), extraction


@contextlib.contextmanager
def _material(
    recipe: Recipe, pixels: Pixels, weights: Digest, place: Place, registry: Registry, clock: _Progress
) -> Iterator[Material]:
    """Yield what the learning part reads: without augmentation, the frozen part is gone through only once."""
    boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze or "")
    if boundary is None or recipe.augmentation is not None:
        yield Material(pixels, are_maps=False)
        return
    frozen = _backbone(recipe, boundary, weights, place, registry)
    engine = OpenVinoEngine(place.store.verified_path(frozen), recipe.precision, place.threads)
    with computed_maps(engine, pixels, place.pixels, clock.images) as maps:
        yield Material(maps, are_maps=True)


def _export_tuned(recipe: Recipe, weights: bytes, images: Pixels, place: Place) -> tuple[Digest, dict[str, Any]]:
    """Export a network that has learned, checked against Keras on its own images; return its digest and the check."""
    model = backbones.backbone(recipe.backbone, recipe.features_from or "", _size(recipe), weights)
    exported = export(model, place.threads, images)
    return place.store.put(exported.onnx), exported.facts()


def _learn_fold(
    recipe: Recipe, learner: Learner, fold: Fold, folds: int, clock: _Progress, report: Reporter
) -> Learned:
    def on_epoch(number: int, metrics: Epoch) -> None:
        report.epoch(fold.number, number, metrics)
        clock.epoch(fold.number, folds, number, learner.plan.epochs)

    return learner.learn(fold.train, fold.validation, learner.plan, _seed(recipe, fold.number), on_epoch)


def _finite(logits: Float32) -> Float32:
    """Return logits that are numbers all. Raises TrainingDiverged."""
    if not np.isfinite(logits).all():
        raise TrainingDiverged("What was learned answers with infinite numbers. Lower optimizer.learning_rate.")
    return logits


def _fold_result(
    task: Task, labels: Sequence[str], fold: Fold, learned: Learned, truth: Truth, logits: Float32
) -> FoldResult:
    metrics: dict[str, Any] = evaluate.brief(evaluate.score(task, labels, truth[fold.test], logits))
    metrics["images"] = {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)}
    if len(learned.phases) > 1:
        metrics["phases"] = [asdict(phase) for phase in learned.phases]
        metrics["kept"] = learned.kept
    best = learned.history[learned.best_epoch - 1]
    if "val_loss" in best:
        metrics["gap"] = best["val_loss"] - best["loss"]
    return FoldResult(
        number=fold.number,
        epochs=len(learned.history),
        best_epoch=learned.best_epoch,
        stopped=learned.stopped,
        metrics=metrics,
        history=learned.history,
    )


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


def _outputs(task: Task, labels: Sequence[str]) -> int:
    return 1 if task in (Task.BINARY, Task.REGRESSION) else len(labels)


def _size(recipe: Recipe) -> int:
    return recipe.image_size or CATALOGUE[recipe.backbone].size


def _seed(recipe: Recipe, number: int) -> int:
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])


# Shares of the whole that were typical; only the bar's evenness depends on them, the ETA is measured.
_STAGES: Mapping[Mode, Mapping[str, float]] = {
    Mode.FEATURE_EXTRACTION: {
        "backbone": 0.0,
        "features": 0.1,
        "folds": 0.6,
        "final": 0.95,
        "bundle": 0.98,
        "end": 1.0,
    },
    Mode.FINE_TUNING: {
        "pixels": 0.0,
        "backbone": 0.02,
        "features": 0.04,
        "activations": 0.07,
        "folds": 0.1,
        "final": 0.8,
        "export": 0.94,
        "bundle": 0.98,
        "end": 1.0,
    },
}


class _Progress:
    """How far the run is, as one fraction, and how long the rest should take by the speed measured so far."""

    def __init__(self, mode: Mode, report: Reporter, now: Callable[[], float] = time.monotonic) -> None:
        self._starts = _STAGES[mode]
        self._report = report
        self._now = now
        self._stage = ""
        self._entered = now()
        self._fold_s: list[float] = []
        self._fold_started = now()

    def enter(self, stage: str) -> None:
        self._stage = stage
        self._entered = self._fold_started = self._now()
        self._report.progress(stage=stage, fraction=self._starts[stage])

    def images(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        self._report.progress(stage=self._stage, fraction=self._within(share), eta_s=self._eta(share))

    def epoch(self, fold: int, folds: int, epoch: int, epochs: int) -> None:
        in_fold = min(epoch / epochs, 0.95)
        spent = self._now() - self._fold_started
        # Until a fold has ended, as if none stopped early.
        typical = sum(self._fold_s) / len(self._fold_s) if self._fold_s else spent * epochs / epoch
        self._report.progress(
            stage="folds",
            fraction=self._within((fold + in_fold) / folds),
            fold=fold + 1,
            folds=folds,
            epoch=epoch,
            epochs=epochs,
            eta_s=max(0.0, typical * (folds + 1 - fold) - spent),
        )

    def fold_done(self, folds: int) -> None:
        self._fold_s.append(self._now() - self._fold_started)
        self._fold_started = self._now()

    def final_epoch(self, epoch: int, epochs: int, metrics: Epoch) -> None:
        self._report.epoch(None, epoch, metrics)
        share = epoch / epochs
        self._report.progress(
            stage="final", fraction=self._within(share), epoch=epoch, epochs=epochs, eta_s=self._eta(share)
        )

    def _within(self, share: float) -> float:
        """Return the fraction of the whole for a share of the present stage."""
        names = list(self._starts)
        start, end = self._starts[self._stage], self._starts[names[names.index(self._stage) + 1]]
        return start + (end - start) * share

    def _eta(self, share: float) -> float | None:
        return (self._now() - self._entered) * (1 - share) / share if share else None
