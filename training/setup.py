"""Prepares a run: reads its data set, makes its folds, and computes the inputs that all folds share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from artifacts import manifest
from artifacts.bundle import Logits
from artifacts.images import Pixels
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.run_files import RunFile
from artifacts.store import Digest
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.filled import (
    DecidedRecipe,
    FeatureExtractionRecipe,
    FilledRecipe,
    FineTuningRecipe,
    FromScratchRecipe,
    UndecidedRecipe,
)
from recipes.recipe import Precision, Task
from training import bake_off
from training.bake_off import BakeOffResult
from training.data.arrays import ReportProgress, drop_unused, load_maps, load_pixels, maps_bytes
from training.data.augmentation import contact_sheet
from training.data.extraction import sum_extractions
from training.data.pixels import LoadedPixels, PixelSource
from training.data.split import Indices, make_folds
from training.data.targets import make_targets
from training.delivery import TrainedNetworkExporter, golden_images, spread
from training.fitting.fine_tuning import FineTuningData
from training.fitting.fit_task import FitData
from training.fitting.learners import FineTuningLearner, FromScratchLearner, HeadLearner, Learner, LearningTask
from training.fitting.training_loop import finite
from training.fitting.trials import Trials
from training.networks import backbones, scratch_networks
from training.networks.network_files import (
    FrozenBackbone,
    NetworkFiles,
    Registry,
    Workspace,
)
from training.networks.precision import (
    PrecisionDecision,
    PrecisionScore,
    candidate_precisions,
    choose_precision,
    measure_image_ms,
)
from training.progress import Extraction, StageListener
from training.statistics import evaluation


@dataclass(frozen=True)
class TrainingRequest:
    """What a run shall train.

    Attributes:
        recipe: the recipe, with every default filled in.
        manifest: digest of the manifest of the data set version.
        labels: class names in the order of the outputs.
        weights: digest of the backbone's weights; None for a network from scratch, and if a bake-off will choose the
            backbone.
        candidates: digest of the weights of each backbone that a bake-off may choose; empty if the recipe names one.
    """

    recipe: FilledRecipe
    manifest: Digest
    labels: Sequence[str]
    weights: Digest | None
    candidates: Mapping[BackboneName, Digest] = field(default_factory=dict)


class RunData:
    """The images of a data set version as a run uses them: their targets, groups, splits and folds.

    Attributes:
        repeats: how many times cross-validation is repeated.
        labels: class names in the order of the outputs.
        rows: the rows of the manifest, one per image, N of them.
        task: what the model predicts.
        targets: the targets of all rows, and what the folds must balance.
        truth: the true answer of each row, as `training.data.targets` describes it.
        groups: int [N], the group of each row.
        trained_on: rows of the training split, which the folds divide.
        validation: rows of the validation split; empty if the data set has none.
        held_out: rows of the test split; empty if the data set has none.
        folds: the folds of all repeats, by number.
    """

    def __init__(self, request: TrainingRequest, workspace: Workspace) -> None:
        recipe = request.recipe
        self.repeats = recipe.folds.repeats
        self.labels = request.labels
        self.rows: Sequence[Row] = manifest.load(workspace.store.read(request.manifest))
        self.task = recipe.task
        targets = self.targets = make_targets(self.task, request.labels, self.rows)
        self.truth = targets.truth
        belongs = manifest.group_rows(self.rows)
        self.groups = np.array(belongs, dtype=np.intp)
        split = manifest.splits_of(self.rows, belongs)
        self.trained_on = _rows_in(split, Split.TRAIN)
        self.validation = _rows_in(split, Split.VALIDATION)
        self.held_out = _rows_in(split, Split.TEST)
        self.folds = make_folds(
            self.trained_on,
            targets.strata,
            targets.needed,
            self.groups,
            self.validation,
            k=recipe.folds.k,
            repeats=recipe.folds.repeats,
            validation_fraction=recipe.validation_fraction,
            seed=recipe.seed,
        )

    @cached_property
    def digests(self) -> list[Digest]:
        """The digest of each row's image."""
        return [row.sha256 for row in self.rows]

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return 1 if self.task in (Task.BINARY, Task.REGRESSION) else len(self.labels)

    def out_of_fold(self, logits: Sequence[Logits]) -> Logits:
        """Merge the test logits of all folds into one array.

        Args:
            logits: for each fold in order, [test images, outputs], float32 or float64.

        Returns:
            [repeats, N, outputs] of the same dtype; NaN for images that no fold tested.
        """
        found = np.full((self.repeats, len(self.rows), self.outputs), np.nan, dtype=logits[0].dtype)
        for fold, of_fold in zip(self.folds, logits, strict=True):
            found[fold.repeat, fold.test] = of_fold
        return found

    def headline(self, logits: Sequence[Logits]) -> float:
        """Return the headline score of the test logits of all folds together; `logits` as in `out_of_fold`."""
        rows = self.trained_on
        return evaluation.headline_score(self.task, self.truth[rows], self.out_of_fold(logits)[:, rows])


