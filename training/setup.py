"""Sets up a run: reads its images, makes its folds, and prepares the inputs that all folds share."""

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
from training.data.pixels import ImageDecoder, LoadedPixels, PixelSource
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
    """The input of a run.

    Attributes:
        recipe: the recipe, with every default filled in.
        manifest: digest of the data set version's manifest.
        labels: class names in the order of the outputs.
        weights: digest of the backbone's weights; None for a network from scratch or a backbone still to be chosen.
        candidates: digests of the weights of the backbones to choose from.
    """

    recipe: FilledRecipe
    manifest: Digest
    labels: Sequence[str]
    weights: Digest | None
    candidates: Mapping[BackboneName, Digest] = field(default_factory=dict)


class RunData:
    """The images of a data set version as a run uses them: their targets, groups, splits and folds."""

    def __init__(self, request: TrainingRequest, place: Workspace) -> None:
        recipe = request.recipe
        self.repeats = recipe.folds.repeats
        self.labels = request.labels
        self.rows: Sequence[Row] = manifest.load(place.store.read(request.manifest))
        self.task = recipe.task
        targets = self.targets = make_targets(self.task, request.labels, self.rows)
        self.truth = targets.truth
        belongs = manifest.group_rows(self.rows)
        self.groups = np.array(belongs, dtype=np.intp)
        split = manifest.splits_of(self.rows, belongs)
        self.trained_on = _rows_in(split, Split.TRAIN)
        self.watched = _rows_in(split, Split.VALIDATION)
        self.held_out = _rows_in(split, Split.TEST)
        self.folds = make_folds(
            self.trained_on,
            targets.strata,
            targets.needed,
            self.groups,
            self.watched,
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
        """Return all folds' test logits, [repeats, N, outputs], NaN for images that no fold tested."""
        found = np.full((self.repeats, len(self.rows), self.outputs), np.nan, dtype=logits[0].dtype)
        for fold, of_fold in zip(self.folds, logits, strict=True):
            found[fold.repeat, fold.test] = of_fold
        return found

    def headline(self, logits: Sequence[Logits]) -> float:
        """Return the task's headline score of all folds' test logits."""
        rows = self.trained_on
        return evaluation.headline_score(self.task, self.truth[rows], self.out_of_fold(logits)[:, rows])


@dataclass(frozen=True)
class TrainingSetup:
    """The learner of a run, and what its folds share.

    Attributes:
        learner: trains each fold and the final model.
        precision: the precision of the network during training.
        extraction: the work that was done before the folds.
        trunk: the frozen network with its features, on which heads are trained; None from scratch.
        pixels: uint8 [N, H, W, 3]; None if only features are read.
        exporter: exports trained networks; None if the network stays frozen.
        choice: the precisions of the frozen network that were compared; None if there was nothing to choose.
        notes: sentences for the report.
    """

    learner: Learner
    precision: Precision
    extraction: Extraction
    trunk: FrozenBackbone | None = None
    pixels: Pixels | None = None
    exporter: TrainedNetworkExporter | None = None
    choice: PrecisionDecision | None = None
    notes: Sequence[str] = ()


def choose_features(
    data: RunData,
    recipe: UndecidedRecipe,
    request: TrainingRequest,
    place: Workspace,
    registry: Registry,
    listener: StageListener,
) -> BakeOffResult:
    """Choose the source of a recipe's features by a bake-off; an interrupted run keeps its earlier choice."""
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
        place,
        listener.images,
    )
    registry.set_bake_off_result(found.facts(data.task))
    return found


def set_up(
    data: RunData,
    recipe: DecidedRecipe,
    weights: Digest | None,
    place: Workspace,
    registry: Registry,
    listener: StageListener,
) -> TrainingSetup:
    """Prepare the inputs that all folds of a run share."""
    if isinstance(recipe.precision, Precision):
        OpenVinoEngine.check(recipe.precision)
    if isinstance(recipe, FromScratchRecipe):
        return _set_up_from_scratch(data, recipe, place, listener)
    assert weights is not None, "A recipe with a backbone has weights. This is a bug."
    setup = _BackboneSetup(data, recipe, weights, place, registry, listener)
    if isinstance(recipe, FineTuningRecipe):
        return setup.set_up_fine_tuning(recipe)
    return setup.set_up_frozen()


