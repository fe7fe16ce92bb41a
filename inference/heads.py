"""Computes heads in NumPy: logits from features, and probabilities from logits. Training uses the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from artifacts.bundle import Dense, Float32, Logits
from artifacts.features import Features
from recipes.layers import Activation
from recipes.recipe import Task

Floating = TypeVar("Floating", np.float32, np.float64)


def _sigmoid(x: npt.NDArray[Floating]) -> npt.NDArray[Floating]:
    # Only negative numbers go through exp, so that large logits do not overflow.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(x.dtype)


ACTIVATIONS: Mapping[Activation, Callable[[Float32], Float32]] = {
    Activation.LINEAR: lambda x: x,
    Activation.RELU: lambda x: np.maximum(x, np.float32(0)),
    Activation.SIGMOID: _sigmoid,
    Activation.TANH: np.tanh,
}


def logits(layers: Sequence[Dense], features: Features) -> Logits:
    """Return the logits of a head, [N, outputs], for features float32 [N, D].

    The dtype is float32, or float64 if the last layer has a unit.
    """
    x: Float32 = features
    for layer in layers:
        centred: Float32 = x if layer.offset is None else x - layer.offset
        x = ACTIVATIONS[layer.activation](centred @ layer.kernel + layer.bias)
    unit = layers[-1].unit
    return x if unit is None else x * unit.scale + unit.mean


def probabilities(task: Task, logits: npt.NDArray[np.floating], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Return the probability of each label.

    Args:
        task: `multiclass` takes the softmax over the outputs, `binary` the sigmoid of its only output, and `multilabel`
            the sigmoid of each output. A regression has no probabilities.
        logits: [N, outputs]; [N, 1] for a binary task.
        temperature: divides the logits (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Returns:
        float64 [N, labels]. A binary task has two labels, and the sigmoid is the probability of the second. Each row
        sums to one, except for a multilabel task, whose labels are independent.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if task is Task.MULTILABEL:
        return _sigmoid(scaled)
    if task is Task.BINARY:
        scaled = np.concatenate([np.zeros_like(scaled), scaled], axis=1)
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = exponents / exponents.sum(axis=1, keepdims=True)
    return result


def answers(task: Task, probabilities: npt.NDArray[np.float64], threshold: float = 0.5) -> npt.NDArray[Any]:
    """Return the predicted label of each row as its index, int [N]; for a multilabel task, bool [N, labels]."""
    if task is Task.MULTILABEL:
        return probabilities >= threshold
    if task is Task.BINARY:
        return (probabilities[:, 1] >= threshold).astype(np.intp)
    return np.asarray(probabilities.argmax(axis=1), dtype=np.intp)
