"""Chooses where features come from by trying: cuts of one backbone, or of every one whose weights are here.

A stratified sample of the images that are folded goes through each network once, all its cuts together; heads learn on
each cut's features in folds of their own, and the best score out of fold is taken. The score of the run is measured
afterwards, on its own folds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from artifacts.bundle import Float32
from artifacts.features import Features
from artifacts.store import Digest
from errors import RecipeInvalid, TrainingDiverged
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.filled import FeatureExtractionRecipe, UndecidedRecipe
from recipes.headline import HEADLINES
from recipes.recipe import AUTO, Task
from training.data.arrays import ReportProgress
from training.data.pixels import ImageDecoder
from training.data.split import Fold, Indices, make_folds, nested_subsets
from training.data.targets import Targets
from training.fitting.fit_task import FitData
from training.fitting.learners import Frozen, LearningTask
from training.fitting.trials import Trial
from training.networks import backbones
from training.networks.network_files import Workspace
from training.statistics import evaluation

SAMPLE = 1000
"""About so many images are tried on; more if there are many classes, of each of which every fold needs some."""
FOLDS = 3
# Folds of their own: not those of the run, whatever its seed.
_SEED = 7


@dataclass(frozen=True)
class Tasted:
    """What a cut came to: the task's headline score out of fold; None if its heads did not converge."""

    backbone: BackboneName
    features_from: str
    image_size: int
    width: int
    score: float | None


