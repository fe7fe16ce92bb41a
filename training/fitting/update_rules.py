"""The update rules of Keras' optimizers in NumPy, for many heads in one array. Knows no losses and no data.

The constants come from the Keras optimizer that the recipe names. The arithmetic is that of Keras, in float32 and in
the same order, so that NumPy and Keras compute the same steps. `tests/training/fitting/test_update_rules.py` compares
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt

from artifacts.bundle import Float32
from recipes.recipe import OptimizerRecipe
from training.fitting.compile_options import build_optimizer

StepCounts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer changes the weights of k heads.

    Attributes:
        initial_state: for each array of the optimizer (such as the momentum), the value that fills it at the start.
        update: computes one training step in place. The arguments are the weights, their gradient, the arrays of the
            optimizer, the number of earlier steps of each head, int64 [k], and a scratch array. All arrays but the
            number of steps are float32 [k, ...]. The gradient and the scratch array are overwritten.
    """

    initial_state: tuple[float, ...]
    update: Callable[[Float32, Float32, Sequence[Float32], StepCounts, Float32], None]


def update_rule(recipe: OptimizerRecipe) -> UpdateRule:
    """Return the update rule of the optimizer that a recipe names."""
    optimizer, rate = build_optimizer(recipe), recipe.learning_rate
    match optimizer:
        case keras.optimizers.SGD() if optimizer.momentum:
            return _momentum(rate, optimizer)
        case keras.optimizers.SGD():
            return _descent(rate)
        case keras.optimizers.Adagrad():
            return _adagrad(rate, optimizer)
        case keras.optimizers.RMSprop():
            return _rmsprop(rate, optimizer)
        case keras.optimizers.Adam():
            return _adam(rate, optimizer)
        case _:
            raise RuntimeError(
                f"There is no update rule for the Keras optimizer {type(optimizer).__name__}. This is a bug."
            )


def _descent(rate: float) -> UpdateRule:
    def update(
        weights: Float32, gradient: Float32, state: Sequence[Float32], steps: StepCounts, scratch: Float32
    ) -> None:
        gradient *= rate
        weights -= gradient

    return UpdateRule((), update)


def _momentum(rate: float, optimizer: keras.optimizers.SGD) -> UpdateRule:
    def update(
        weights: Float32, gradient: Float32, state: Sequence[Float32], steps: StepCounts, scratch: Float32
    ) -> None:
        (velocity,) = state
        gradient *= rate
        velocity *= optimizer.momentum
        velocity -= gradient
        if optimizer.nesterov:
            np.multiply(velocity, optimizer.momentum, out=scratch)
            scratch -= gradient
            weights += scratch
        else:
            weights += velocity

    return UpdateRule((0.0,), update)


def _adagrad(rate: float, optimizer: keras.optimizers.Adagrad) -> UpdateRule:
    def update(
        weights: Float32, gradient: Float32, state: Sequence[Float32], steps: StepCounts, scratch: Float32
    ) -> None:
        (squares,) = state
        np.square(gradient, out=scratch)
        squares += scratch
        np.add(squares, optimizer.epsilon, out=scratch)
        np.sqrt(scratch, out=scratch)
        gradient *= rate
        gradient /= scratch
        weights -= gradient

    return UpdateRule((optimizer.initial_accumulator_value,), update)


def _rmsprop(rate: float, optimizer: keras.optimizers.RMSprop) -> UpdateRule:
    def update(
        weights: Float32, gradient: Float32, state: Sequence[Float32], steps: StepCounts, scratch: Float32
    ) -> None:
        (squares,) = state
        np.square(gradient, out=scratch)
        scratch *= 1 - optimizer.rho
        squares *= optimizer.rho
        squares += scratch
        np.add(squares, optimizer.epsilon, out=scratch)
        np.sqrt(scratch, out=scratch)
        gradient *= rate
        gradient /= scratch
        weights -= gradient

    return UpdateRule((0.0,), update)


def _adam(rate: float, optimizer: keras.optimizers.Adam) -> UpdateRule:
    decay = (optimizer.weight_decay or 0.0) * rate

    def update(
        weights: Float32, gradient: Float32, state: Sequence[Float32], steps: StepCounts, scratch: Float32
    ) -> None:
        mean, square = state
        if decay:
            np.multiply(weights, decay, out=scratch)
            weights -= scratch
        np.subtract(gradient, mean, out=scratch)
        scratch *= 1 - optimizer.beta_1
        mean += scratch
        np.square(gradient, out=gradient)
        gradient -= square
        gradient *= 1 - optimizer.beta_2
        square += gradient
        np.sqrt(square, out=scratch)
        scratch += optimizer.epsilon
        np.divide(mean, scratch, out=scratch)
        scratch *= _per_head(_adam_rate(rate, optimizer, steps), weights)
        weights -= scratch

    return UpdateRule((0.0, 0.0), update)


def _adam_rate(rate: float, optimizer: keras.optimizers.Adam, steps: StepCounts) -> Float32:
    """Return the learning rate of each head's next step, float32 [k], with Adam's bias correction as Keras has it."""
    step = (steps + 1).astype(np.float32)
    one, powers = np.float32(1), [np.power(np.float32(beta), step) for beta in (optimizer.beta_1, optimizer.beta_2)]
    corrected = np.float32(rate) * np.sqrt(one - powers[1]) / (one - powers[0])
    return corrected.astype(np.float32)


def _per_head(values: Float32, weights: Float32) -> Float32:
    """Reshape float32 [k], one value per head, so that each value broadcasts over all weights of its head."""
    return values.reshape(-1, *(1,) * (weights.ndim - 1))
