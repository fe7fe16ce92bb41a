"""Computes scores and their confidence intervals from logits of images that a model was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from artifacts.bundle import Logits
from inference import heads
from recipes.headline import HEADLINES
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Float64, Truth
from training.statistics import resampling

INTERVAL = "Wilson, over images; not over retraining"
_INTERVALS = {
    Task.REGRESSION: "bootstrap, over images; not over retraining",
    Task.MULTILABEL: "bootstrap (Wilson for accuracy), over images; not over retraining",
}

_IS_SHARE = ("accuracy",)
"""The scores that are a share of the images. Their interval has a formula; other scores need the bootstrap."""


def wilson(share: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share that was observed in `count` trials; by default for 95 %."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # For shares of 0 and 1, one bound is the share itself. `min` and `max` protect this bound against rounding errors.
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def wilson_over_groups(correct: npt.NDArray[np.float64], groups: Indices) -> tuple[float, float]:
    """Return the interval of a share if the images of a group are not independent, such as pictures of one person.

    It is Wilson's interval for the effective number of images: the number of independent images whose share would have
    the same variance. The variance is that of a cluster sample (Cochran 1977, "Sampling Techniques", 3.12).

    Args:
        correct: share of right answers for each image, float64 [N] from 0 to 1.
        groups: group of each image, int [N]; at least two groups.
    """
    share = float(correct.mean())
    _, number = np.unique(groups, return_inverse=True)
    sizes = np.bincount(number)
    deviations = np.bincount(number, weights=correct) - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float(np.square(deviations).sum()) / len(correct) ** 2
    if share in (0.0, 1.0):
        return wilson(share, len(sizes))  # the variance is zero and says nothing, so each group counts as one image
    effective = share * (1 - share) / variance if variance > 0 else math.inf
    return wilson(share, min(effective, len(correct)))


def image_statistics(task: Task, truth: Truth, logits: Logits) -> Float64:
    """Return the statistics of each image, float64 [N, S]. `scores_of_sums` computes the scores from their sums.

    Args:
        task: what is predicted.
        truth: as `training.data.targets` has it.
        logits: [N, outputs]; for a regression the predicted numbers themselves.
    """
    if task is Task.REGRESSION:
        # From the median: one outlier moves the mean away from all other numbers, and the squares of the distance to it
        # would leave no digits for their deviations in a draw without the outlier.
        centred = truth[:, 0] - np.median(truth[:, 0])
        error = logits[:, 0] - truth[:, 0]
        return np.stack([np.ones(len(truth)), np.square(error), np.abs(error), centred, np.square(centred)], axis=1)
    probabilities = heads.probabilities(task, logits)
    answers = heads.answers(task, probabilities)
    if task is not Task.MULTILABEL:
        of_truth = probabilities[np.arange(len(truth)), truth]
        return np.stack([np.ones(len(truth)), answers == truth, surprise(of_truth)], axis=1).astype(np.float64)
    has = truth > 0.5
    right = (answers == has).all(axis=1)
    losses = surprise(np.where(has, probabilities, 1 - probabilities)).mean(axis=1)
    return np.concatenate(
        [np.stack([np.ones(len(truth)), right, losses], axis=1), answers & has, answers & ~has, ~answers & has],
        axis=1,
        dtype=np.float64,
    )


def headline_score(task: Task, truth: Truth, logits: Logits) -> float:
    """Return the task's headline score of logits [repeats, N, outputs], out of fold."""
    return float(scores_of_sums(task, mean_image_statistics(task, truth, logits).sum(axis=0))[HEADLINES[task].metric])


def mean_image_statistics(task: Task, truth: Truth, logits: Logits) -> Float64:
    """Return `image_statistics` float64 [N, S], averaged over the repeats of logits [repeats, N, outputs]."""
    total = image_statistics(task, truth, logits[0])
    for once in logits[1:]:
        total += image_statistics(task, truth, once)
    return total / len(logits)


def surprise(probabilities: Float64) -> Float64:
    """Return the negative logarithm. As in scikit-learn's log loss, zero is replaced by the epsilon of float64."""
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).eps))


