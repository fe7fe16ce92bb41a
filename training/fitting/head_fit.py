"""Fits a head on features with Keras. The features are standardised by the training rows of the fold.

Standardisation is needed because the features of a randomly initialised deep backbone are as small as 1e-10. After the
fit, the standardisation is merged into the first dense layer, as an offset and larger weights. So the served head takes
features that are not standardised. `training.fitting.linear_heads` fits linear heads of many folds faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from artifacts.bundle import Dense, Unit
from artifacts.features import Features
from recipes.filled import HeadedRecipe
from recipes.layers import Activation
from recipes.recipe import HeadRecipe, Task
from training.data.split import Indices
from training.fitting.compile_options import accuracy_metrics, build_optimizer, class_weights, task_loss
from training.fitting.fit_task import FitData, FitTask
from training.fitting.training_loop import LEARNING_RATE, FitSummary, Rows
from training.fitting.training_loop import train as epoch_by_epoch

# A step of a head takes much less time than leaving the compiled graph, so that Keras leaves it after so many steps.
_STEPS_PER_EXECUTION = 64


@dataclass(frozen=True)
class FittedHead:
    """A fitted head, in the form for serving (`layers`) and in the form of Keras (`weights`).

    Attributes:
        layers: the head that takes features without standardisation, because it is merged into the layers.
        scaler: the standardisation of the features.
        target_scaler: the standardisation of the target numbers of a regression; None for other tasks.
        weights: the weights of the Keras head, which takes standardised features, in the order of `get_weights`.
        trained: history, best epoch and the reason why training ended. A regression has no accuracy. Its loss is
            measured on standardised numbers, so that a head that always predicts the mean has loss 1.
    """

    layers: tuple[Dense, ...]
    scaler: Scaler
    target_scaler: Scaler | None
    weights: list[npt.NDArray[np.float32]]
    trained: FitSummary


def what_to_lower(learning_rate: float, l2: float) -> str:
    """Return the recipe fields that can make a head diverge, as an error message names them.

    A step shrinks a weight by the share `2 * learning_rate * l2`, and momentum multiplies that by up to ten. From a
    share of 2 on, weights grow.
    """
    can_penalty_diverge = 2 * 10 * learning_rate * l2 >= 2
    return f"{LEARNING_RATE} or head.l2" if can_penalty_diverge else LEARNING_RATE


def fit_head(recipe: HeadedRecipe, data: FitData, fit: FitTask) -> FittedHead:
    """Fit the recipe's head on features.

    Args:
        recipe: head, optimizer, batch size, class weights and early stopping.
        data: its inputs are features float32 [N, D], not standardised.
        fit: rows, epochs and seed.

    Raises:
        TrainingDiverged: the loss became infinite or NaN.
    """
    keras.utils.set_random_seed(fit.seed)
    features, targets = data.inputs, data.targets
    scaler = Scaler.fit(features, fit.train)
    target_scaler = Scaler.fit(targets, fit.train) if data.task is Task.REGRESSION else None
    fit_targets = target_scaler(targets) if target_scaler else targets
    model = build_head(recipe.head, features.shape[1], data.outputs)
    batches = Rows(features, fit_targets, fit.train, recipe.batch_size, fit.seed, scaler)
    model.compile(
        optimizer=build_optimizer(recipe.optimizer),
        loss=task_loss(data.task),
        metrics=accuracy_metrics(data.task),
        jit_compile=False,  # compiling takes longer than it saves on a network this small
        steps_per_execution=min(len(batches), _STEPS_PER_EXECUTION),
    )
    has_validation = len(fit.validation) > 0
    trained = epoch_by_epoch(
        model,
        batches,
        (scaler(features[fit.validation]), fit_targets[fit.validation]) if has_validation else None,
        epochs=fit.epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(targets[fit.train], recipe.class_weights),
        hooks=fit.hooks,
        rate=what_to_lower(recipe.optimizer.learning_rate, recipe.head.l2),
        validation_batch_size=1024,
    )
    weights = model.get_weights()
    layers = dense_layers(weights, recipe.head.activation, scaler, target_scaler)
    return FittedHead(layers, scaler, target_scaler, weights, trained)


@dataclass(frozen=True)
class Scaler:
    """Standardises the columns of an array by `(x - mean) * scale`. A constant column becomes zero.

    Attributes:
        mean: float64 [D], the mean of each column.
        scale: float64 [D], one divided by the standard deviation of each column; zero for a constant column.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, features: npt.NDArray[Any], rows: Indices) -> Scaler:
        """Return a scaler under which the given rows of features [N, D] have mean 0 and variance 1 in each column."""
        mean = np.zeros(features.shape[1])
        square = np.zeros(features.shape[1])
        chunks = np.array_split(rows, -(-len(rows) // 4096))
        for chunk in chunks:
            mean += features[chunk].sum(axis=0, dtype=np.float64) / len(rows)
        for chunk in chunks:
            square += np.square(features[chunk] - mean).sum(axis=0) / len(rows)
        deviation = np.sqrt(square)
        # A deviation that is smaller than the rounding error of the mean counts as zero.
        varies = deviation > 8 * np.finfo(features.dtype).eps * np.abs(mean)
        return cls(mean, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies))

    def __call__(self, features: npt.NDArray[Any]) -> Features:
        """Return the standardised columns of an array [n, D], float32 [n, D]."""
        return ((features - self.mean) * self.scale).astype(np.float32)

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """The standard deviation of each column, float64 [D]; zero for a constant column."""
        return np.divide(1.0, self.scale, out=np.zeros_like(self.scale), where=self.scale > 0)

    def inverse_transform(self, standardised: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the original values of standardised columns, float64 [n, D]."""
        return standardised * self.deviation + self.mean

    def merge_into_first_layer(self, layer: Dense) -> Dense:
        """Return a layer whose output for unscaled features is the output of `layer` for standardised features."""
        kernel = self.scale[:, None] * layer.kernel.astype(np.float64)
        offset = self.mean.astype(np.float32)
        bias = layer.bias.astype(np.float64) - (self.mean - offset) @ kernel
        return Dense(kernel.astype(np.float32), bias.astype(np.float32), layer.activation, offset)

    def add_unit(self, layer: Dense) -> Dense:
        """Return a layer whose outputs are the outputs of `layer`, converted back to the targets' unit in float64."""
        return replace(layer, unit=Unit(self.mean, self.deviation))


def build_head(recipe: HeadRecipe, inputs: int, outputs: int) -> Any:
    """Return the Keras head from features [N, inputs] to logits [N, outputs]."""
    penalty = keras.regularizers.L2(recipe.l2) if recipe.l2 else None
    # Random weights of thousands of features give answers that are far off, and a small learning rate corrects them
    # only in many epochs. A linear head can start at zero.
    first = "glorot_uniform" if recipe.hidden else "zeros"
    layers: list[Any] = [keras.Input((inputs,))]
    for units in (*recipe.hidden, None):
        if recipe.dropout:
            layers.append(keras.layers.Dropout(recipe.dropout))
        activation = recipe.activation.value if units else "linear"
        layers.append(
            keras.layers.Dense(
                units or outputs, activation=activation, kernel_initializer=first, kernel_regularizer=penalty
            )
        )
    return keras.Sequential(layers)


def dense_layers(
    weights: Sequence[npt.NDArray[np.float32]], activation: Activation, scaler: Scaler, target_scaler: Scaler | None
) -> tuple[Dense, ...]:
    """Return a fitted Keras head as layers that take unscaled features, with outputs in the unit of the targets.

    Args:
        weights: kernel and bias of each layer, as the head's `get_weights` returns them.
        activation: the activation of all layers but the last.
        scaler: how the features were standardised.
        target_scaler: how the targets were standardised; None if the targets were not standardised.
    """
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    activations = [activation] * (len(pairs) - 1) + [Activation.LINEAR]
    layers = [Dense(kernel, bias, after) for (kernel, bias), after in zip(pairs, activations, strict=True)]
    layers[0] = scaler.merge_into_first_layer(layers[0])
    if target_scaler is not None:
        layers[-1] = target_scaler.add_unit(layers[-1])
    return tuple(layers)
