"""Compares a model with the constant answer, which ignores the image. Loads no network, no Keras.

The constant answer of classes is the share of each class among the images, and of labels the share of each label. That
of numbers is their mean. A model that is no better has learned nothing that an image shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from artifacts.bundle import Logits
from inference import heads
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Float64, Truth
from training.statistics import resampling
from training.statistics.evaluation import surprise


def compare_with_constant_answer(
    task: Task, truth: Truth, groups: Indices, logits: Logits, r2: float
) -> dict[str, Any]:
    """Return how much better than the constant answer a model is, and whether it `is_better`, as JSON.

    Classes and labels are compared by log-loss and by balanced accuracy, the mean recall of the classes (of labels, the
    mean recall of having a label and of not having it). The intervals are paired bootstrap intervals over images, or
    over groups where images belong together. A model is better if one of the two intervals lies
    wholly on the better side of 0. A model of numbers is better if its R² is positive.

    Args:
        task: what is predicted.
        truth: as `training.data.targets` has it.
        groups: group of each image, int [N].
        logits: out-of-fold logits [repeats, N, outputs].
        r2: of a regression; other tasks have none.
    """
    if task is Task.REGRESSION:
        return {"r2": r2, "is_better": r2 > 0}
    blocks = resampling.blocks(groups)
    counts = _labels(truth, logits, blocks) if task is Task.MULTILABEL else _classes(task, truth, logits, blocks)
    count = len(counts.losses)
    drawn_loss, drawn_accuracy = [], []
    for times in resampling.draws(count):
        drawn_loss.append(counts.loss_difference(times))
        drawn_accuracy.append(counts.accuracy_difference(times))
    all_once = np.ones((1, count))
    loss_interval = resampling.bootstrap_interval(np.concatenate(drawn_loss), count)
    accuracy_interval = resampling.bootstrap_interval(np.concatenate(drawn_accuracy), count)
    return {
        "loss_difference": float(counts.loss_difference(all_once)[0]),
        "loss_difference_ci95": list(loss_interval),
        "balanced_accuracy": float(counts.balanced_accuracy(all_once)[0]),
        "balanced_accuracy_difference": float(counts.accuracy_difference(all_once)[0]),
        "balanced_accuracy_difference_ci95": list(accuracy_interval),
        "is_better": bool(loss_interval[1] < 0 or accuracy_interval[0] > 0),
    }


@dataclass(frozen=True)
class _BlockCounts:
    """Sums over the images of each block, from which the scores of a draw follow.

    Attributes:
        losses: float64 [B], log-loss of the model minus that of the constant answer.
        images: float64 [B], number of images.
        cases: float64 [B, K, S]: how often each class occurs (S is 1); or how often each label is there and is not (2).
        hits: float64 [B, K, S], how many of them the model gets right.
    """

    losses: Float64
    images: Float64
    cases: Float64
    hits: Float64

    def loss_difference(self, times: Float64) -> Float64:
        """Return the difference of the log-loss, float64 [n], if blocks count `times` as often, float64 [n, B]."""
        return np.asarray((times @ self.losses) / (times @ self.images))

    def balanced_accuracy(self, times: Float64) -> Float64:
        """Return the mean recall, float64 [n]; NaN where nothing can be confused."""
        cases, hits = self._drawn(times)
        occurs = cases > 0
        recalls = np.divide(hits, cases, out=np.zeros_like(cases), where=occurs)
        if cases.shape[2] == 1:  # one of several classes
            kinds = occurs.sum(axis=(1, 2))
            means, can_be_wrong = recalls.sum(axis=(1, 2)) / np.maximum(kinds, 1), kinds > 1
        else:  # labels that some images have and others have not
            varies = occurs.all(axis=2).astype(np.float64)
            kinds = varies.sum(axis=1)
            means, can_be_wrong = (recalls.mean(axis=2) * varies).sum(axis=1) / np.maximum(kinds, 1), kinds > 0
        return np.asarray(np.where(can_be_wrong, means, np.nan), dtype=np.float64)

    def accuracy_difference(self, times: Float64) -> Float64:
        """Return the balanced accuracy minus that of the constant answer, which has a recall of 1 in one case."""
        cases, _ = self._drawn(times)
        kinds = (cases > 0).sum(axis=(1, 2)) if cases.shape[2] == 1 else np.full(len(times), 2)
        return np.asarray(self.balanced_accuracy(times) - 1 / np.maximum(kinds, 1), dtype=np.float64)

    def _drawn(self, times: Float64) -> tuple[Float64, Float64]:
        shape = (len(times), *self.cases.shape[1:])
        cases, hits = ((times @ sums.reshape(len(sums), -1)).reshape(shape) for sums in (self.cases, self.hits))
        return cases, hits


def _classes(task: Task, truth: Truth, logits: Logits, blocks: Indices) -> _BlockCounts:
    """Return the counts of a task with one class for each image."""
    classes = max(2, logits.shape[2])
    size = int(blocks.max()) + 1
    shares = np.bincount(truth, minlength=classes) / len(truth)
    constant = surprise(shares[truth])
    ones, losses, right = np.ones(len(truth)), np.zeros(len(truth)), np.zeros(len(truth))
    for once in logits:
        probabilities = heads.probabilities(task, once)
        losses += (surprise(probabilities[np.arange(len(truth)), truth]) - constant) / len(logits)
        right += (heads.answers(task, probabilities) == truth) / len(logits)
    places = blocks * classes + truth
    cases, hits = (_sums(places, one, size * classes).reshape(size, classes, 1) for one in (ones, right))
    return _BlockCounts(_sums(blocks, losses, size), _sums(blocks, ones, size), cases, hits)


def _labels(truth: Truth, logits: Logits, blocks: Indices) -> _BlockCounts:
    """Return the counts of a task with any number of labels for each image."""
    has = truth > 0.5
    size = int(blocks.max()) + 1
    shares = has.mean(axis=0)
    constant = surprise(np.where(has, shares, 1 - shares)).mean(axis=1)
    losses, right = np.zeros(len(truth)), np.zeros(has.shape)
    for once in logits:
        probabilities = heads.probabilities(Task.MULTILABEL, once)
        losses += (surprise(np.where(has, probabilities, 1 - probabilities)).mean(axis=1) - constant) / len(logits)
        right += (heads.answers(Task.MULTILABEL, probabilities) == has) / len(logits)
    cases, hits = np.zeros((size, has.shape[1], 2)), np.zeros((size, has.shape[1], 2))
    for number, is_case in enumerate((has, ~has)):
        np.add.at(cases[..., number], blocks, is_case.astype(float))
        np.add.at(hits[..., number], blocks, right * is_case)
    return _BlockCounts(_sums(blocks, losses, size), _sums(blocks, np.ones(len(truth)), size), cases, hits)


def _sums(places: Indices, values: Float64, size: int) -> Float64:
    """Return float64 [size], the sum of the values at each place."""
    return np.asarray(np.bincount(places, values, minlength=size), dtype=np.float64)
