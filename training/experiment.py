"""One run from images to a bundle: features, folds, final model, report. Knows no database, queues or HTTP."""

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
        metrics: metrics of the run, as JSON values.
        training_s: seconds that bake-off, extraction, folds and final fit took together.
        files: content and media type of each file that is stored with the run.
    """

    bundle: Digest
    backbone: Digest
    metrics: dict[str, Any]
    training_s: float
    files: dict[RunFile, tuple[bytes, str]] = field(default_factory=dict)


def run(request: TrainingRequest, workspace: Workspace, registry: Registry, report: ProgressListener) -> Outcome:
    """Train and evaluate a model in one process: set up the run, train every fold, then train the final model."""
    experiment = Experiment(request, workspace, registry, report)
    return experiment.finish(experiment.learn_folds(range(len(experiment.folds))))


class Experiment:
    """One run of a recipe on a data set version. The constructor prepares the inputs that all folds share."""

    def __init__(
        self, request: TrainingRequest, workspace: Workspace, registry: Registry, report: ProgressListener
    ) -> None:
        self._workspace, self._report = workspace, report
        data = self._data = RunData(request, workspace)
        recipe, weights = request.recipe, request.weights
        self._pick: BakeOffResult | None = None
        if isinstance(recipe, UndecidedRecipe):
            self._pick = choose_features(data, recipe, request, workspace, registry, report)
            recipe, weights = self._pick.decide(recipe), self._pick.weights
        self._recipe: DecidedRecipe = recipe
        self._setup = set_up(data, recipe, weights, workspace, registry, report)

    @property
    def folds(self) -> Sequence[Fold]:
        """The folds of every repeat, by number."""
        return self._data.folds

    def learn_fold(self, number: int) -> FoldOutcome:
        """Train a model on a fold's training images, then evaluate it on the fold's test images."""
        self._report.stage("folds")
        fit = self._report.begin_fit(number, self._setup.learner.plan)
        started = time.perf_counter() - _spent_s(fit)
        learned = self._setup.learner.learn(self._task(number, self._setup.learner), fit)
        return self._end_fold(number, learned, fit, started)

    def learn_folds(self, numbers: Sequence[int]) -> list[FoldOutcome]:
        """Train and evaluate several folds, in parallel if the learner can; return their outcomes in order.

        Folds that train in parallel share the time: each second is divided equally among the folds still in training.
        """
        learner = self._setup.learner
        if not isinstance(learner, HeadLearner) or not learner.learns_in_parallel:
            return [self.learn_fold(number) for number in numbers]
        self._report.stage("folds")
        fits = [self._report.begin_fit(number, learner.plan) for number in numbers]
        tasks = [(self._task(number, learner), fit) for number, fit in zip(numbers, fits, strict=True)]
        found: dict[int, FoldOutcome] = {}
        share_s, since = 0.0, time.perf_counter()
        for index, learned in learner.learn_many(tasks):
            now = time.perf_counter()
            share_s, since = share_s + (now - since) / (len(fits) - len(found)), now
            found[index] = self._end_fold(numbers[index], learned, fits[index], now - share_s - _spent_s(fits[index]))
        return [found[index] for index in range(len(fits))]

    def _task(self, number: int, learner: Learner) -> LearningTask:
        """Return what the learner shall fit for a fold: its rows, plan and seed."""
        fold = self.folds[number]
        return LearningTask(fold.train, fold.validation, learner.plan, seed_of(self._recipe, number))

    def _end_fold(self, number: int, learned: LearnedModel, fit: FitListener, started: float) -> FoldOutcome:
        """Evaluate a trained model on a fold's test images, report the outcome, and return it."""
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
            extraction: the extraction that the report shall show, if another job of the run did it; by default the
                one that this constructor did.
        """
        data, setup, store = self._data, self._setup, self._workspace.store
        recipe, labels, task, truth = self._recipe, data.labels, data.task, data.truth
        trained_on, held_out = data.trained_on, data.held_out
        extraction = extraction or setup.extraction
        started = time.perf_counter()
        self._report.stage("final")
        plan = final_plan([outcome.phases for outcome in outcomes], [outcome.kept for outcome in outcomes])
        fit = self._report.begin_fit(None, plan)
        started -= _spent_s(fit)
        nothing = np.array([], dtype=np.intp)
        everything = np.union1d(trained_on, data.validation)
        last = LearningTask(everything, nothing, plan, seed_of(recipe, len(self.folds)), is_final=True)
        final = setup.learner.learn(last, fit)
        # The final fit has no validation rows, so that no loss was computed after the last step.
        finite(final.logits(everything[:CHECKED_IMAGES]))
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
            neighbours = store.put(kept)
            files[RunFile.NEIGHBOURS] = kept, "application/octet-stream"
        bit_depth = self._workspace.bit_depth
        bundle = delivery.bundle(recipe, task, labels, served, final.layers, neighbours, bit_depth)
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
            bundle=store.put(bundle.dump()),
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
        """Return the network to serve. A trained network is exported; a frozen one is already in the store."""
        setup = self._setup
        if setup.exporter is None:
            assert setup.frozen_backbone is not None
            return DeliveredModel(
                setup.precision, setup.frozen_backbone.backbone, setup.frozen_backbone.engine, setup.choice
            )
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
        """Return the neighbour index as a file: the features of the rows' images in the delivered network."""
        frozen_backbone, pixels = self._setup.frozen_backbone, self._setup.pixels
        if frozen_backbone is not None and (served.backbone, served.precision) == (
            frozen_backbone.backbone,
            frozen_backbone.precision,
        ):
            features = frozen_backbone.features[rows]
        else:
            assert pixels is not None
            features = delivery.features(served.engine, pixels, rows, self._report.images)
        scaler = Scaler.fit(features, np.arange(len(features)))
        directions = FeatureNormaliser(scaler.mean.astype(np.float32), scaler.scale.astype(np.float32))
        return build_index([self._data.rows[row] for row in rows], features, directions).dump()

    def _as_served(self, outcome: FoldOutcome, precision: Precision) -> FoldResult:
        """Return a fold's result with the metrics that were measured in the precision that is served."""
        measured = outcome.result.metrics.get("precisions", {}).get(precision.value, {})
        return replace(outcome.result, metrics=outcome.result.metrics | measured)

    def _out_of_fold_file(self, logits: Logits) -> bytes:
        """Return the safetensors file with the test logits of all folds.

        `folds` is int16 [repeats, N], the fold that tested each image, -1 for none. `logits` is [repeats, N, outputs],
        NaN where no fold tested the image.

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
    """Return the seconds of training before the checkpoint that a fit continues from; 0 without a checkpoint."""
    return fit.checkpoint.seconds if fit.checkpoint else 0.0
