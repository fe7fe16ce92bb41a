"""The numbers that are printed: pooled over the folds, from logits of images that the fold did not train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support, roc_auc_score

from artifacts.bundle import Float32
from artifacts.recipe import Task
from inference import heads
from training.split import Indices

INTERVAL = "Wilson, over images; not over retraining"


def wilson(share: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of a share of `count` trials (Wilson 1927), by default of 95 %."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # at shares of 0 and 1 the bounds are the share itself, up to rounding
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def wilson_over_groups(correct: npt.NDArray[np.float64], groups: Indices) -> tuple[float, float]:
    """Return the interval of a share of images that come in groups: one person's pictures stand or fall together.

    Wilson's interval for as many independent images as would vary as much as these do between groups, by the variance
    of a share in a cluster sample (Cochran 1977, "Sampling Techniques", 3.12).

    Args:
        correct: share of right answers for each image, float64 [N] from 0 to 1.
        groups: group of each image, int [N]; two groups or more.
    """
    share = float(correct.mean())
    _, place = np.unique(groups, return_inverse=True)
    sizes = np.bincount(place)
    deviations = np.bincount(place, weights=correct) - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float(np.square(deviations).sum()) / len(correct) ** 2
    if share in (0.0, 1.0):
        return wilson(share, len(sizes))  # there is no variance to go by: count each group once
    effective = share * (1 - share) / variance if variance > 0 else math.inf
    return wilson(share, min(effective, len(correct)))


def score(task: Task, labels: Sequence[str], truth: Indices, logits: Float32) -> dict[str, Any]:
    """Measure logits against the truth.

    Args:
        task: binary or multiclass.
        labels: class names in the order of the outputs.
        truth: class of each image, int [N].
        logits: float32 [N, outputs].

    Returns:
        accuracy, loss (mean negative log-likelihood), f1_macro, per_class and confusion (rows are the truth);
        roc_auc too for a binary task in which both classes occur.
    """
    answers = heads.answers(task, heads.probabilities(task, logits))
    classes = np.arange(len(labels))
    precision, recall, f1, images = precision_recall_fscore_support(truth, answers, labels=classes, zero_division=0.0)
    metrics: dict[str, Any] = {
        **loss_and_accuracy(task, truth, logits),
        "f1_macro": float(f1.mean()),
        "per_class": [
            {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for label, p, r, f, n in zip(labels, precision, recall, f1, images, strict=True)
        ],
        "confusion": confusion_matrix(truth, answers, labels=classes).tolist(),
    }
    if task is Task.BINARY and len(np.unique(truth)) == 2:
        metrics["roc_auc"] = float(roc_auc_score(truth, logits[:, 0]))
    return metrics


def loss_and_accuracy(task: Task, truth: Indices, logits: Float32) -> dict[str, float]:
    """Return the mean negative log-likelihood and the accuracy of logits float32 [N, outputs] alone."""
    probabilities = heads.probabilities(task, logits)
    return {
        "accuracy": float((heads.answers(task, probabilities) == truth).mean()),
        "loss": float(log_loss(truth, probabilities, labels=np.arange(probabilities.shape[1]))),
    }


def pooled(
    task: Task,
    labels: Sequence[str],
    truth: Indices,
    groups: Indices,
    logits: Float32,
    fold_accuracies: Sequence[float],
) -> dict[str, Any]:
    """Measure out-of-fold logits as a whole.

    Args:
        task: binary or multiclass.
        labels: class names in the order of the outputs.
        truth: class of each image, int [N].
        groups: group of each image, int [N].
        logits: float32 [repeats, N, outputs].
        fold_accuracies: accuracy of every fold of every repeat.

    Returns:
        what `score` returns over all repeats together (so that the confusion matrix is summed over repeats), with the
        standard deviation of the folds' accuracies and the interval of the accuracy; where images belong together, with
        the number of groups and the interval over them, too. More repeats narrow no interval: they add no images.
    """
    repeats, count, _ = logits.shape
    metrics = score(task, labels, np.tile(truth, repeats), logits.reshape(repeats * count, -1))
    for row in metrics["per_class"]:
        row["images"] //= repeats
    metrics["accuracy_sd"] = float(np.std(fold_accuracies, ddof=1))
    metrics["accuracy_ci95"] = list(wilson(metrics["accuracy"], count))
    metrics["interval"] = INTERVAL
    found = len(np.unique(groups))
    if 1 < found < count:
        answers = heads.answers(task, heads.probabilities(task, logits.reshape(repeats * count, -1)))
        correct = (answers.reshape(repeats, count) == truth).mean(axis=0)
        metrics["groups"] = found
        metrics["accuracy_ci95_groups"] = list(wilson_over_groups(correct, groups))
    return metrics


def brief(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of `score` that fit one line: without tables."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def median_epoch(epochs: Sequence[int]) -> int:
    """Return the median of the folds' best epochs, the later one of the middle pair."""
    return int(np.sort(np.asarray(epochs))[len(epochs) // 2])
