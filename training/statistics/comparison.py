"""Compares recipes by their out-of-fold logits: which is best, and is the difference significant? Knows no Keras.

All recipes were tested on the same images in the same folds, so that they are compared image by image. An image that is
hard for every recipe has no influence. Images of one group are always resampled and exchanged together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from artifacts import manifest
from artifacts.bundle import Logits
from artifacts.manifest import Row
from errors import EspalierError
from recipes.headline import HEADLINES, Headline
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Float64, make_targets
from training.statistics import evaluation
from training.statistics.baseline import compare_with_constant_answer
from training.statistics.resampling import DRAWS, block_sums, bootstrap_interval, draws

SWAPS = 10_000
LEVEL = 0.05
TEST = (
    f"Difference to the best with a paired bootstrap interval ({DRAWS:,} draws) and a paired permutation test "
    f"({SWAPS:,} exchanges), both over images, or over groups where images belong together; p-values are adjusted for "
    "the number of recipes (Holm), intervals are not. The best was chosen on these images."
)

_SWAPS_AT_ONCE = 500

Score = Callable[[Float64], Float64]


@dataclass(frozen=True)
class OutOfFoldLogits:
    """The logits of one recipe for the images that each fold did not train on.

    Attributes:
        folds: int16 [repeats, N], the fold that tested each image; -1 for an image that no fold tested.
        logits: float32 or float64 [repeats, N, outputs].
    """

    folds: npt.NDArray[np.int16]
    logits: Logits


@dataclass(frozen=True)
class Entry:
    """A trained recipe in a comparison.

    Attributes:
        title: the values that distinguish this recipe from the others.
        score: its headline score.
        load: loads its out-of-fold logits.
    """

    title: str
    score: float
    load: Callable[[], OutOfFoldLogits]


@dataclass(frozen=True)
class Difference:
    """The difference of a recipe's score to the best score.

    Attributes:
        difference: the recipe's score minus the best score.
        ci95: the 95 % interval of the difference.
        p_value: the probability of a difference at least as large if the two recipes were equally good.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        best: index of the best entry.
        differences: for each entry, its difference to the best entry; None for the best entry itself.
        verdict: the result in one sentence.
    """

    best: int
    differences: list[Difference | None]
    verdict: str


def compare(
    task: Task, labels: Sequence[str], rows: Sequence[Row], entries: Sequence[Entry], alive: Callable[[], None]
) -> Comparison:
    """Compare entries by the headline metric of their task.

    Args:
        task: what is predicted.
        labels: class names in the order of the outputs; none for a regression.
        rows: the images of the data set version, N of them.
        entries: at least one; all were tested on the same folds.
        alive: called before each entry, to show that the work continues.
    """
    headline = HEADLINES[task]
    best = best_of([entry.score for entry in entries], headline)
    logits_of_best = entries[best].load()
    folds, tested = logits_of_best.folds, np.flatnonzero(logits_of_best.folds[0] >= 0)
    truth = make_targets(task, labels, rows).truth[tested]
    groups = np.array(manifest.group_rows(rows), dtype=np.intp)[tested]

    def score(sums: Float64) -> Float64:
        return evaluation.scores_of_sums(task, sums)[headline.metric]

    def of_images(out_of_fold: OutOfFoldLogits) -> Float64:
        """Return the statistics of each image, float64 [N, S], as their mean over the repeats."""
        if not np.array_equal(out_of_fold.folds, folds):
            raise EspalierError(
                "The runs of a comparison must be tested on the same folds, but their folds differ. This is a bug."
            )
        return evaluation.mean_image_statistics(task, truth, out_of_fold.logits[:, tested])

    of_best = of_images(logits_of_best)
    differences: list[Difference | None] = []
    for number, entry in enumerate(entries):
        alive()
        is_best = number == best
        differences.append(None if is_best else paired_difference(of_images(entry.load()), of_best, groups, score))
    adjusted = _adjusted(differences)
    r2 = 0.0
    if task is Task.REGRESSION:
        r2 = evaluation.scores_with_intervals(task, truth, groups, logits_of_best.logits[:, tested])["r2"]
    baseline = compare_with_constant_answer(task, truth, groups, logits_of_best.logits[:, tested], r2)
    found = verdict(headline, entries, best, adjusted)
    if not baseline["is_better"]:
        found = f"Not even the best recipe is better than a constant answer that ignores the image. {found}"
    return Comparison(best, adjusted, found)


def best_of(scores: Sequence[float], headline: Headline) -> int:
    """Return the index of the best score. If several scores are equal, it is the first of them."""
    values = np.array(scores) if headline.is_greater_better else -np.array(scores)
    return int(values.argmax())


def paired_difference(
    of_one: Float64, of_best: Float64, groups: Indices, score: Score, swaps: int = SWAPS
) -> Difference:
    """Return the difference of a score between two recipes that were tested on the same images.

    The interval comes from bootstrap draws that are the same for both recipes (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", 8.3). The p-value comes from a permutation test, which exchanges the logits of the
    two recipes for random groups. If the recipes were equally good, such exchanges would often give as large a
    difference as the observed one (Good 2005, "Permutation, Parametric and Bootstrap Tests", 3.7).

    Args:
        of_one: the statistics of each image for one recipe, float64 [N, S]; `score` takes their sums.
        of_best: the statistics of each image for the best recipe, float64 [N, S].
        groups: group of each image, int [N]; at least two groups.
        score: turns sums, float64 [..., S], into scores [...].
        swaps: number of random exchanges.
    """
    one, best = block_sums(of_one, groups), block_sums(of_best, groups)
    all_one, all_best = one.sum(axis=0), best.sum(axis=0)
    observed = float(score(all_one) - score(all_best))
    rounding = 1e-12 * float(np.abs(score(all_one)) + np.abs(score(all_best)))
    drawn = np.concatenate([score(counts @ one) - score(counts @ best) for counts in draws(len(one))])

    random = np.random.default_rng(0)
    apart = one - best
    as_large = 0
    for start in range(0, swaps, _SWAPS_AT_ONCE):
        exchanged = random.integers(0, 2, (min(_SWAPS_AT_ONCE, swaps - start), len(one))).astype(np.float64) @ apart
        differences = score(all_one - exchanged) - score(all_best + exchanged)
        as_large += int((np.abs(differences) >= abs(observed) - rounding).sum())
    return Difference(observed, bootstrap_interval(drawn, len(one)), (1 + as_large) / (1 + swaps))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of comparisons (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = least
    return adjusted


def verdict(headline: Headline, entries: Sequence[Entry], best: int, differences: Sequence[Difference | None]) -> str:
    """Return a sentence that names the best recipe, and the recipes that are not significantly worse."""
    winner = f"{entries[best].title} has the best {headline.title[0].lower()}{headline.title[1:]}, "
    winner += headline.formatted(entries[best].score)
    others = [(entry, found) for entry, found in zip(entries, differences, strict=True) if found is not None]
    if not others:
        return f"{winner}; no other recipe has a score, so there is nothing to compare it with."
    near = [entry for entry, found in others if found.p_value >= LEVEL]
    if not near:
        next_best, _ = min(others, key=lambda other: abs(other[1].difference))
        largest = max(found.p_value for _, found in others)
        return (
            f"{winner}, significantly better than all other recipes. The second best is {next_best.title} with "
            f"{headline.formatted(next_best.score)} (every p ≤ {largest:.2g}, adjusted by Holm's method)."
        )
    names = " and ".join(filter(None, [", ".join(entry.title for entry in near[:-1]), near[-1].title]))
    return f"{winner}, but cannot be told apart from {names} on these images."


def _adjusted(found: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = iter(holm([one.p_value for one in found if one is not None]))
    return [None if one is None else Difference(one.difference, one.ci95, next(adjusted)) for one in found]
