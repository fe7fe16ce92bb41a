"""One run from images to a bundle, to be read like the method section of a paper. Knows no rows, queues or HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from safetensors.numpy import save as save_tensors

from artifacts import manifest
from artifacts.bundle import Bundle, Float32
from artifacts.catalogue import CATALOGUE, BackboneName
from artifacts.features import FeatureCache, Features, FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits, Pixels
from artifacts.layout import Split
from artifacts.recipe import Recipe, Task
from artifacts.store import Digest, Store
from inference import heads
from inference.engine import OpenVinoEngine
from training import backbones, describe, evaluate
from training.evaluate import median_epoch
from training.export import EXPORT_VERSION, export
from training.extract import extract
from training.fit import Epoch, Fit, fit
from training.split import Fold, Indices, make_folds


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


@dataclass(frozen=True)
class Place:
    """Where an experiment runs: folders, limits and threads."""

    store: Store
    features: Path
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
    """Train and measure a classifier on features of a frozen backbone.

    Args:
        recipe: what to do, every default filled in.
        version_manifest: the data set version, in the store.
        labels: class names in the order of the outputs.
        weights: the backbone's weights, in the store.
        place: where to work.
        registry: backbones known so far.
        report: told of progress, epochs and folds.
    """
    clock = _Progress(report)
    rows = manifest.load(place.store.read(version_manifest))
    task = Task(recipe.task.value)
    truth = np.array([labels.index(row.labels[0]) for row in rows], dtype=np.intp)
    belongs = manifest.group_rows(rows)
    groups = np.array(belongs, dtype=np.intp)
    split = manifest.splits_of(rows, belongs)
    trained_on = _rows_in(split, Split.TRAIN)
    watched = _rows_in(split, Split.VALIDATION)
    held_out = _rows_in(split, Split.TEST)

    k, repeats = recipe.folds.k or 0, recipe.folds.repeats
    folds = make_folds(
        trained_on,
        truth,
        groups,
        watched,
        k=k,
        repeats=repeats,
        validation_fraction=recipe.folds.validation_fraction if recipe.early_stopping else 0.0,
        seed=recipe.seed,
    )

    clock.enter("backbone")
    backbone, width = _backbone(recipe, weights, place, registry)
    engine = OpenVinoEngine(place.store.verified_path(backbone), recipe.precision, place.threads)

    clock.enter("features")
    space = FeatureSpace(IMAGE_RULE, _size(recipe), recipe.resize, backbone, recipe.precision)
    cache = FeatureCache(place.features, space, width)
    started = time.perf_counter()
    extraction = extract(
        [row.sha256 for row in rows],
        engine,
        cache,
        place.store,
        size=_size(recipe),
        resize=recipe.resize,
        limits=place.image_limits,
        threads=place.threads,
        report=clock.images,
    )
    extraction_s = time.perf_counter() - started
    cache.close()
    features = cache.rows([row.sha256 for row in rows])

    clock.enter("folds")
    out_of_fold = np.full((repeats, len(rows), _outputs(task, labels)), np.nan, dtype=np.float32)
    fold_of = np.full((repeats, len(rows)), -1, dtype=np.int16)
    results = []
    for fold in folds:
        fitted = _fit_fold(recipe, task, labels, features, truth, fold, len(folds), clock, report)
        logits = heads.logits(fitted.layers, features[fold.test])
        out_of_fold[fold.repeat, fold.test] = logits
        fold_of[fold.repeat, fold.test] = fold.number
        results.append(_fold_result(task, labels, fold, fitted, truth, logits))
        report.fold(results[-1])
        clock.fold_done(len(folds))

    metrics = evaluate.pooled(
        task,
        labels,
        truth[trained_on],
        groups[trained_on],
        out_of_fold[:, trained_on],
        [result.metrics["accuracy"] for result in results],
    )

    clock.enter("final")
    final = fit(
        recipe,
        task,
        _outputs(task, labels),
        features,
        truth,
        np.union1d(trained_on, watched),
        np.array([], dtype=np.intp),
        epochs=median_epoch([result.best_epoch for result in results]),
        seed=_seed(recipe, len(folds)),
        on_epoch=lambda number, epoch: report.epoch(None, number, epoch),
    )
    if len(held_out):
        metrics["test"] = evaluate.score(
            task, labels, truth[held_out], heads.logits(final.layers, features[held_out])
        ) | {"images": len(held_out)}
        metrics["test"]["accuracy_ci95"] = list(evaluate.wilson(metrics["test"]["accuracy"], len(held_out)))

    clock.enter("bundle")
    bundle = _bundle(recipe, task, labels, backbone, engine, final)
    description = describe.Description(recipe, task, labels, rows, metrics, results, final, extraction)
    return Outcome(
        bundle=place.store.put(bundle.dump()),
        backbone=backbone,
        metrics=metrics,
        extraction={**asdict(extraction), "seconds": round(extraction_s, 3)},
        files={
            "out-of-fold.safetensors": (_out_of_fold(fold_of, out_of_fold), "application/octet-stream"),
            "report.md": (describe.report(description).encode(), "text/markdown"),
            "confusion.png": (describe.confusion(description), "image/png"),
            "curves.png": (describe.curves(description), "image/png"),
        },
    )


def _backbone(recipe: Recipe, weights: Digest, place: Place, registry: Registry) -> tuple[Digest, int]:
    """Return the digest of the exported backbone and the width of its features, exporting it if nobody has."""
    cut = recipe.features_from or ""
    key = BackboneKey(recipe.backbone, weights, cut, _size(recipe))
    digest = registry.find_backbone(key)
    if digest is None:
        model = backbones.backbone(recipe.backbone, cut, _size(recipe), place.store.read(weights))
        exported = export(model, place.threads)
        facts = {name: value for name, value in asdict(exported).items() if name != "onnx"}
        digest = registry.add_backbone(key, place.store.put(exported.onnx), facts)
    return digest, CATALOGUE[recipe.backbone].cuts[cut]


def _fit_fold(
    recipe: Recipe,
    task: Task,
    labels: Sequence[str],
    features: Features,
    truth: Indices,
    fold: Fold,
    folds: int,
    clock: _Progress,
    report: Reporter,
) -> Fit:
    def on_epoch(number: int, metrics: Epoch) -> None:
        report.epoch(fold.number, number, metrics)
        clock.epoch(fold.number, folds, number, recipe.epochs)

    return fit(
        recipe,
        task,
        _outputs(task, labels),
        features,
        truth,
        fold.train,
        fold.validation,
        epochs=recipe.epochs,
        seed=_seed(recipe, fold.number),
        on_epoch=on_epoch,
    )


def _fold_result(
    task: Task, labels: Sequence[str], fold: Fold, fitted: Fit, truth: Indices, logits: Float32
) -> FoldResult:
    metrics = evaluate.brief(evaluate.score(task, labels, truth[fold.test], logits))
    images = {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)}
    return FoldResult(
        number=fold.number,
        epochs=len(fitted.history),
        best_epoch=fitted.best_epoch,
        stopped=fitted.stopped,
        metrics={**metrics, "images": images},
        history=fitted.history,
    )


def _bundle(
    recipe: Recipe, task: Task, labels: Sequence[str], backbone: Digest, engine: OpenVinoEngine, final: Fit
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
        layers=final.layers,
        golden_input=golden_input,
        golden_output=heads.logits(final.layers, engine.features(golden_input)),
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
    return 1 if task is Task.BINARY else len(labels)


def _size(recipe: Recipe) -> int:
    return recipe.image_size or CATALOGUE[recipe.backbone].size


def _seed(recipe: Recipe, number: int) -> int:
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])


class _Progress:
    """How far the run is, as one fraction, and how long the rest should take by the speed measured so far."""

    # Shares of the whole that were typical; only the bar's evenness depends on them, the ETA is measured.
    _STARTS: ClassVar[dict[str, float]] = {
        "backbone": 0.0,
        "features": 0.1,
        "folds": 0.6,
        "final": 0.95,
        "bundle": 0.98,
    }

    def __init__(self, report: Reporter, now: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._now = now
        self._entered = now()
        self._fold_s: list[float] = []
        self._fold_started = now()

    def enter(self, stage: str) -> None:
        self._entered = self._fold_started = self._now()
        self._report.progress(stage=stage, fraction=self._STARTS[stage])

    def images(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        elapsed = self._now() - self._entered
        eta_s = elapsed * (1 - share) / share if share else None
        self._report.progress(stage="features", fraction=0.1 + 0.5 * share, eta_s=eta_s)

    def epoch(self, fold: int, folds: int, epoch: int, epochs: int) -> None:
        in_fold = min(epoch / epochs, 0.95)
        eta_s = None
        if self._fold_s:
            typical = sum(self._fold_s) / len(self._fold_s)
            eta_s = max(0.0, typical * (folds + 1 - fold) - (self._now() - self._fold_started))
        self._report.progress(
            stage="folds",
            fraction=0.6 + 0.35 * (fold + in_fold) / folds,
            fold=fold + 1,
            folds=folds,
            epoch=epoch,
            epochs=epochs,
            eta_s=eta_s,
        )

    def fold_done(self, folds: int) -> None:
        self._fold_s.append(self._now() - self._fold_started)
        self._fold_started = self._now()
