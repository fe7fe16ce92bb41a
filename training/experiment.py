"""One run from images to a bundle, to be read like the method section of a paper. Knows no rows, queues or HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save as save_tensors

from artifacts import manifest
from artifacts.bundle import Float32
from artifacts.catalogue import CATALOGUE
from artifacts.headline import HEADLINES
from artifacts.images import Pixels
from artifacts.layout import Split
from artifacts.neighbours import Directions, keep
from artifacts.recipe import Mode, Precision, PrecisionChoice, Recipe, Task
from artifacts.store import Digest
from errors import TrainingDiverged
from inference import heads
from inference.engine import OpenVinoEngine
from training import deliver, describe, evaluate
from training.arrays import Report, drop_unused, load_maps, load_pixels
from training.augment import contact_sheet
from training.checkpoint import Keeper, NoKeeper
from training.deliver import Served, Tuned, spread
from training.epochs import Epoch
from training.extract import Extraction, add_up
from training.finetune import Material
from training.fit import Scaler
from training.learn import Frozen, Learned, Learner, Lesson, Listener, Tuning, final_plan
from training.outcome import FoldOutcome, FoldResult
from training.pixels import Decoder, Loaded, Source
from training.precision import Choice, Tried, candidates, choose, image_ms
from training.prepare import Networks, Place, Registry, Trunk, size_of
from training.split import Fold, Indices, make_folds
from training.targets import targets_of


class Reporter(Protocol):
    """Who is told how far the experiment is, and keeps what it can go on from."""

    def stage(self, name: str) -> None:
        """Tell that a stage begins."""
        ...

    def images(self, done: int, total: int) -> None:
        """Tell how many of its images, or epochs, the present stage has seen to."""
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
    return experiment.finish(experiment.learn_folds(range(len(experiment.folds))))


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
        rows = self._rows = manifest.load(place.store.read(order.manifest))
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
        decoder = Decoder(place.store, size_of(recipe), recipe.resize, place.image_limits, place.threads)
        source: Source = decoder
        if recipe.mode is Mode.FINE_TUNING:
            report.stage("pixels")
            drop_unused(place.pixels, place.pixels_bytes)
            self._pixels = load_pixels(digests, decoder, place.pixels, report.images)
            source = Loaded(digests, self._pixels)

        report.stage("backbone")
        self._networks = Networks(recipe, order.weights, place, registry)
        self._choice: Choice | None = None
        self._tuned: Tuned | None = None
        if recipe.precision is not PrecisionChoice.AUTO:
            OpenVinoEngine.check(Precision(recipe.precision.value))
        considered = candidates(recipe.precision, OpenVinoEngine.precisions())
        is_frozen = recipe.mode is Mode.FEATURE_EXTRACTION
        self._trunk = self._frozen_network(considered if is_frozen else [Precision.FLOAT32], digests, source, registry)
        report.extracted(self._trunk.extraction)

        frozen = Frozen(recipe, self._task, self._outputs, self._trunk.features, self._truth)
        self._learner: Learner = frozen
        if recipe.mode is Mode.FINE_TUNING:
            if recipe.augmentation is not None:
                shown = contact_sheet(recipe.augmentation, self._pixels[spread(self._count, _SHOWN)], recipe.seed)
                report.file("augmentations.png", shown, "image/png")
            report.stage("activations")
            material = _material(recipe, digests, self._pixels, self._networks, place, report)
            self._learner = Tuning(recipe, self._task, frozen, place.store.read(order.weights), material, self._truth)
            self._tuned = Tuned(
                recipe,
                self._task,
                considered,
                digests,
                self._pixels,
                self._networks,
                place,
                self._trunk,
            )

    def learn_fold(self, number: int) -> FoldOutcome:
        """Learn without a fold's test images, then measure on them."""
        self._report.stage("folds")
        started = time.perf_counter()
        part = self._report.part(number, self._learner.plan.epochs)
        learned = self._learner.learn(self._lesson(number, self._learner), part, part)
        return self._end_fold(number, learned, part, started)

    def learn_folds(self, numbers: Sequence[int]) -> list[FoldOutcome]:
        """Do what `learn_fold` does with several folds, side by side if the learner can; they end in any order.

        A fold's seconds are then its share of the time: each moment is divided among the folds that still learn.
        """
        learner = self._learner
        if not isinstance(learner, Frozen) or not learner.learns_abreast:
            return [self.learn_fold(number) for number in numbers]
        self._report.stage("folds")
        parts = [self._report.part(number, learner.plan.epochs) for number in numbers]
        lessons = [(self._lesson(number, learner), part, part) for number, part in zip(numbers, parts, strict=True)]
        found: dict[int, FoldOutcome] = {}
        share_s, since = 0.0, time.perf_counter()
        for place, learned in learner.learn_many(lessons):
            now = time.perf_counter()
            share_s, since = share_s + (now - since) / (len(parts) - len(found)), now
            found[place] = self._end_fold(numbers[place], learned, parts[place], now - share_s)
        return [found[place] for place in range(len(parts))]

    def _lesson(self, number: int, learner: Learner) -> Lesson:
        """Return what is to be learned in a fold."""
        fold = self.folds[number]
        return Lesson(fold.train, fold.validation, learner.plan, _seed(self._order.recipe, number))

    def _end_fold(self, number: int, learned: Learned, part: Part, started: float) -> FoldOutcome:
        """Measure on a fold's test images, and tell that it ended."""
        fold = self.folds[number]
        logits = {self._trunk.precision: _finite(learned.logits(fold.test))}
        if self._tuned is not None:
            epochs = float(len(learned.history))
            logits |= self._tuned.logits(learned, fold.train, fold.test, lambda done, total: part.batch(epochs))
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
        extraction = extraction or self._trunk.extraction
        started = time.perf_counter()
        self._report.stage("final")
        plan = final_plan([outcome.phases for outcome in outcomes], [outcome.kept for outcome in outcomes])
        part = self._report.part(None, plan.epochs)
        nothing = np.array([], dtype=np.intp)
        everything = np.union1d(trained_on, self._watched)
        final = self._learner.learn(Lesson(everything, nothing, plan, _seed(recipe, len(self.folds))), part, part)
        served = self._serve(final, outcomes)
        out_of_fold = self._out_of_fold([outcome.logits[served.precision] for outcome in outcomes])
        results = [self._as_served(outcome, served.precision) for outcome in outcomes]
        metrics = evaluate.pooled(
            task,
            labels,
            truth[trained_on],
            self._groups[trained_on],
            out_of_fold[:, trained_on],
            [result.metrics for result in results],
        )
        if len(held_out):
            logits = final.logits(held_out)
            if served.precision is not self._trunk.precision:
                logits = heads.logits(
                    final.layers, deliver.features(served.engine, self._pixels, held_out, self._report.images)
                )
            metrics["test"] = evaluate.held_out(task, labels, truth[held_out], self._groups[held_out], logits)
        if served.export is not None:
            metrics["export"] = served.export
        if served.choice is not None:
            metrics["precision"] = served.choice.facts(task)

        self._report.stage("bundle")
        files: dict[str, tuple[bytes, str]] = {}
        neighbours: Digest | None = None
        if recipe.neighbours:
            kept = self._neighbours(served, everything)
            neighbours = place.store.put(kept)
            files["neighbours.safetensors"] = kept, "application/octet-stream"
        bundle = deliver.bundle(recipe, task, labels, served, final.layers, neighbours)
        description = describe.Description(
            recipe,
            task,
            labels,
            self._count,
            truth[trained_on],
            np.nanmean(out_of_fold[:, trained_on], axis=0),
            metrics,
            results,
            plan,
            extraction,
            served.precision,
            served.choice,
        )
        folds_s = sum(outcome.result.seconds for outcome in outcomes)
        return Outcome(
            bundle=place.store.put(bundle.dump()),
            backbone=served.backbone,
            metrics=metrics,
            training_s=extraction.seconds + folds_s + time.perf_counter() - started,
            files=files
            | {
                "out-of-fold.safetensors": (self._out_of_fold_file(out_of_fold), "application/octet-stream"),
                "report.md": (describe.report(description).encode(), "text/markdown"),
                **{name: (picture, "image/png") for name, picture in describe.pictures(description).items()},
            },
        )

    def _frozen_network(
        self, precisions: Sequence[Precision], digests: Sequence[Digest], source: Source, registry: Registry
    ) -> Trunk:
        """Return the frozen network in the precision that heads are trained in, with the features of every image.

        Of several precisions it is the one that is chosen; a run that was interrupted keeps to its choice.
        """
        recipe, report, networks = self._order.recipe, self._report, self._networks
        known = registry.find_choice() if len(precisions) > 1 else None
        if known is not None:
            self._choice = Choice.of(known)
            precisions = [self._choice.precision]
        exported = networks.exported(recipe.features_from or "")
        started = time.perf_counter()
        files = dict.fromkeys(precisions, exported)
        if Precision.INT8 in files:
            images = [digests[row] for row in self._trained_on]
            files[Precision.INT8] = networks.quantised(
                exported, images, source, report.images, begin=lambda: report.stage("quantise")
            )
        report.stage("features")
        trunks = []
        for number, (precision, network) in enumerate(files.items()):
            told = _one_of(number, len(files), report)
            trunks.append(networks.trunk(network, precision, digests, source, told))
        extraction = add_up([trunk.extraction for trunk in trunks])
        if len(trunks) > 1:
            report.extracted(extraction)  # the trials that follow may be interrupted
            report.stage("precision")
            engines = {trunk.precision: trunk.engine for trunk in trunks}
            times = image_ms(engines, deliver.golden_images(size_of(recipe)), lambda: report.images(0, 1))
            tried = [
                Tried(trunk.precision, self._score(trunk, _one_of(number, len(trunks), report)), times[trunk.precision])
                for number, trunk in enumerate(trunks)
            ]
            self._choice = choose(self._task, tried)
            registry.set_choice(self._choice.facts(self._task))
        chosen = self._choice.precision if self._choice else precisions[0]
        (trunk,) = (trunk for trunk in trunks if trunk.precision is chosen)
        return replace(trunk, extraction=replace(extraction, seconds=round(time.perf_counter() - started, 3)))

    def _score(self, trunk: Trunk, report: Report) -> float:
        """Return the headline score of heads on a frozen network, out of fold."""
        learner = Frozen(self._order.recipe, self._task, self._outputs, trunk.features, self._truth)
        trials = _Trials(learner.plan.epochs, len(self.folds), report)
        lessons = [(self._lesson(fold.number, learner), trials.of(fold.number), NoKeeper()) for fold in self.folds]
        learned = dict(learner.learn_many(lessons))
        return self._headline([_finite(learned[fold.number].logits(fold.test)) for fold in self.folds])

    def _headline(self, logits: Sequence[Float32]) -> float:
        """Return the task's headline score of the logits of every fold."""
        of_images = evaluate.mean_statistics(
            self._task, self._truth[self._trained_on], self._out_of_fold(logits)[:, self._trained_on]
        )
        return float(evaluate.scores(self._task, of_images.sum(axis=0))[HEADLINES[self._task].metric])

    def _serve(self, final: Learned, outcomes: Sequence[FoldOutcome]) -> Served:
        """Return what answers."""
        trunk = self._trunk
        if self._tuned is None:
            return Served(trunk.precision, trunk.backbone, trunk.engine, self._choice)
        if final.network is not None:
            self._report.stage("export")
        scores = {
            precision: self._headline([outcome.logits[precision] for outcome in outcomes])
            for precision in Precision
            if all(precision in outcome.logits for outcome in outcomes)
        }
        return self._tuned.serve(final, self._trained_on, scores, self._report.images)

    def _neighbours(self, served: Served, rows: Indices) -> bytes:
        """Return the file of the rows' images as the network that is served sees them."""
        if (served.backbone, served.precision) == (self._trunk.backbone, self._trunk.precision):
            features = self._trunk.features[rows]
        else:
            features = deliver.features(served.engine, self._pixels, rows, self._report.images)
        scaler = Scaler.of(features, np.arange(len(features)))
        directions = Directions(scaler.mean.astype(np.float32), scaler.scale.astype(np.float32))
        return keep([self._rows[row] for row in rows], features, directions).dump()

    def _as_served(self, outcome: FoldOutcome, precision: Precision) -> FoldResult:
        """Return what a fold measured, in the precision that is served."""
        measured = outcome.result.metrics.get("precisions", {}).get(precision.value, {})
        return replace(outcome.result, metrics=outcome.result.metrics | measured)

    def _out_of_fold(self, logits: Sequence[Float32]) -> Float32:
        """Return the logits of every fold as float32 [repeats, N, outputs], NaN for images that were in none."""
        found = np.full((self._order.recipe.folds.repeats, self._count, self._outputs), np.nan, dtype=np.float32)
        for fold, of_fold in zip(self.folds, logits, strict=True):
            found[fold.repeat, fold.test] = of_fold
        return found

    def _out_of_fold_file(self, logits: Float32) -> bytes:
        """Return the fold of every image (int16 [repeats, N], -1 where it was in none) and its logits there (NaN)."""
        fold_of = np.full(logits.shape[:2], -1, dtype=np.int16)
        for fold in self.folds:
            fold_of[fold.repeat, fold.test] = fold.number
        return save_tensors({"folds": fold_of, "logits": logits})

    @property
    def _outputs(self) -> int:
        return 1 if self._task in (Task.BINARY, Task.REGRESSION) else len(self._order.labels)

    def _fold_metrics(self, fold: Fold, learned: Learned, logits: Mapping[Precision, Float32]) -> dict[str, Any]:
        scores = {
            precision: evaluate.brief(
                evaluate.score(self._task, self._order.labels, self._truth[fold.test], of_precision)
            )
            for precision, of_precision in logits.items()
        }
        metrics: dict[str, Any] = dict(scores.pop(self._trunk.precision))
        if scores:
            metrics["precisions"] = {precision.value: found for precision, found in scores.items()}
        metrics["images"] = {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)}
        if len(learned.phases) > 1:
            metrics["phases"] = [asdict(phase) for phase in learned.phases]
            metrics["kept"] = learned.kept
        best = learned.history[learned.best_epoch - 1]
        if "val_loss" in best:
            metrics["gap"] = best["val_loss"] - best["loss"]
        return metrics


