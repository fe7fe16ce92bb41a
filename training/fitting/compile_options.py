"""What a Keras model is compiled with: its optimizer, loss and metrics, and the weights of classes."""

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
    """Return the Keras optimizer that a recipe names, with Keras' defaults for what the recipe does not say.

    `rate` replaces the recipe's learning rate: a number or a schedule.
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
    """Return the Keras loss of logits."""
    match task:
        case Task.BINARY | Task.MULTILABEL:
            return keras.losses.BinaryCrossentropy(from_logits=True)  # the mean over labels
        case Task.MULTICLASS:
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        case Task.REGRESSION:
            return keras.losses.MeanSquaredError()


def accuracy_metrics(task: Task) -> list[Any]:
    """Return the Keras metric named `accuracy` of logits, if the task has one."""
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
    right = keras.ops.equal(logits > 0, truth > 0.5)
    return keras.ops.cast(keras.ops.all(right, axis=-1), "float32")


def recipe_loss(recipe: FromScratchRecipe, task: Task) -> Any:
    """Return the Keras loss of logits that a recipe asks for."""
    if recipe.network.kind is NetworkKind.PERCEPTRON:
        return PerceptronLoss(recipe.network.threshold, wants_slope=recipe.loss is Loss.MEAN_SQUARED_ERROR)
    return SigmoidSquaredError() if recipe.loss is Loss.MEAN_SQUARED_ERROR else task_loss(task)


class PerceptronLoss(keras.losses.Loss):  # type: ignore[misc]
    """What a perceptron makes small: one step of plain gradient descent on one image is the delta rule.

    That is W += rate * (target - output) * x and b += rate * (target - output), since the gradient by a logit is
    output - target. With a step it is the perceptron criterion (Rosenblatt 1958; Bishop 2006, "Pattern Recognition and
    Machine Learning", 4.1.7), with a sigmoid the cross-entropy, and without a threshold half the squared error (Widrow
    & Hoff 1960). `wants_slope` takes half the squared error of the sigmoid, whose step has its slope as another factor.
    Of several outputs it is the sum.
    """

    def __init__(self, threshold: Threshold | None, *, wants_slope: bool = False) -> None:
        super().__init__(reduction="sum_over_batch_size", name="delta_rule")
        self._threshold = threshold
        self._wants_slope = wants_slope

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N], for classes [N] or values [N, outputs], and logits [N, outputs]."""
        wanted = _wanted(truth, logits)
        match self._threshold:
            case Threshold.STEP:
                fires = keras.ops.cast(logits >= 0, logits.dtype)
                each = (fires - wanted) * logits
            case Threshold.SIGMOID if not self._wants_slope:
                each = keras.ops.softplus(logits) - wanted * logits
            case Threshold.SIGMOID:
                each = keras.ops.square(keras.ops.sigmoid(logits) - wanted) / 2
            case None:
                each = keras.ops.square(logits - wanted) / 2
        return keras.ops.sum(each, axis=-1)


class SigmoidSquaredError(keras.losses.Loss):  # type: ignore[misc]
    """The mean over outputs of (target - sigmoid(logit))²."""

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N], for values [N] or [N, outputs] and logits [N, outputs]."""
        return keras.ops.mean(keras.ops.square(keras.ops.sigmoid(logits) - _wanted(truth, logits)), axis=-1)


def _wanted(truth: Any, logits: Any) -> Any:
    """Return what each output should be, [N, outputs]: classes [N] as ones among zeros, all else as it is."""
    outputs = logits.shape[-1]
    if len(truth.shape) == 1 and outputs > 1:
        return keras.ops.one_hot(keras.ops.cast(truth, "int32"), outputs, dtype=logits.dtype)
    return keras.ops.reshape(keras.ops.cast(truth, logits.dtype), keras.ops.shape(logits))