def scores_of_sums(task: Task, sums: Float64) -> dict[str, Float64]:
    """Return scores by name, each of shape [...], from sums [..., S] of `image_statistics` over images.

    - Multiclass and binary: `accuracy`, and `loss`, the mean negative log-likelihood.
    - Multilabel: `accuracy`, the share of images with all labels right; `loss`, the mean over labels; `f1_macro`, the
      mean F1 of the labels that occur in truth or predictions; `f1_micro`, the F1 of all predictions together.
    - Regression: `rmse`; `mae`; `loss`, the mean squared error; `r2`, which is 1 - squared errors / squared deviations
      from the mean (NaN if all numbers are equal).
    """
    count = sums[..., 0]
    if task is Task.REGRESSION:
        squares, absolute, centred, deviations = np.moveaxis(sums[..., 1:], -1, 0)
        rounding = 1e-12 * deviations
        deviations = deviations - np.square(centred) / count
        r2 = 1 - np.divide(squares, deviations, out=np.full_like(squares, np.nan), where=deviations > rounding)
        return {"rmse": np.sqrt(squares / count), "mae": absolute / count, "r2": r2, "loss": squares / count}
    found = {"accuracy": sums[..., 1] / count, "loss": sums[..., 2] / count}
    if task is Task.MULTILABEL:
        hits, false_alarms, misses = np.split(sums[..., 3:], 3, axis=-1)
        # Only labels that occur: a draw or a fold without a rare label says nothing about that label.
        seen = (hits + false_alarms + misses > 0).sum(axis=-1)
        found["f1_macro"] = _f1(hits, false_alarms, misses).sum(axis=-1) / np.maximum(seen, 1)
        found["f1_micro"] = _f1(hits.sum(axis=-1), false_alarms.sum(axis=-1), misses.sum(axis=-1))
    return found


def _f1(hits: Float64, false_alarms: Float64, misses: Float64) -> Float64:
    relevant = 2 * hits + false_alarms + misses
    return np.divide(2 * hits, relevant, out=np.zeros_like(relevant), where=relevant > 0)


def evaluate(task: Task, labels: Sequence[str], truth: Truth, logits: Logits) -> dict[str, Any]:
    """Return the scores of logits by name.

    Args:
        task: what is predicted.
        labels: class names in the order of the outputs; none for a regression.
        truth: as `training.data.targets` has it.
        logits: [N, outputs].

    Returns:
        what `scores_of_sums` returns; for classes also f1_macro, per_class and confusion (rows are the truth); for
        labels also per_class; for a binary task in which both classes occur also roc_auc.
    """
    metrics: dict[str, Any] = mean_scores(task, truth, logits)
    if task is Task.REGRESSION:
        return metrics
    answers = heads.answers(task, heads.probabilities(task, logits))
    classes = np.arange(len(labels))
    precision, recall, f1, images = precision_recall_fscore_support(
        truth.astype(np.intp), answers.astype(np.intp), labels=classes, average=None, zero_division=0.0
    )
    metrics["per_class"] = [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
        for label, p, r, f, n in zip(labels, precision, recall, f1, images, strict=True)
    ]
    if task is Task.MULTILABEL:
        return metrics
    metrics["f1_macro"] = float(f1.mean())
    metrics["confusion"] = confusion_matrix(truth, answers, labels=classes).tolist()
    if task is Task.BINARY and len(np.unique(truth)) == 2:
        metrics["roc_auc"] = float(roc_auc_score(truth, logits[:, 0]))
    return metrics


def mean_scores(task: Task, truth: Truth, logits: Logits) -> dict[str, float]:
    """Return the scores of all images by name, without tables. The `r2` of equal numbers is 0."""
    found = scores_of_sums(task, image_statistics(task, truth, logits).sum(axis=0))
    scores = {name: float(value) for name, value in found.items()}
    if np.isnan(scores.get("r2", 0.0)):
        scores["r2"] = 0.0
    return scores


