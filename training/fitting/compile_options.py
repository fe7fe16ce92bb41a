"""Builds the optimizers, losses, metrics and class weights with which Keras models are compiled and fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from recipes.filled import FromScratchRecipe
from recipes.layers import NetworkKind, Threshold
from recipes.recipe import ClassWeights, Loss, OptimizerName, OptimizerRecipe, Task
from training.data.targets import Truth

MOMENTUM = 0.9


def build_optimizer(recipe: OptimizerRecipe, rate: Any = None, **options: Any) -> Any:
    """Return the Keras optimizer that a recipe names. All other options have Keras' defaults.

    Args:
        recipe: names the optimizer and gives its learning rate.
        rate: replaces the recipe's learning rate; a number or a Keras schedule.
        options: further arguments of the Keras optimizer.
    """
    rate = recipe.learning_rate if rate is None else rate
    match recipe.name:
        case OptimizerName.SGD:
            return keras.optimizers.SGD(rate, **options)
        case OptimizerName.MOMENTUM:
            return keras.optimizers.SGD(rate, momentum=MOMENTUM, **options)
        case OptimizerName.NESTEROV:
            return keras.optimizers.SGD(rate, momentum=MOMENTUM, nesterov=True, **options)
        case OptimizerName.ADAGRAD:
            return keras.optimizers.Adagrad(rate, **options)
        case OptimizerName.RMSPROP:
            return keras.optimizers.RMSprop(rate, **options)
        case OptimizerName.ADAM:
            return keras.optimizers.Adam(rate, **options)
        case OptimizerName.ADAMW:
            return keras.optimizers.AdamW(rate, **options)


def class_weights(targets: Truth, choice: ClassWeights) -> Mapping[int, float] | None:
    """Return the weight of each class, N / (classes * images of the class), or None for equal weights.

    The formula is that of scikit-learn's `class_weight="balanced"` (King & Zeng 2001).
    """
    if choice is ClassWeights.NONE:
        return None
    classes, counts = np.unique(targets, return_counts=True)
    weights = len(targets) / (len(classes) * counts)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


def task_loss(task: Task) -> Any:
    """Return the Keras loss of a task; it takes logits [N, outputs]."""
    match task:
        case Task.BINARY | Task.MULTILABEL:
            return keras.losses.BinaryCrossentropy(from_logits=True)  # its mean over labels
        case Task.MULTICLASS:
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        case Task.REGRESSION:
            return keras.losses.MeanSquaredError()


def accuracy_metrics(task: Task) -> list[Any]:
    """Return a list with the Keras metric named `accuracy`, which takes logits; an empty list for a regression."""
    match task:
        case Task.BINARY:
            return [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)]  # of a logit
        case Task.MULTICLASS:
            return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        case Task.MULTILABEL:
            return [keras.metrics.MeanMetricWrapper(_all_labels_right, name="accuracy")]
        case Task.REGRESSION:
            return []


def _all_labels_right(truth: Any, logits: Any) -> Any:
    is_right = keras.ops.equal(logits > 0, truth > 0.5)
    return keras.ops.cast(keras.ops.all(is_right, axis=-1), "float32")


def recipe_loss(recipe: FromScratchRecipe, task: Task) -> Any:
    """Return the Keras loss that a recipe defines for a network from scratch. It takes logits [N, outputs]."""
    if recipe.network.kind is NetworkKind.PERCEPTRON:
        return PerceptronLoss(recipe.network.threshold, squared_error=recipe.loss is Loss.MEAN_SQUARED_ERROR)
    return SigmoidSquaredError() if recipe.loss is Loss.MEAN_SQUARED_ERROR else task_loss(task)


class PerceptronLoss(keras.losses.Loss):  # type: ignore[misc]
    """A loss whose gradient step on one image is the delta rule of a perceptron.

    The delta rule is W += rate * (target - output) * x and b += rate * (target - output). It follows from a loss whose
    gradient by a logit is output - target. That loss depends on the threshold:

    - step: the perceptron criterion (Rosenblatt 1958; Bishop 2006, "Pattern Recognition and Machine Learning", 4.1.7);
    - sigmoid: the cross-entropy;
    - none: half the squared error (Widrow & Hoff 1960).

    With `squared_error`, a sigmoid uses half the squared error too, and the slope of the sigmoid becomes another factor
    of the step. The losses of several outputs are added up.
    """

    def __init__(self, threshold: Threshold | None, *, squared_error: bool = False) -> None:
        super().__init__(reduction="sum_over_batch_size", name="delta_rule")
        self._threshold = threshold
        self._squared_error = squared_error

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N]. `truth` has classes [N] or values [N, outputs]; logits [N, outputs]."""
        target = _targets_like(logits, truth)
        match self._threshold:
            case Threshold.STEP:
                fires = keras.ops.cast(logits >= 0, logits.dtype)
                loss = (fires - target) * logits
            case Threshold.SIGMOID if not self._squared_error:
                loss = keras.ops.softplus(logits) - target * logits
            case Threshold.SIGMOID:
                loss = keras.ops.square(keras.ops.sigmoid(logits) - target) / 2
            case None:
                loss = keras.ops.square(logits - target) / 2
        return keras.ops.sum(loss, axis=-1)


class SigmoidSquaredError(keras.losses.Loss):  # type: ignore[misc]
    """The squared error of sigmoid outputs: (target - sigmoid(logit))², as the mean over the outputs."""

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N]. `truth` has values [N] or [N, outputs]; logits [N, outputs]."""
        return keras.ops.mean(keras.ops.square(keras.ops.sigmoid(logits) - _targets_like(logits, truth)), axis=-1)


def _targets_like(logits: Any, truth: Any) -> Any:
    """Return the targets in the shape of the logits, [N, outputs]. Classes [N] become one-hot vectors."""
    outputs = logits.shape[-1]
    if len(truth.shape) == 1 and outputs > 1:
        return keras.ops.one_hot(keras.ops.cast(truth, "int32"), outputs, dtype=logits.dtype)
    return keras.ops.reshape(keras.ops.cast(truth, logits.dtype), keras.ops.shape(logits))