# Images on the sheet of augmentations.
_SHOWN = 8


def _one_of(number: int, count: int, report: Reporter) -> Report:
    """Return who is told of one of several passes of the same length, and tells how far all of them are."""
    return lambda done, total: report.images(number * total + done, count * total)


class _Trials:
    """Says how far many fits are together, whether they go on side by side or one after the other."""

    def __init__(self, epochs: int, count: int, report: Report) -> None:
        self._done = [0] * count
        self._total = epochs * count
        self._report = report

    def of(self, number: int) -> _Trial:
        """Return who hears of one of them."""
        return _Trial(partial(self._hear, number))

    def _hear(self, number: int, epochs: float) -> None:
        self._done[number] = int(epochs)
        self._report(sum(self._done), self._total)


@dataclass(frozen=True)
class _Trial:
    """Hears of one fit how many epochs are done."""

    batch: Callable[[float], None]

    def epoch(self, number: int, metrics: Epoch) -> None:
        """Hear of a finished epoch."""


def _material(
    recipe: Recipe,
    digests: Sequence[Digest],
    pixels: Pixels,
    networks: Networks,
    place: Place,
    report: Reporter,
) -> Material:
    """Return what the learning part reads: without augmentation, the frozen part is gone through only once."""
    boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze or "")
    if boundary is None or recipe.augmentation is not None:
        return Material(pixels, are_maps=False)
    frozen = networks.exported(boundary)
    engine = networks.engine(frozen, Precision.FLOAT32)
    space = networks.space(frozen, Precision.FLOAT32)
    return Material(load_maps(digests, pixels, engine, space, place.pixels, report.images), are_maps=True)


def _finite(logits: Float32) -> Float32:
    """Return logits that are numbers all. Raises TrainingDiverged."""
    if not np.isfinite(logits).all():
        raise TrainingDiverged("What was learned answers with infinite numbers. Lower optimizer.learning_rate.")
    return logits


def _rows_in(splits: Sequence[Split], wanted: Split) -> Indices:
    return np.flatnonzero(np.array([split is wanted for split in splits], dtype=bool))


def _seed(recipe: Recipe, number: int) -> int:
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])