def evaluate_folds(
    task: Task,
    labels: Sequence[str],
    truth: Truth,
    groups: Indices,
    logits: Logits,
    folds: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the scores of all folds together, with their intervals, from out-of-fold logits.

    Args:
        task: what is predicted.
        labels: class names in the order of the outputs; none for a regression.
        truth: as `training.data.targets` has it.
        groups: group of each image, int [N].
        logits: [repeats, N, outputs].
        folds: scores of every fold of every repeat.

    Returns:
        what `evaluate` returns over all repeats together, so that the confusion matrix is summed over repeats. Each
        score but the loss also has its standard deviation over folds (`…_sd`) and its interval (`…_ci95`). Where images
        belong together, there are also the number of groups and the intervals over groups (`…_ci95_groups`). More
        repeats narrow no interval, since they add no images.
    """
    repeats, count, _ = logits.shape
    metrics = evaluate(task, labels, np.concatenate([truth] * repeats), logits.reshape(repeats * count, -1))
    for row in metrics.get("per_class", []):
        row["images"] //= repeats
    of_images = mean_image_statistics(task, truth, logits)
    metrics |= _both_intervals(task, metrics, of_images, groups)
    for name in _with_interval(task):
        metrics[f"{name}_sd"] = float(np.std([fold[name] for fold in folds], ddof=1))
    metrics["interval"] = _INTERVALS.get(task, INTERVAL)
    if (metrics.get("groups") or count) < FEW:
        metrics["interval"] = metrics["interval"].replace("bootstrap", f"bootstrap, widened for fewer than {FEW}")
    return metrics


def scores_with_intervals(task: Task, truth: Truth, groups: Indices, logits: Logits) -> dict[str, Any]:
    """Return the scores of out-of-fold logits float32 [repeats, N, outputs], with intervals as in `evaluate_folds`."""
    metrics: dict[str, Any] = mean_scores(
        task, np.concatenate([truth] * len(logits)), logits.reshape(-1, logits.shape[2])
    )
    return metrics | _both_intervals(task, metrics, mean_image_statistics(task, truth, logits), groups)


def evaluate_held_out(
    task: Task, labels: Sequence[str], truth: Truth, groups: Indices, logits: Logits
) -> dict[str, Any]:
    """Return the scores of logits [N, outputs] on test images that no fit was trained on.

    These are the scores of `evaluate` and the number of images. With at least two images, the intervals of
    `evaluate_folds` are added.
    """
    metrics = evaluate(task, labels, truth, logits) | {"images": len(truth)}
    if len(truth) > 1:
        metrics |= _both_intervals(task, metrics, image_statistics(task, truth, logits), groups)
    return metrics


def _both_intervals(task: Task, metrics: dict[str, Any], of_images: Float64, groups: Indices) -> dict[str, Any]:
    """Return the intervals of scores over images and, if images belong together, over groups, with their number."""
    count = len(groups)
    both: dict[str, Any] = {**_intervals(task, metrics, of_images, np.arange(count), "ci95")}
    found = len(np.unique(groups))
    if 1 < found < count:
        both |= {"groups": found, **_intervals(task, metrics, of_images, groups, "ci95_groups")}
    return both


def _with_interval(task: Task) -> list[str]:
    """Return the names of the scores that have an interval and a standard deviation."""
    return {Task.REGRESSION: ["rmse", "mae", "r2"], Task.MULTILABEL: ["f1_macro", "f1_micro", "accuracy"]}.get(
        task, ["accuracy"]
    )


def _intervals(
    task: Task, metrics: dict[str, Any], of_images: Float64, groups: Indices, suffix: str
) -> dict[str, list[float]]:
    """Return the interval of each score over groups: by a formula for shares of images, else by the bootstrap."""
    names = _with_interval(task)
    found: dict[str, tuple[float, float]] = {}
    blocks = len(np.unique(groups))
    if set(names) - set(_IS_SHARE):
        found = resampling.bootstrap_intervals(of_images, groups, lambda sums: scores_of_sums(task, sums))
        if blocks < FEW:
            found = {name: _widened(name, metrics[name], found[name], blocks) for name in names}
    for name in set(names) & set(_IS_SHARE):
        is_alone = blocks == len(groups)
        found[name] = wilson(metrics[name], len(groups)) if is_alone else wilson_over_groups(of_images[:, 1], groups)
    return {f"{name}_{suffix}": list(found[name]) for name in names}


FEW = 10
"""Below this number of images, or of groups, bootstrap intervals are widened to those of a formula. All draws of two
images with equal errors give the same score, which would be an interval without width."""


def _widened(name: str, score: float, found: tuple[float, float], blocks: int) -> tuple[float, float]:
    """Return an interval that includes the bootstrap interval and that of a formula for so many independent images.

    An error is estimated like the standard deviation of normal errors, so that chi-square bounds it. r2 follows from
    the error. F1 counts like a share.
    """
    low, high = np.sqrt(blocks / stats.chi2.ppf([0.975, 0.025], blocks))  # factors of an error
    bounds = {
        "rmse": (score * low, score * high),
        "mae": (score * low, score * high),
        "r2": (1 - (1 - score) * high**2, 1 - (1 - score) * low**2),
    }.get(name)
    if bounds is None:
        bounds = wilson(score, blocks)
    return min(found[0], float(bounds[0])), max(found[1], float(bounds[1]))


def without_tables(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the single numbers of `evaluate`, without tables such as the confusion matrix."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def median_epoch(epochs: Sequence[int]) -> int:
    """Return the median of the folds' best epochs. For an even number of folds it is the larger of the middle two."""
    return int(np.sort(np.asarray(epochs))[len(epochs) // 2])