@dataclass(frozen=True)
class TrainingSetup:
    """The learner of a run, and the inputs that all its folds share.

    Attributes:
        learner: trains each fold and the final model.
        precision: the precision of the network during training.
        extraction: how many features were computed before the folds, and how long this took.
        frozen_backbone: the frozen network with the features of all images; None for a network from scratch.
        pixels: uint8 [N, H, W, 3]; None in feature extraction, where training reads only features.
        exporter: exports trained networks; None in feature extraction, where no network is trained.
        choice: the scores and times of the compared precisions; None if only one precision was possible.
        notes: sentences for the report.
    """

    learner: Learner
    precision: Precision
    extraction: Extraction
    frozen_backbone: FrozenBackbone | None = None
    pixels: Pixels | None = None
    exporter: TrainedNetworkExporter | None = None
    choice: PrecisionDecision | None = None
    notes: Sequence[str] = ()


def choose_features(
    data: RunData,
    recipe: UndecidedRecipe,
    request: TrainingRequest,
    workspace: Workspace,
    registry: Registry,
    listener: StageListener,
) -> BakeOffResult:
    """Choose the backbone and cut point that a recipe left open, by a bake-off.

    If this run was interrupted after its bake-off, the earlier result is used again.
    """
    known = registry.find_bake_off_result()
    if known is not None:
        return BakeOffResult.of(known)
    listener.stage("bake-off")
    candidates = request.candidates
    if request.weights is not None and isinstance(recipe.backbone, BackboneName):
        candidates = {recipe.backbone: request.weights}
    found = bake_off.bake_off(
        recipe,
        data.task,
        data.outputs,
        data.targets,
        data.groups,
        data.trained_on,
        data.digests,
        candidates,
        workspace,
        listener.images,
    )
    registry.set_bake_off_result(found.facts(data.task))
    return found


def set_up(
    data: RunData,
    recipe: DecidedRecipe,
    weights: Digest | None,
    workspace: Workspace,
    registry: Registry,
    listener: StageListener,
) -> TrainingSetup:
    """Prepare the learner of a run and the inputs that all its folds share.

    Raises:
        PrecisionUnsupported: the processor of this machine lacks the precision that the recipe asks for.
    """
    if isinstance(recipe.precision, Precision):
        OpenVinoEngine.check(recipe.precision)
    if isinstance(recipe, FromScratchRecipe):
        return _set_up_from_scratch(data, recipe, workspace, listener)
    assert weights is not None, "A recipe with a backbone has weights. This is a bug."
    setup = _BackboneSetup(data, recipe, weights, workspace, registry, listener)
    if isinstance(recipe, FineTuningRecipe):
        return setup.set_up_fine_tuning(recipe)
    return setup.set_up_frozen()


def _set_up_from_scratch(
    data: RunData, recipe: FromScratchRecipe, workspace: Workspace, listener: StageListener
) -> TrainingSetup:
    """Decode the images, and return the setup of a run that trains a network from scratch."""
    started = time.perf_counter()
    pixels = _pixels(data, recipe, workspace, listener)
    considered = candidate_precisions(recipe.precision, OpenVinoEngine.precisions())
    extraction = Extraction(len(set(data.digests)), 0, 0, round(time.perf_counter() - started, 3))
    listener.extracted(extraction)

    def rebuild(weights: bytes) -> Any:
        return scratch_networks.build_feature_network(recipe.network, recipe.image_size, weights)

    return TrainingSetup(
        FromScratchLearner(recipe, FitData(data.task, data.outputs, pixels, data.truth)),
        Precision.FLOAT32,
        extraction,
        pixels=pixels,
        exporter=TrainedNetworkExporter(recipe, data.task, considered, pixels, workspace, rebuild, frozen=None),
    )


