"""The update rules of Keras' optimizers on NumPy arrays, many heads in one array. Knows no losses and no data.

The constants are those of the Keras optimizer that the recipe names, and the arithmetic is Keras', in float32 and in
its order, so that a head takes the same steps in either. `tests/training/test_rules.py` takes them side by side.
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
    """How weights follow their gradient.

    Attributes:
        begin: what each array that the rule remembers beside the weights is filled with at first.
        update: changes weights, gradient (of no use afterwards) and remembered arrays in place, all float32 [k, ...];
            it is given the steps that each of the k heads took before, and an array of their shape to write on.
    """

    initial_state: tuple[float, ...]
    update: Callable[[Float32, Float32, Sequence[Float32], StepCounts, Float32], None]


def update_rule(recipe: OptimizerRecipe) -> UpdateRule:
    """Return the rule of the optimizer that a recipe names."""
    named, rate = build_optimizer(recipe), recipe.learning_rate
    match named:
        case keras.optimizers.SGD() if named.momentum:
            return _momentum(rate, named)
        case keras.optimizers.SGD():
            return _descent(rate)
        case keras.optimizers.Adagrad():
            return _adagrad(rate, named)
        case keras.optimizers.RMSprop():
            return _rmsprop(rate, named)
        case keras.optimizers.Adam():
            return _adam(rate, named)
        case _:
            raise RuntimeError(f"No rule for Keras' {type(named).__name__}. This is a bug.")


def _descent(rate: float) -> UpdateRule:
    def update(weights: Float32, gradient: Float32, kept: Sequence[Float32], steps: StepCounts, spare: Float32) -> None:
        gradient *= rate
        weights -= gradient

    return UpdateRule((), update)


def _momentum(rate: float, named: keras.optimizers.SGD) -> UpdateRule:
    def update(weights: Float32, gradient: Float32, kept: Sequence[Float32], steps: StepCounts, spare: Float32) -> None:
        (velocity,) = kept
        gradient *= rate
        velocity *= named.momentum
        velocity -= gradient
        if named.nesterov:
            np.multiply(velocity, named.momentum, out=spare)
            spare -= gradient
            weights += spare
        else:
            weights += velocity

    return UpdateRule((0.0,), update)


def _adagrad(rate: float, named: keras.optimizers.Adagrad) -> UpdateRule:
    def update(weights: Float32, gradient: Float32, kept: Sequence[Float32], steps: StepCounts, spare: Float32) -> None:
        (squares,) = kept
        np.square(gradient, out=spare)
        squares += spare
        np.add(squares, named.epsilon, out=spare)
        np.sqrt(spare, out=spare)
        gradient *= rate
        gradient /= spare
        weights -= gradient

    return UpdateRule((named.initial_accumulator_value,), update)


def _rmsprop(rate: float, named: keras.optimizers.RMSprop) -> UpdateRule:
    def update(weights: Float32, gradient: Float32, kept: Sequence[Float32], steps: StepCounts, spare: Float32) -> None:
        (squares,) = kept
        np.square(gradient, out=spare)
        spare *= 1 - named.rho
        squares *= named.rho
        squares += spare
        np.add(squares, named.epsilon, out=spare)
        np.sqrt(spare, out=spare)
        gradient *= rate
        gradient /= spare
        weights -= gradient

    return UpdateRule((0.0,), update)


def _adam(rate: float, named: keras.optimizers.Adam) -> UpdateRule:
    decay = (named.weight_decay or 0.0) * rate

    def update(weights: Float32, gradient: Float32, kept: Sequence[Float32], steps: StepCounts, spare: Float32) -> None:
        mean, square = kept
        if decay:
            np.multiply(weights, decay, out=spare)
            weights -= spare
        np.subtract(gradient, mean, out=spare)
        spare *= 1 - named.beta_1
        mean += spare
        np.square(gradient, out=gradient)
        gradient -= square
        gradient *= 1 - named.beta_2
        square += gradient
        np.sqrt(square, out=spare)
        spare += named.epsilon
        np.divide(mean, spare, out=spare)
        spare *= _along(weights, _adam_rate(rate, named, steps))
        weights -= spare

    return UpdateRule((0.0, 0.0), update)


def _adam_rate(rate: float, named: keras.optimizers.Adam, steps: StepCounts) -> Float32:
    """Return the rate of each head's next step, float32 [k], in which Keras undoes the bias of both means."""
    step = (steps + 1).astype(np.float32)
    one, powers = np.float32(1), [np.power(np.float32(beta), step) for beta in (named.beta_1, named.beta_2)]
    corrected = np.float32(rate) * np.sqrt(one - powers[1]) / (one - powers[0])
    return corrected.astype(np.float32)


def _along(weights: Float32, of_heads: Float32) -> Float32:
    """Return a number for each head so that it meets all of the head's weights."""
    return of_heads.reshape(-1, *(1,) * (weights.ndim - 1))
