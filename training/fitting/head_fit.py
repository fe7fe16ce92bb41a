"""Fits a head on features: standardised inside the fold, stopped early, its best weights restored.

Standardising matters: features of a randomly initialised deep backbone are as small as 1e-10. It is folded into the
first dense layer afterwards, as an offset and larger weights, so that what is served takes raw features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from artifacts.bundle import Dense
from artifacts.features import Features
from recipes.layers import Activation
from recipes.recipe import ClassWeights, HeadRecipe, OptimizerName, OptimizerRecipe, Recipe, Task
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting.training_loop import Passage, Rows, Trained
from training.fitting.training_loop import train as epoch_by_epoch

MOMENTUM = 0.9

# A step of a head takes a fraction of what it costs to leave the compiled graph after each.
_STEPS_PER_EXECUTION = 64


@dataclass(frozen=True)
class Fit:
    """A fitted head.

    Attributes:
        layers: the head on raw features, standardisation folded in.
        scaler: the standardisation alone.
        unit: the standardisation of the numbers that a regression learns; None for other tasks.
        weights: the weights of the Keras head on standardised features, in its order.
        trained: how it went. A regression has no accuracy, and its losses are of standardised numbers: 1 is to answer
            the mean always.
    """

    layers: tuple[Dense, ...]
    scaler: Scaler
    unit: Scaler | None
    weights: list[npt.NDArray[np.float32]]
    trained: Trained


def fit(
    recipe: Recipe,
    task: Task,
    outputs: int,
    features: Features,
    targets: Truth,
    train: Indices,
    validation: Indices,
    *,
    epochs: int,
    seed: int,
    passage: Passage,
) -> Fit:
    """Fit the recipe's head.

    Args:
        recipe: head, optimizer, batch size, class weights and early stopping.
        task: what is predicted.
        outputs: number of logits: one for binary and regression, else one per class or label.
        features: float32 [N, D], raw.
        targets: what is to be learned of each row, as `training.data.targets` has it.
        train: rows to learn from.
        validation: rows that early stopping watches; if empty, every epoch is trained.
        epochs: epochs to train at most.
        seed: the same seed gives the same head on the same machine.
        passage: what to go on from, and who hears how it goes.

    Raises:
        TrainingDiverged: the loss is not a number any more.
    """
    keras.utils.set_random_seed(seed)
    scaler = Scaler.of(features, train)
    unit = Scaler.of(targets, train) if task is Task.REGRESSION else None
    learned = unit(targets) if unit else targets
    model = head(recipe.known_head, features.shape[1], outputs)
    batches = Rows(features, learned, train, recipe.batch_size, seed, scaler)
    model.compile(
        optimizer=optimizer(recipe.optimizer),
        loss=loss(task),
        metrics=accuracy(task),
        jit_compile=False,  # compiling takes longer than it saves on a network this small
        steps_per_execution=min(len(batches), _STEPS_PER_EXECUTION),
    )
    trained = epoch_by_epoch(
        model,
        batches,
        (scaler(features[validation]), learned[validation]) if len(validation) else None,
        epochs=epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(targets[train], recipe.class_weights),
        passage=passage,
        validation_batch_size=1024,
    )
    weights = model.get_weights()
    return Fit(dense_layers(weights, recipe.known_head.activation, scaler, unit), scaler, unit, weights, trained)


@dataclass(frozen=True)
class Scaler:
    """Standardises columns: `(x - mean) * scale`, float64 [D] each; a column that never changes becomes zero."""

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def of(cls, features: npt.NDArray[Any], rows: Indices) -> Scaler:
        """Return the scaler that gives the rows, float32 or float64 [N, D], mean zero and variance one."""
        mean = np.zeros(features.shape[1])
        square = np.zeros(features.shape[1])
        chunks = np.array_split(rows, -(-len(rows) // 4096))
        for chunk in chunks:
            mean += features[chunk].sum(axis=0, dtype=np.float64) / len(rows)
        for chunk in chunks:
            square += np.square(features[chunk] - mean).sum(axis=0) / len(rows)
        deviation = np.sqrt(square)
        # a spread below the last bits of the mean is rounding, not a feature
        varies = deviation > 8 * np.finfo(features.dtype).eps * np.abs(mean)
        return cls(mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies))

    def __call__(self, features: npt.NDArray[Any]) -> Features:
        """Return float32 [n, D]."""
        return ((features - self.mean) * self.scale).astype(np.float32)

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """What a step of one is in the columns' own unit; zero for a column that never changes."""
        return np.divide(1.0, self.scale, out=np.zeros_like(self.scale), where=self.scale > 0)

    def undone(self, standardised: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 [n, D] in the columns' own unit."""
        return (standardised * self.deviation + self.mean).astype(np.float32)

    def fold_into(self, layer: Dense) -> Dense:
        """Return the layer that does on raw features what `layer` does on standardised ones."""
        kernel = self.scale[:, None] * layer.kernel.astype(np.float64)
        offset = self.mean.astype(np.float32)
        bias = layer.bias.astype(np.float64) - (self.mean - offset) @ kernel
        return Dense(kernel.astype(np.float32), bias.astype(np.float32), layer.activation, offset)

    def undo_after(self, layer: Dense) -> Dense:
        """Return the layer that gives in the columns' own unit what a linear `layer` gives standardised."""
        kernel = layer.kernel * self.deviation
        bias = layer.bias * self.deviation + self.mean
        return replace(layer, kernel=kernel.astype(np.float32), bias=bias.astype(np.float32))


def head(recipe: HeadRecipe, inputs: int, outputs: int) -> Any:
    """Return the Keras head from features [N, inputs] to logits [N, outputs]."""
    penalty = keras.regularizers.L2(recipe.l2) if recipe.l2 else None
    layers: list[Any] = [keras.Input((inputs,))]
    for units in (*recipe.hidden, None):
        if recipe.dropout:
            layers.append(keras.layers.Dropout(recipe.dropout))
        activation = recipe.activation.value if units else "linear"
        layers.append(keras.layers.Dense(units or outputs, activation=activation, kernel_regularizer=penalty))
    return keras.Sequential(layers)


def optimizer(recipe: OptimizerRecipe, rate: Any = None, **options: Any) -> Any:
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


def loss(task: Task) -> Any:
    """Return the Keras loss of logits."""
    match task:
        case Task.BINARY | Task.MULTILABEL:
            return keras.losses.BinaryCrossentropy(from_logits=True)  # the mean over labels
        case Task.MULTICLASS:
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        case Task.REGRESSION:
            return keras.losses.MeanSquaredError()


def accuracy(task: Task) -> list[Any]:
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


def dense_layers(
    weights: Sequence[npt.NDArray[np.float32]], activation: Activation, scaler: Scaler, unit: Scaler | None
) -> tuple[Dense, ...]:
    """Return a Keras head on standardised features as layers on raw ones, with outputs in the targets' own unit.

    Args:
        weights: kernel and bias of each layer, as the head's `get_weights` returns them.
        activation: of all layers but the last.
        scaler: how the features were standardised.
        unit: how the targets were, if they were.
    """
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    activations = [activation] * (len(pairs) - 1) + [Activation.LINEAR]
    layers = [Dense(kernel, bias, after) for (kernel, bias), after in zip(pairs, activations, strict=True)]
    layers[0] = scaler.fold_into(layers[0])
    if unit is not None:
        layers[-1] = unit.undo_after(layers[-1])
    return tuple(layers)
