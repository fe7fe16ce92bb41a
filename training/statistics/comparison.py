"""Which recipe is best, and is that more than chance? Compares out-of-fold logits; loads no network and no Keras.

Every recipe answered for the same images in the same folds, so that recipes are compared image by image: a hard image
is hard for all of them and cancels out. Images that belong together are drawn, and exchanged, together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from artifacts import manifest
from artifacts.bundle import Float32
from artifacts.manifest import Row
from errors import EspalierError
from recipes.headline import HEADLINES, Headline
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Float64, make_targets
from training.statistics import evaluation
from training.statistics.resampling import DRAWS, block_sums, bootstrap_interval, draws

SWAPS = 10_000
LEVEL = 0.05
TEST = (
    f"Difference to the best with a paired bootstrap interval ({DRAWS:,} draws) and a paired permutation test "
    f"({SWAPS:,} exchanges), both over images, or over groups where images belong together; p-values are adjusted for "
    "the number of recipes (Holm), intervals are not. The best was chosen on these images."
)

_AT_ONCE = 500

Score = Callable[[Float64], Float64]


@dataclass(frozen=True)
class OutOfFoldLogits:
    """What a recipe answered.

    folds is int16 [repeats, N], -1 for an image in none; logits is float32 [repeats, N, outputs].
    """

    folds: npt.NDArray[np.int16]
    logits: Float32


@dataclass(frozen=True)
class Entry:
    """A recipe that was trained: what tells it from the others, its headline metric, and how to get its answers."""

    title: str
    score: float
    load: Callable[[], OutOfFoldLogits]


@dataclass(frozen=True)
class Difference:
    """A score less the best one, with its 95 % interval and how often chance alone would give as much."""

    difference: float
    ci95: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """What came out: the number of the best entry, each one's difference to it (its own is None), and a sentence."""

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
        alive: called now and then.
    """
    headline = HEADLINES[task]
    best = best_of([entry.score for entry in entries], headline)
    answered = entries[best].load()
    folds, tested = answered.folds, np.flatnonzero(answered.folds[0] >= 0)
    truth = make_targets(task, labels, rows).truth[tested]
    groups = np.array(manifest.group_rows(rows), dtype=np.intp)[tested]

    def score(sums: Float64) -> Float64:
        return evaluation.scores_of_sums(task, sums)[headline.metric]

    def of_images(answered: OutOfFoldLogits) -> Float64:
        """Return float64 [N, S], the mean over repeats: more of those add no images."""
        if not np.array_equal(answered.folds, folds):
            raise EspalierError("The runs of a comparison were not tested on the same folds. This is a bug.")
        return evaluation.mean_image_statistics(task, truth, answered.logits[:, tested])

    of_best = of_images(answered)
    found: list[Difference | None] = []
    for number, entry in enumerate(entries):
        alive()
        found.append(None if number == best else paired(of_images(entry.load()), of_best, groups, score))
    adjusted = _adjusted(found)
    return Comparison(best, adjusted, verdict(headline, entries, best, adjusted))


def best_of(scores: Sequence[float], headline: Headline) -> int:
    """Return the number of the best score, the first one of equals."""
    values = np.array(scores) if headline.is_greater_better else -np.array(scores)
    return int(values.argmax())


def paired(of_one: Float64, of_best: Float64, groups: Indices, score: Score, swaps: int = SWAPS) -> Difference:
    """Return the difference of a score between two recipes that answered for the same images.

    The interval is that of bootstrap draws, each the same for both (Efron and Tibshirani 1993, "An Introduction to the
    Bootstrap", 8.3). The test exchanges the two recipes' answers for whole groups at random: were the recipes alike, a
    difference would be as likely after that as before (Good 2005, "Permutation, Parametric and Bootstrap Tests", 3.7).

    Args:
        of_one: numbers of each image whose sums give the score, float64 [N, S].
        of_best: the same for the recipe that it is compared with.
        groups: group of each image, int [N]; two groups or more.
        score: turns sums, float64 [..., S], into scores [...].
        swaps: how often answers are exchanged.
    """
    one, best = block_sums(of_one, groups), block_sums(of_best, groups)
    all_one, all_best = one.sum(axis=0), best.sum(axis=0)
    observed = float(score(all_one) - score(all_best))
    rounding = 1e-12 * float(np.abs(score(all_one)) + np.abs(score(all_best)))
    drawn = np.concatenate([score(counts @ one) - score(counts @ best) for counts in draws(len(one))])

    random = np.random.default_rng(0)
    apart = one - best
    as_large = 0
    for start in range(0, swaps, _AT_ONCE):
        exchanged = random.integers(0, 2, (min(_AT_ONCE, swaps - start), len(one))).astype(np.float64) @ apart
        differences = score(all_one - exchanged) - score(all_best + exchanged)
        as_large += int((np.abs(differences) >= abs(observed) - rounding).sum())
    return Difference(observed, bootstrap_interval(drawn, len(one)), (1 + as_large) / (1 + swaps))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold for all comparisons together (Holm 1979, Scandinavian Journal of Statistics 6:65)."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = least
    return adjusted


def verdict(headline: Headline, entries: Sequence[Entry], best: int, differences: Sequence[Difference | None]) -> str:
    """Return in one sentence which recipe is best, and from which others it cannot be told."""
    winner = f"{entries[best].title} has the best {headline.title[0].lower()}{headline.title[1:]}, "
    winner += headline.said(entries[best].score)
    others = [(entry, found) for entry, found in zip(entries, differences, strict=True) if found is not None]
    if not others:
        return f"{winner}; no other recipe could be trained, so there is nothing to compare it with."
    near = [entry for entry, found in others if found.p_value >= LEVEL]
    if not near:
        next_best, _ = min(others, key=lambda other: abs(other[1].difference))
        largest = max(found.p_value for _, found in others)
        return (
            f"{winner}, and is better than every other: the next, {next_best.title}, has "
            f"{headline.said(next_best.score)} (p at most {largest:.2g}, adjusted by Holm)."
        )
    names = " and ".join(filter(None, [", ".join(entry.title for entry in near[:-1]), near[-1].title]))
    return f"{winner}, but cannot be told apart from {names} on these images."


def _adjusted(found: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = iter(holm([one.p_value for one in found if one is not None]))
    return [None if one is None else Difference(one.difference, one.ci95, next(adjusted)) for one in found]