def _set_up_from_scratch(
    data: RunData, recipe: FromScratchRecipe, place: Workspace, listener: StageListener
) -> TrainingSetup:
    """Decode the pixels; return the setup of a network from scratch."""
    started = time.perf_counter()
    pixels = _pixels(data, recipe, place, listener)
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
        exporter=TrainedNetworkExporter(recipe, data.task, considered, pixels, place, rebuild, frozen=None),
    )


class _BackboneSetup:
    """Prepares a run on a backbone: exports it, quantises it if int8 is considered, and extracts features."""

    def __init__(
        self,
        data: RunData,
        recipe: FeatureExtractionRecipe | FineTuningRecipe,
        weights: Digest,
        place: Workspace,
        registry: Registry,
        listener: StageListener,
    ) -> None:
        self._recipe = recipe
        self._data, self._place, self._registry, self._listener = data, place, registry, listener
        self._weights = weights
        self._networks = NetworkFiles(recipe, weights, place, registry)
        self._considered = candidate_precisions(recipe.precision, OpenVinoEngine.precisions())

    def set_up_frozen(self) -> TrainingSetup:
        """Return the setup of a head on a frozen backbone."""
        recipe, place = self._recipe, self._place
        source = ImageDecoder(place.store, recipe.image_size, recipe.resize, place.image_limits, place.threads)
        self._listener.stage("backbone")
        trunk, choice = self._trunk(self._considered, source)
        return TrainingSetup(self._heads(trunk), trunk.precision, trunk.extraction, trunk, choice=choice)

    def set_up_fine_tuning(self, recipe: FineTuningRecipe) -> TrainingSetup:
        """Return the setup of a backbone that is fine-tuned with its head."""
        data, place, listener = self._data, self._place, self._listener
        started = time.perf_counter()
        pixels = _pixels(data, recipe, place, listener)
        source = LoadedPixels(data.digests, pixels)
        listener.stage("backbone")
        trunk, _ = self._trunk([Precision.FLOAT32], source)
        fine_tuning_data, notes = self._fine_tuning_data(recipe, pixels)
        extraction = replace(trunk.extraction, seconds=round(time.perf_counter() - started, 3))
        listener.extracted(extraction)
        head = self._heads(trunk)
        learner = FineTuningLearner(recipe, head, place.store.read(self._weights), fine_tuning_data)

        def rebuild(weights: bytes) -> Any:
            return backbones.build_backbone(recipe.backbone, recipe.features_from, recipe.image_size, weights)

        def still_frozen(precision: Precision, train: Indices, report: ReportProgress) -> Digest:
            if precision is not Precision.INT8:
                return trunk.backbone
            return self._networks.quantise(trunk.backbone, [data.digests[row] for row in train], source, report)

        exporter = TrainedNetworkExporter(recipe, data.task, self._considered, pixels, place, rebuild, still_frozen)
        return TrainingSetup(learner, trunk.precision, extraction, trunk, pixels, exporter, notes=notes)

    def _heads(self, trunk: FrozenBackbone) -> HeadLearner:
        data = self._data
        return HeadLearner(self._recipe, FitData(data.task, data.outputs, trunk.features, data.truth))

    def _trunk(
        self, precisions: Sequence[Precision], source: PixelSource
    ) -> tuple[FrozenBackbone, PrecisionDecision | None]:
        """Return the frozen network in one of the precisions, with the features of every image, and the choice.

        Several precisions are compared; an interrupted run keeps its earlier choice.
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
        trunks = []
        for number, (precision, network) in enumerate(files.items()):
            report_images = _one_of(number, len(files), report)
            trunks.append(networks.frozen_backbone(network, precision, digests, source, report_images))
        extraction = sum_extractions([trunk.extraction for trunk in trunks])
        if len(trunks) > 1:
            report.extracted(extraction)  # before the trials, which may be interrupted
            report.stage("precision")
            engines = {trunk.precision: trunk.engine for trunk in trunks}
            times = measure_image_ms(engines, golden_images(recipe.image_size), lambda: report.images(0, 1))
            tried = [
                PrecisionScore(
                    trunk.precision, self._score(trunk, _one_of(number, len(trunks), report)), times[trunk.precision]
                )
                for number, trunk in enumerate(trunks)
            ]
            choice = choose_precision(data.task, tried)
            registry.set_precision_decision(choice.facts(data.task))
        chosen = choice.precision if choice else precisions[0]
        (trunk,) = (trunk for trunk in trunks if trunk.precision is chosen)
        extraction = replace(extraction, seconds=round(time.perf_counter() - started, 3))
        report.extracted(extraction)
        return replace(trunk, extraction=extraction), choice

    def _score(self, trunk: FrozenBackbone, report: ReportProgress) -> float:
        """Return the out-of-fold headline score of heads on a frozen network."""
        data, learner = self._data, self._heads(trunk)
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

        Without augmentation the frozen layers run only once per image, if there is room for their outputs.
        """
        data, place, networks = self._data, self._place, self._networks
        boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze)
        if boundary is None or recipe.augmentation is not None:
            return FineTuningData(data.task, data.outputs, pixels, data.truth, are_maps=False), ()
        frozen = networks.export_cut(boundary)
        engine = networks.engine(frozen, Precision.FLOAT32)
        self._listener.stage("activations")
        space = networks.feature_space(frozen, Precision.FLOAT32)
        room_bytes = place.pixels_bytes - pixels.nbytes
        maps = load_maps(self._data.digests, pixels, engine, space, place.pixels, room_bytes, self._listener.images)
        if maps is not None:
            return FineTuningData(data.task, data.outputs, maps, data.truth, are_maps=True), ()
        note = (
            f"Fine-tuning computed the layers before `{recipe.unfreeze}` anew in every epoch: their outputs for all "
            f"images take {maps_bytes(pixels, engine) / 2**30:,.1f} GiB, for which ESPALIER_PIXELS_BYTES or the disk "
            "has no room."
        )
        return FineTuningData(data.task, data.outputs, pixels, data.truth, are_maps=False), (note,)