class _BackboneSetup:
    """Prepares a run on a backbone: exports the backbone, quantises it if the run may use int8, extracts features."""

    def __init__(
        self,
        data: RunData,
        recipe: FeatureExtractionRecipe | FineTuningRecipe,
        weights: Digest,
        workspace: Workspace,
        registry: Registry,
        listener: StageListener,
    ) -> None:
        self._recipe = recipe
        self._data, self._workspace, self._registry, self._listener = data, workspace, registry, listener
        self._weights = weights
        self._networks = NetworkFiles(recipe, weights, workspace, registry)
        self._considered = candidate_precisions(recipe.precision, OpenVinoEngine.precisions())

    def set_up_frozen(self) -> TrainingSetup:
        """Return the setup of a run that trains heads on a frozen backbone."""
        recipe, workspace = self._recipe, self._workspace
        source = workspace.decoder(recipe.image_size, recipe.resize)
        self._listener.stage("backbone")
        frozen_backbone, choice = self._choose_frozen_backbone(self._considered, source)
        return TrainingSetup(
            self._heads(frozen_backbone),
            frozen_backbone.precision,
            frozen_backbone.extraction,
            frozen_backbone,
            choice=choice,
        )

    def set_up_fine_tuning(self, recipe: FineTuningRecipe) -> TrainingSetup:
        """Return the setup of a run that fine-tunes the backbone together with its head."""
        data, workspace, listener = self._data, self._workspace, self._listener
        started = time.perf_counter()
        pixels = _pixels(data, recipe, workspace, listener)
        source = LoadedPixels(data.digests, pixels)
        listener.stage("backbone")
        frozen_backbone, _ = self._choose_frozen_backbone([Precision.FLOAT32], source)
        fine_tuning_data, notes = self._fine_tuning_data(recipe, pixels)
        extraction = replace(frozen_backbone.extraction, seconds=round(time.perf_counter() - started, 3))
        listener.extracted(extraction)
        head = self._heads(frozen_backbone)
        learner = FineTuningLearner(recipe, head, workspace.store.read(self._weights), fine_tuning_data)

        def rebuild(weights: bytes) -> Any:
            return backbones.build_backbone(recipe.backbone, recipe.features_from, recipe.image_size, weights)

        def still_frozen(precision: Precision, train: Indices, report: ReportProgress) -> Digest:
            if precision is not Precision.INT8:
                return frozen_backbone.backbone
            return self._networks.quantise(
                frozen_backbone.backbone, [data.digests[row] for row in train], source, report
            )

        exporter = TrainedNetworkExporter(recipe, data.task, self._considered, pixels, workspace, rebuild, still_frozen)
        return TrainingSetup(
            learner, frozen_backbone.precision, extraction, frozen_backbone, pixels, exporter, notes=notes
        )

    def _heads(self, frozen_backbone: FrozenBackbone) -> HeadLearner:
        data = self._data
        return HeadLearner(self._recipe, FitData(data.task, data.outputs, frozen_backbone.features, data.truth))

    def _choose_frozen_backbone(
        self, precisions: Sequence[Precision], source: PixelSource
    ) -> tuple[FrozenBackbone, PrecisionDecision | None]:
        """Return the frozen network in one of the precisions, and the comparison that chose this precision.

        The comparison is None if there is only one precision. If this run was interrupted after its comparison, the
        earlier result is used again.
        """
        data, report, networks, registry = self._data, self._listener, self._networks, self._registry
        recipe, digests = self._recipe, data.digests
        choice: PrecisionDecision | None = None
        known = registry.find_precision_decision() if len(precisions) > 1 else None
        if known is not None:
            choice = PrecisionDecision.from_facts(known)
            precisions = [choice.precision]
        exported = networks.export_cut(recipe.features_from)
        started = time.perf_counter()
        files = dict.fromkeys(precisions, exported)
        if Precision.INT8 in files:
            images = [digests[row] for row in data.trained_on]
            files[Precision.INT8] = networks.quantise(
                exported, images, source, report.images, begin=lambda: report.stage("quantise")
            )
        report.stage("features")
        frozen_backbones = []
        for number, (precision, network) in enumerate(files.items()):
            report_images = _one_of(number, len(files), report)
            frozen_backbones.append(networks.frozen_backbone(network, precision, digests, source, report_images))
        extraction = sum_extractions([frozen_backbone.extraction for frozen_backbone in frozen_backbones])
        if len(frozen_backbones) > 1:
            report.extracted(extraction)  # already now, because the trials below may be interrupted
            report.stage("precision")
            engines = {frozen_backbone.precision: frozen_backbone.engine for frozen_backbone in frozen_backbones}
            times = measure_image_ms(engines, golden_images(recipe.image_size), lambda: report.images(0, 1))
            tried = [
                PrecisionScore(
                    frozen_backbone.precision,
                    self._score(frozen_backbone, _one_of(number, len(frozen_backbones), report)),
                    times[frozen_backbone.precision],
                )
                for number, frozen_backbone in enumerate(frozen_backbones)
            ]
            choice = choose_precision(data.task, tried)
            registry.set_precision_decision(choice.facts(data.task))
        chosen = choice.precision if choice else precisions[0]
        (frozen_backbone,) = (
            frozen_backbone for frozen_backbone in frozen_backbones if frozen_backbone.precision is chosen
        )
        extraction = replace(extraction, seconds=round(time.perf_counter() - started, 3))
        report.extracted(extraction)
        return replace(frozen_backbone, extraction=extraction), choice

    def _score(self, frozen_backbone: FrozenBackbone, report: ReportProgress) -> float:
        """Fit heads on the features of a frozen network, and return their out-of-fold headline score."""
        data, learner = self._data, self._heads(frozen_backbone)
        trials = Trials(learner.plan.epochs, len(data.folds), report)
        tasks = [
            (
                LearningTask(fold.train, fold.validation, learner.plan, seed_of(self._recipe, fold.number)),
                trials.of(fold.number),
            )
            for fold in data.folds
        ]
        learned = dict(learner.learn_many(tasks))
        return data.headline([finite(learned[fold.number].logits(fold.test)) for fold in data.folds])

    def _fine_tuning_data(self, recipe: FineTuningRecipe, pixels: Pixels) -> tuple[FineTuningData, Sequence[str]]:
        """Return the inputs of the layers that are fine-tuned, and notes for the report.

        The inputs are the outputs of the frozen layers, which are computed once per image and cached. With
        augmentation, or if the cache has no room for these outputs, the inputs are pixels.
        """
        data, workspace, networks = self._data, self._workspace, self._networks
        boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze)
        if boundary is None or recipe.augmentation is not None:
            return FineTuningData(data.task, data.outputs, pixels, data.truth, are_maps=False), ()
        frozen = networks.export_cut(boundary)
        engine = networks.engine(frozen, Precision.FLOAT32)
        self._listener.stage("activations")
        space = networks.feature_space(frozen, Precision.FLOAT32)
        room_bytes = workspace.pixels_bytes - pixels.nbytes
        maps = load_maps(self._data.digests, pixels, engine, space, workspace.pixels, room_bytes, self._listener.images)
        if maps is not None:
            return FineTuningData(data.task, data.outputs, maps, data.truth, are_maps=True), ()
        note = (
            f"Fine-tuning computed the layers before `{recipe.unfreeze}` anew in every epoch. Their outputs for all "
            f"images take {maps_bytes(pixels, engine) / 2**30:,.1f} GiB, which is more than ESPALIER_PIXELS_BYTES or "
            "the disk allows."
        )
        return FineTuningData(data.task, data.outputs, pixels, data.truth, are_maps=False), (note,)