@dataclass(frozen=True)
class Pick:
    """What was chosen, with its weights, and all that was tried on `images` images in so many seconds."""

    chosen: Tasted
    weights: Digest
    images: int
    seconds: float
    tried: tuple[Tasted, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Pick:
        """Return what `facts` says."""
        tried = tuple(_tasted(one) for one in facts["tried"])
        return cls(_tasted(facts["chosen"]), Digest(facts["weights"]), facts["images"], facts["seconds"], tried)

    def facts(self, task: Task) -> dict[str, Any]:
        """Return it as it is kept with the run."""
        return {
            "chosen": asdict(self.chosen),
            "weights": self.weights,
            "score": HEADLINES[task].metric,
            "images": self.images,
            "folds": FOLDS,
            "seconds": self.seconds,
            "tried": [asdict(one) for one in self.tried],
        }

    def settled(self, recipe: UndecidedRecipe) -> FeatureExtractionRecipe:
        """Return the recipe with what was chosen in place of `auto`."""
        return recipe.decided(self.chosen.backbone, self.chosen.features_from, self.chosen.image_size)


def _tasted(facts: Mapping[str, Any]) -> Tasted:
    return Tasted(**{**facts, "backbone": BackboneName(facts["backbone"])})


def bake_off(
    recipe: UndecidedRecipe,
    task: Task,
    outputs: int,
    targets: Targets,
    groups: Indices,
    rows: Indices,
    digests: Sequence[Digest],
    weights: Mapping[BackboneName, Digest],
    place: Workspace,
    report: ReportProgress,
) -> Pick:
    """Try every cut that a recipe leaves open, and choose the one whose heads score best.

    Args:
        recipe: what heads to train.
        task: what is predicted.
        outputs: number of logits.
        targets: of every row of the data set.
        groups: group of every row, int [N].
        rows: those that are folded.
        digests: the image of every row.
        weights: of the backbones that may be chosen.
        place: where images and weights are.
        report: called with (done, total) steps of about the same length.

    Raises:
        RecipeInvalid: the images are too small for every backbone.
    """
    started = time.perf_counter()
    report(0, 1)
    tried_on = _sample(rows, targets, groups)
    folds = make_folds(
        np.arange(len(tried_on)),
        targets.strata[tried_on],
        targets.needed[tried_on],
        groups[tried_on],
        np.array([], dtype=np.intp),
        k=min(FOLDS, recipe.folds.k),
        repeats=1,
        validation_fraction=recipe.validation_fraction,
        seed=_SEED,
    )
    names = [digests[row] for row in tried_on]
    sizes = {name: recipe.image_size or CATALOGUE[name].size for name in weights}
    able = [name for name, size in sizes.items() if size >= CATALOGUE[name].minimum_size]
    if not able:
        raise RecipeInvalid("image_size", "Expected images that are large enough for a backbone that is here.")
    steps = _Steps(report, sum(len(names) + len(_cuts(recipe, name)) * len(folds) * _FIT for name in able))
    tried = []
    for name in able:
        size = sizes[name]
        cuts = _cuts(recipe, name)
        decoder = ImageDecoder(place.store, size, recipe.resize, place.image_limits, place.threads)
        model = backbones.build_multi_cut_network(name, cuts, size, place.store.read(weights[name]))
        parts: list[Mapping[str, Features]] = []
        for of_batch, pixels in decoder.batches(names):
            parts.append(model.predict_on_batch(pixels))
            steps.done(len(of_batch))
        for cut in cuts:
            features = np.concatenate([np.asarray(part[cut], np.float32) for part in parts])
            score = _score(recipe, task, outputs, features, targets.truth[tried_on], folds, steps)
            tried.append(Tasted(name, cut, size, features.shape[1], score))
    scored = [one for one in tried if one.score is not None]
    if not scored:
        raise TrainingDiverged("No head learned on any cut. Lower optimizer.learning_rate.")
    sign = 1 if HEADLINES[task].is_greater_better else -1
    best = max(scored, key=lambda one: sign * (one.score or 0.0))  # the first of equals: the earliest cut costs least
    spent_s = round(time.perf_counter() - started, 3)
    return Pick(best, weights[best.backbone], len(tried_on), spent_s, tuple(tried))


def _cuts(recipe: UndecidedRecipe, name: BackboneName) -> list[str]:
    """Return the cuts of a backbone that a recipe leaves open."""
    if recipe.features_from == AUTO:
        return list(CATALOGUE[name].cuts)
    return [recipe.features_from or CATALOGUE[name].last_cut]


def _sample(rows: Indices, targets: Targets, groups: Indices) -> Indices:
    """Return about as many rows as are tried on, with the same share of each stratum and whole groups only."""
    if len(rows) <= SAMPLE:
        return rows
    sample = nested_subsets(rows, targets.strata, targets.needed, groups, [SAMPLE / len(rows)], _SEED)[0]
    # Folds need a rare class in several of them, and its share of the sample would be one group.
    strata = np.unique(targets.strata[rows], return_inverse=True)[1]
    having = [rows[strata == stratum] for stratum in range(strata.max() + 1)]
    labels = targets.needed.tocsc()
    is_folded = np.zeros(len(groups), dtype=bool)
    is_folded[rows] = True
    for start, end in pairwise(labels.indptr.tolist()):
        of_label = labels.indices[start:end]
        having.append(of_label[is_folded[of_label]])
    is_taken = np.zeros(int(groups.max()) + 1, dtype=bool)
    is_taken[groups[sample]] = True
    for one in having:
        inside = np.unique(groups[one])
        lacking = FOLDS - int(is_taken[inside].sum())
        if lacking > 0:
            is_taken[inside[~is_taken[inside]][:lacking]] = True
    return rows[is_taken[groups[rows]]]


def _score(
    recipe: UndecidedRecipe,
    task: Task,
    outputs: int,
    features: Features,
    truth: Any,
    folds: Sequence[Fold],
    steps: _Steps,
) -> float | None:
    """Return the headline score of heads on features, out of fold; None if one is not a number."""
    learner = Frozen(recipe, FitData(task, outputs, features, truth))
    tasks = [
        (LearningTask(fold.train, fold.validation, learner.plan, _SEED + fold.number), Trial(steps.moved))
        for fold in folds
    ]
    logits: Float32 = np.full((1, len(features), outputs), np.nan, dtype=np.float32)
    try:
        for place, learned in learner.learn_many(tasks):
            logits[0, folds[place].test] = learned.logits(folds[place].test)
    except TrainingDiverged:
        return None
    finally:
        steps.done(len(folds) * _FIT)
    if not np.isfinite(logits).all():
        return None
    return evaluation.headline_score(task, truth, logits)


# A fit takes about as long as so many images take in a small network; only the bar's evenness depends on it.
_FIT = 20


class _Steps:
    """Says how far all of it is."""

    def __init__(self, report: ReportProgress, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def moved(self, epochs: float) -> None:
        """Hear that the work moves."""
        self._report(self._done, self._total)

    def done(self, count: int) -> None:
        """Hear that some steps more are done."""
        self._done = min(self._total, self._done + count)
        self._report(self._done, self._total)