def _pixels(data: RunData, recipe: DecidedRecipe, place: Workspace, listener: StageListener) -> Pixels:
    """Return the pixels of every image; with augmentation, store a sheet of examples as well."""
    listener.stage("pixels")
    drop_unused(place.pixels, place.pixels_bytes)
    decoder = ImageDecoder(place.store, recipe.image_size, recipe.resize, place.image_limits, place.threads)
    pixels = load_pixels(data.digests, decoder, place.pixels, listener.images)
    if recipe.augmentation is not None:
        shown = contact_sheet(recipe.augmentation, pixels[spread(len(pixels), _SHOWN)], recipe.seed)
        listener.file(RunFile.AUGMENTATIONS, shown, "image/png")
    return pixels


# Number of images on the sheet of augmentations.
_SHOWN = 8


def _one_of(number: int, count: int, report: StageListener) -> ReportProgress:
    """Return a report function for one of `count` passes of the same length, which reports its part of the whole."""
    return lambda done, total: report.images(number * total + done, count * total)


def _rows_in(splits: Sequence[Split], wanted: Split) -> Indices:
    return np.flatnonzero(np.array([split is wanted for split in splits], dtype=bool))


def seed_of(recipe: FilledRecipe, number: int) -> int:
    """Return the seed of a fold. The final fit has the number after the last fold."""
    return int(np.random.SeedSequence((recipe.seed, number)).generate_state(1)[0])
