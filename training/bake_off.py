"""Chooses the backbone and the cut point of a run by a bake-off: tries each candidate on a sample of the images.

The candidates are the cut points of one backbone, or of every backbone whose weights are stored here. A stratified
sample of the training images goes through each network once, which returns the features of all its cuts. Heads are
fitted on the features of each cut in folds of the sample, and the cut with the best out-of-fold score wins. The run
measures its own score afterwards, on its own folds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from artifacts.bundle import Logits
from artifacts.features import Features
from artifacts.store import Digest
from errors import RecipeInvalid, TrainingDiverged
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.filled import FeatureExtractionRecipe, UndecidedRecipe
from recipes.headline import HEADLINES
from recipes.recipe import AUTO, Task
from training.data.arrays import ReportProgress
from training.data.split import Fold, Indices, make_folds, nested_subsets
from training.data.targets import Targets
from training.fitting.fit_task import FitData
from training.fitting.learners import HeadLearner, LearningTask
from training.fitting.trials import Trial
from training.networks import backbones
from training.networks.network_files import Workspace
from training.statistics import evaluation

SAMPLE = 1000
"""Approximate size of the sample; it is larger if there are many classes, since every fold needs images of each."""
FOLDS = 3
# A fixed seed, so that the folds of the bake-off do not depend on the seed of the run.
_SEED = 7


@dataclass(frozen=True)
class CutScore:
    """The out-of-fold headline score of a cut; None if its heads did not converge."""

    backbone: BackboneName
    features_from: str
    image_size: int
    width: int
    score: float | None


@dataclass(frozen=True)
class BakeOffResult:
    """The chosen cut, the weights of its backbone, and the scores of all cuts on a sample of `images` images."""

    chosen: CutScore
    weights: Digest
    images: int
    seconds: float
    tried: tuple[CutScore, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> BakeOffResult:
        """Restore a result from the JSON that `facts` returned."""
        tried = tuple(_cut_score(one) for one in facts["tried"])
        return cls(_cut_score(facts["chosen"]), Digest(facts["weights"]), facts["images"], facts["seconds"], tried)

    def facts(self, task: Task) -> dict[str, Any]:
        """Return the result as JSON, as it is stored with the run."""
        return {
            "chosen": asdict(self.chosen),
            "weights": self.weights,
            "score": HEADLINES[task].metric,
            "images": self.images,
            "folds": FOLDS,
            "seconds": self.seconds,
            "tried": [asdict(one) for one in self.tried],
        }

    def decide(self, recipe: UndecidedRecipe) -> FeatureExtractionRecipe:
        """Return the recipe with the chosen backbone and cut in place of `auto`."""
        return recipe.decided(self.chosen.backbone, self.chosen.features_from, self.chosen.image_size)


def _cut_score(facts: Mapping[str, Any]) -> CutScore:
    return CutScore(**{**facts, "backbone": BackboneName(facts["backbone"])})


def bake_off(
    recipe: UndecidedRecipe,
    task: Task,
    outputs: int,
    targets: Targets,
    groups: Indices,
    rows: Indices,
    digests: Sequence[Digest],
    weights: Mapping[BackboneName, Digest],
    workspace: Workspace,
    report: ReportProgress,
) -> BakeOffResult:
    """Score every cut that a recipe leaves open, and choose the best.

    Args:
        recipe: the head to fit, and the cuts to compare.
        task: what is predicted.
        outputs: number of logits.
        targets: the targets of every row of the data set.
        groups: group of every row, int [N].
        rows: the training rows, from which the sample is drawn.
        digests: digest of the image of every row.
        weights: the weights of each backbone to compare.
        workspace: the store with images and weights, the image limits and the number of threads.
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
        raise RecipeInvalid(
            "image_size",
            f"Images of {recipe.image_size} pixels are too small for every candidate backbone ({', '.join(sizes)}). "
            "Use a larger image_size, or leave it out.",
        )
    steps = _Steps(report, sum(len(names) + len(_cuts(recipe, name)) * len(folds) * _FIT for name in able))
    tried = []
    for name in able:
        size = sizes[name]
        cuts = _cuts(recipe, name)
        decoder = workspace.decoder(size, recipe.resize)
        model = backbones.build_multi_cut_network(name, cuts, size, workspace.store.read(weights[name]))
        parts: list[Mapping[str, Features]] = []
        for of_batch, pixels in decoder.batches(names):
            parts.append(model.predict_on_batch(pixels))
            steps.done(len(of_batch))
        for cut in cuts:
            features = np.concatenate([np.asarray(part[cut], np.float32) for part in parts])
            score = _score(recipe, task, outputs, features, targets.truth[tried_on], folds, steps)
            tried.append(CutScore(name, cut, size, features.shape[1], score))
    scored = [one for one in tried if one.score is not None]
    if not scored:
        raise TrainingDiverged(
            "The bake-off could not choose a cut point, since training diverged on all of them. Lower "
            "optimizer.learning_rate."
        )
    sign = 1 if HEADLINES[task].is_greater_better else -1
    # Of cuts with equal scores the first is taken, because an earlier cut costs less computation.
    best = max(scored, key=lambda one: sign * (one.score or 0.0))
    spent_s = round(time.perf_counter() - started, 3)
    return BakeOffResult(best, weights[best.backbone], len(tried_on), spent_s, tuple(tried))


def _cuts(recipe: UndecidedRecipe, name: BackboneName) -> list[str]:
    """Return the cuts of a backbone to compare."""
    if recipe.features_from == AUTO:
        return list(CATALOGUE[name].cuts)
    return [recipe.features_from or CATALOGUE[name].last_cut]


def _sample(rows: Indices, targets: Targets, groups: Indices) -> Indices:
    """Return about SAMPLE rows, stratified, with whole groups only."""
    if len(rows) <= SAMPLE:
        return rows
    sample = nested_subsets(rows, targets.strata, targets.needed, groups, [SAMPLE / len(rows)], _SEED)[0]
    # Every fold must train on each class. So a rare class gets FOLDS groups, even if its share of the sample is less.
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
    """Return the out-of-fold headline score of heads on features; None if training diverged."""
    learner = HeadLearner(recipe, FitData(task, outputs, features, truth))
    tasks = [
        (LearningTask(fold.train, fold.validation, learner.plan, _SEED + fold.number), Trial(steps.repeat_report))
        for fold in folds
    ]
    dtype = np.float64 if task is Task.REGRESSION else np.float32
    logits: Logits = np.full((1, len(features), outputs), np.nan, dtype=dtype)
    try:
        for index, learned in learner.learn_many(tasks):
            logits[0, folds[index].test] = learned.logits(folds[index].test)
    except TrainingDiverged:
        return None
    finally:
        steps.done(len(folds) * _FIT)
    if not np.isfinite(logits).all():
        return None
    return evaluation.headline_score(task, truth, logits)


# The progress bar counts one fit as so many steps and one image as one step.
_FIT = 20


class _Steps:
    """Counts the finished steps of a bake-off and reports them as progress."""

    def __init__(self, report: ReportProgress, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def repeat_report(self, epochs: float) -> None:
        """Report the unchanged progress, to show that a fit is still running."""
        self._report(self._done, self._total)

    def done(self, count: int) -> None:
        """Add `count` finished steps and report the progress."""
        self._done = min(self._total, self._done + count)
        self._report(self._done, self._total)
