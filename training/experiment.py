"""One run from images to a bundle; reads like the method section of a paper. Knows no database, queues or HTTP."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from artifacts import tensors
from artifacts.bundle import Logits
from artifacts.neighbours import FeatureNormaliser, build_index
from artifacts.run_files import RunFile
from artifacts.store import Digest
from recipes.filled import DecidedRecipe, UndecidedRecipe
from recipes.recipe import Precision
from training import delivery
from training.bake_off import BakeOffResult
from training.data.split import Fold, Indices
from training.delivery import DeliveredModel
from training.fitting.fold_outcome import FoldOutcome
from training.fitting.head_fit import Scaler
from training.fitting.learners import CHECKED_IMAGES, HeadLearner, LearnedModel, Learner, LearningTask, final_plan
from training.fitting.training_loop import finite
from training.networks.network_files import Registry, Workspace
from training.progress import Extraction, FitListener, FoldResult, ProgressListener
from training.report import run_report
from training.setup import RunData, TrainingRequest, choose_features, seed_of, set_up
from training.statistics import evaluation
from training.statistics.baseline import compare_with_constant_answer


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        bundle: digest of the bundle.
        backbone: digest of the network file.
        metrics: metrics of the run, as JSON.
        training_s: seconds of bake-off, extraction, folds and final fit together.
        files: content and media type of each file that is stored with the run.
    """

    bundle: Digest
    backbone: Digest
    metrics: dict[str, Any]
    training_s: float
    files: dict[RunFile, tuple[bytes, str]] = field(default_factory=dict)


def run(request: TrainingRequest, place: Workspace, registry: Registry, report: ProgressListener) -> Outcome:
    """Train and measure a model: a head on a frozen backbone, the backbone with it, or a network from scratch."""
    experiment = Experiment(request, place, registry, report)
    return experiment.finish(experiment.learn_folds(range(len(experiment.folds))))