def _pixels(data: RunData, recipe: DecidedRecipe, workspace: Workspace, listener: StageListener) -> Pixels:
    """Return the pixels of every image, uint8 [N, H, W, 3]. With augmentation, also store a sheet of examples."""
    listener.stage("pixels")
    drop_unused(workspace.pixels, workspace.pixels_bytes)
    decoder = workspace.decoder(recipe.image_size, recipe.resize)
    pixels = load_pixels(data.digests, decoder, workspace.pixels, listener.images)
    if recipe.augmentation is not None:
        shown = contact_sheet(recipe.augmentation, pixels[spread(len(pixels), _SHOWN)], recipe.seed)
        listener.file(RunFile.AUGMENTATIONS, shown, "image/png")
    return pixels


# Number of images on the sheet of augmentations.
_SHOWN = 8


def _one_of(number: int, count: int, report: StageListener) -> ReportProgress:
    """Return a report function for pass `number` of `count` passes of equal length.

    The function takes the progress of this pass, and reports the progress of all passes together.
    """
    return lambda done, total: report.images(number * total + done, count * total)


def _rows_in(splits: Sequence[Split], chosen: Split) -> Indices:
    return np.flatnonzero(np.array([split is chosen for split in splits], dtype=bool))


def seed_of(recipe: FilledRecipe, number: int) -> int:
    """Return the seed of a fold. The final fit uses the number that follows the last fold's."""
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])
