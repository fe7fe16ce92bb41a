"""The numbers that are printed: pooled over the folds, from logits of images that the fold did not train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support, roc_auc_score

from artifacts.bundle import Float32
from artifacts.recipe import Task
from inference import heads
from training.split import Indices

INTERVAL = "Wilson, over images; not over retraining"


def wilson(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of a share of `count` trials (Wilson 1927), by default of 95 %."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # at shares of 0 and 1 the bounds are the share itself, up to rounding
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


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
    probabilities = heads.probabilities(task, logits)
    answers = heads.answers(task, probabilities)
    classes = np.arange(len(labels))
    precision, recall, f1, images = precision_recall_fscore_support(truth, answers, labels=classes, zero_division=0.0)
    metrics = {
        "accuracy": float((answers == truth).mean()),
        "loss": float(log_loss(truth, probabilities, labels=classes)),
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


def pooled(
    task: Task, labels: Sequence[str], truth: Indices, logits: Float32, fold_accuracies: Sequence[float]
) -> dict[str, Any]:
    """Measure out-of-fold logits as a whole.

    Args:
        task: binary or multiclass.
        labels: class names in the order of the outputs.
        truth: class of each image, int [N].
        logits: float32 [repeats, N, outputs].
        fold_accuracies: accuracy of every fold of every repeat.

    Returns:
        what `score` returns over all repeats together (so that counts are summed over repeats), with the standard
        deviation of the folds' accuracies and the interval of the accuracy. More repeats do not narrow the interval:
        they add no images.
    """
    repeats, count, _ = logits.shape
    metrics = score(task, labels, np.tile(truth, repeats), logits.reshape(repeats * count, -1))
    metrics["accuracy_sd"] = float(np.std(fold_accuracies, ddof=1))
    metrics["accuracy_ci95"] = list(wilson(metrics["accuracy"], count))
    metrics["interval"] = INTERVAL
    return metrics


def brief(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of `score` that fit one line: without tables."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def median_epoch(epochs: Sequence[int]) -> int:
    """Return the median of the folds' best epochs, the later one of the middle pair."""
    return int(np.sort(np.asarray(epochs))[len(epochs) // 2])