class Experiment:
    """A recipe on a data set version. The constructor prepares the inputs that all folds share."""

    def __init__(
        self, request: TrainingRequest, place: Workspace, registry: Registry, report: ProgressListener
    ) -> None:
        self._place, self._report = place, report
        data = self._data = RunData(request, place)
        recipe, weights = request.recipe, request.weights
        self._pick: BakeOffResult | None = None
        if isinstance(recipe, UndecidedRecipe):
            self._pick = choose_features(data, recipe, request, place, registry, report)
            recipe, weights = self._pick.decide(recipe), self._pick.weights
        self._recipe: DecidedRecipe = recipe
        self._setup = set_up(data, recipe, weights, place, registry, report)

    @property
    def folds(self) -> Sequence[Fold]:
        """The folds of every repeat, by number."""
        return self._data.folds

    def learn_fold(self, number: int) -> FoldOutcome:
        """Train without a fold's test images, then evaluate on them."""
        self._report.stage("folds")
        fit = self._report.begin_fit(number, self._setup.learner.plan)
        started = time.perf_counter() - _spent_s(fit)
        learned = self._setup.learner.learn(self._task(number, self._setup.learner), fit)
        return self._end_fold(number, learned, fit, started)

    def learn_folds(self, numbers: Sequence[int]) -> list[FoldOutcome]:
        """Do `learn_fold` for several folds, in parallel if the learner can; they may end in any order.

        Folds in parallel share the time: each moment is divided among the folds that are still training.
        """
        learner = self._setup.learner
        if not isinstance(learner, HeadLearner) or not learner.learns_in_parallel:
            return [self.learn_fold(number) for number in numbers]
        self._report.stage("folds")
        fits = [self._report.begin_fit(number, learner.plan) for number in numbers]
        tasks = [(self._task(number, learner), fit) for number, fit in zip(numbers, fits, strict=True)]
        found: dict[int, FoldOutcome] = {}
        share_s, since = 0.0, time.perf_counter()
        for place, learned in learner.learn_many(tasks):
            now = time.perf_counter()
            share_s, since = share_s + (now - since) / (len(fits) - len(found)), now
            found[place] = self._end_fold(numbers[place], learned, fits[place], now - share_s - _spent_s(fits[place]))
        return [found[place] for place in range(len(fits))]

    def _task(self, number: int, learner: Learner) -> LearningTask:
        """Return the task of a fold."""
        fold = self.folds[number]
        return LearningTask(fold.train, fold.validation, learner.plan, seed_of(self._recipe, number))

    def _end_fold(self, number: int, learned: LearnedModel, fit: FitListener, started: float) -> FoldOutcome:
        """Evaluate on a fold's test images, and report its end."""
        fold = self.folds[number]
        logits = {self._setup.precision: finite(learned.logits(fold.test))}
        if self._setup.exporter is not None:
            epochs = float(len(learned.history))
            logits |= self._setup.exporter.logits(
                learned, fold.train, fold.test, lambda done, total: fit.epochs_done(epochs)
            )
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
        self._report.fold_ended(outcome)
        return outcome

    def finish(self, outcomes: Sequence[FoldOutcome], extraction: Extraction | None = None) -> Outcome:
        """Evaluate over all folds, train the final model on all training images, and write its bundle.

        Args:
            outcomes: the outcomes of all folds, in the order of `folds`.
            extraction: the extraction of the run, if an earlier attempt did it; by default this experiment's own.
        """
        data, setup, place = self._data, self._setup, self._place
        recipe, labels, task, truth = self._recipe, data.labels, data.task, data.truth
        trained_on, held_out = data.trained_on, data.held_out
        extraction = extraction or setup.extraction
        started = time.perf_counter()
        self._report.stage("final")
        plan = final_plan([outcome.phases for outcome in outcomes], [outcome.kept for outcome in outcomes])
        fit = self._report.begin_fit(None, plan)
        started -= _spent_s(fit)
        nothing = np.array([], dtype=np.intp)
        everything = np.union1d(trained_on, data.watched)
        last = LearningTask(everything, nothing, plan, seed_of(recipe, len(self.folds)), is_final=True)
        final = setup.learner.learn(last, fit)
        finite(final.logits(everything[:CHECKED_IMAGES]))  # without validation nothing has checked the last step
        served = self._serve(final, outcomes)
        out_of_fold = data.out_of_fold([outcome.logits[served.precision] for outcome in outcomes])
        results = [self._as_served(outcome, served.precision) for outcome in outcomes]
        metrics = evaluation.evaluate_folds(
            task,
            labels,
            truth[trained_on],
            data.groups[trained_on],
            out_of_fold[:, trained_on],
            [result.metrics for result in results],
        )
        metrics["baseline"] = compare_with_constant_answer(
            task, truth[trained_on], data.groups[trained_on], out_of_fold[:, trained_on], metrics.get("r2", 0.0)
        )
        if len(held_out):
            logits = final.logits(held_out)
            if served.precision is not setup.precision:
                assert setup.pixels is not None
                logits = delivery.logits(served.engine, final.layers, setup.pixels, held_out, self._report.images)
            metrics["test"] = evaluation.evaluate_held_out(task, labels, truth[held_out], data.groups[held_out], logits)
        if served.export is not None:
            metrics["export"] = served.export
        if self._pick is not None:
            metrics["features"] = self._pick.facts(task)
        if served.choice is not None:
            metrics["precision"] = served.choice.facts(task)

        self._report.stage("bundle")
        files: dict[RunFile, tuple[bytes, str]] = {}
        neighbours: Digest | None = None
        if recipe.neighbours:
            kept = self._neighbours(served, everything)
            neighbours = place.store.put(kept)
            files[RunFile.NEIGHBOURS] = kept, "application/octet-stream"
        bundle = delivery.bundle(recipe, task, labels, served, final.layers, neighbours)
        description = run_report.Description(
            recipe,
            task,
            labels,
            len(data.rows),
            truth[trained_on],
            np.nanmean(out_of_fold[:, trained_on], axis=0),
            metrics,
            results,
            plan,
            extraction,
            served.precision,
            served.choice,
            self._pick,
            setup.notes,
        )
        before_s = extraction.seconds + sum(outcome.result.seconds for outcome in outcomes)
        if self._pick is not None:
            before_s += self._pick.seconds
        return Outcome(
            bundle=place.store.put(bundle.dump()),
            backbone=served.backbone,
            metrics=metrics,
            training_s=before_s + time.perf_counter() - started,
            files=files
            | {
                RunFile.OUT_OF_FOLD: (self._out_of_fold_file(out_of_fold), "application/octet-stream"),
                RunFile.REPORT: (run_report.report(description).encode(), "text/markdown"),
                **{name: (picture, "image/png") for name, picture in run_report.pictures(description).items()},
            },
        )

    def _serve(self, final: LearnedModel, outcomes: Sequence[FoldOutcome]) -> DeliveredModel:
        """Return the network that will answer predictions, exported if it was trained."""
        setup = self._setup
        if setup.exporter is None:
            assert setup.trunk is not None
            return DeliveredModel(setup.precision, setup.trunk.backbone, setup.trunk.engine, setup.choice)
        if final.network is not None:
            self._report.stage("export")
        scores = {
            precision: self._data.headline([outcome.logits[precision] for outcome in outcomes])
            for precision in Precision
            if all(precision in outcome.logits for outcome in outcomes)
        }
        data = self._data
        shown = data.held_out if len(data.held_out) else data.trained_on
        return setup.exporter.serve(final, data.trained_on, shown, scores, self._report.images)

    def _neighbours(self, served: DeliveredModel, rows: Indices) -> bytes:
        """Return the index of the rows' images, by their features in the delivered network."""
        trunk, pixels = self._setup.trunk, self._setup.pixels
        if trunk is not None and (served.backbone, served.precision) == (trunk.backbone, trunk.precision):
            features = trunk.features[rows]
        else:
            assert pixels is not None
            features = delivery.features(served.engine, pixels, rows, self._report.images)
        scaler = Scaler.fit(features, np.arange(len(features)))
        directions = FeatureNormaliser(scaler.mean.astype(np.float32), scaler.scale.astype(np.float32))
        return build_index([self._data.rows[row] for row in rows], features, directions).dump()

    def _as_served(self, outcome: FoldOutcome, precision: Precision) -> FoldResult:
        """Return the result of a fold, with the metrics of the delivered precision."""
        measured = outcome.result.metrics.get("precisions", {}).get(precision.value, {})
        return replace(outcome.result, metrics=outcome.result.metrics | measured)

    def _out_of_fold_file(self, logits: Logits) -> bytes:
        """Return a file of each image's fold (int16 [repeats, N], -1 for none) and its logits there (NaN for none).

        Its metadata names the image of each of the N rows by path and SHA-256, and the class of each logit.
        """
        fold_of = np.full(logits.shape[:2], -1, dtype=np.int16)
        for fold in self.folds:
            fold_of[fold.repeat, fold.test] = fold.number
        named = {
            "labels": list(self._data.labels),
            "paths": [row.path for row in self._data.rows],
            "sha256": [row.sha256 for row in self._data.rows],
        }
        return tensors.dump(named, {"folds": fold_of, "logits": logits})

    def _fold_metrics(self, fold: Fold, learned: LearnedModel, logits: Mapping[Precision, Logits]) -> dict[str, Any]:
        scores = {
            precision: evaluation.without_tables(
                evaluation.evaluate(self._data.task, self._data.labels, self._data.truth[fold.test], of_precision)
            )
            for precision, of_precision in logits.items()
        }
        metrics: dict[str, Any] = dict(scores.pop(self._setup.precision))
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


def _spent_s(fit: FitListener) -> float:
    """Return the training time, in seconds, behind the checkpoint that a fit continues from; 0 without one."""
    return fit.checkpoint.seconds if fit.checkpoint else 0.0
