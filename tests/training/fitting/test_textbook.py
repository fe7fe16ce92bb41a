"""Training against textbooks: update rules and schedules written again in NumPy, float64, from their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from recipes.recipe import FineTune, HeadRecipe, OptimizerName, OptimizerRecipe, Task
from training.fitting import fine_tuning
from training.fitting.compile_options import build_optimizer, task_loss
from training.fitting.head_fit import build_head

Array = npt.NDArray[np.float64]
Update = Callable[[Array, Array, int], Array]

ROWS, WIDTH, CLASSES, STEPS = 16, 6, 3, 10
RATE = 0.05
# The constants that Keras documents as its defaults.
EPSILON = 1e-7
MOMENTUM = 0.9
ADAGRAD_START = 0.1
RMSPROP_DECAY = 0.9
BETA_1, BETA_2 = 0.9, 0.999
WEIGHT_DECAY = 0.004

FEATURES = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
TARGETS = np.arange(ROWS) % CLASSES
ONE_HOT = np.eye(CLASSES)[TARGETS]


def sgd() -> Update:
    """Gradient descent."""
    return lambda weights, gradient, step: weights - RATE * gradient


def momentum() -> Update:
    """Polyak 1964, "Some methods of speeding up the convergence of iteration methods": the heavy ball."""
    velocity: Any = 0.0

    def update(weights: Array, gradient: Array, step: int) -> Array:
        nonlocal velocity
        velocity = MOMENTUM * velocity - RATE * gradient
        return weights + velocity

    return update


def nesterov() -> Update:
    """Nesterov 1983 as Sutskever et al. 2013 write it: the gradient is taken where the velocity leads.

    Their weights are `place`; what a framework keeps are those looked ahead from it, where it takes the gradient.
    """
    velocity: Any = 0.0
    place: Any = None

    def update(ahead: Array, gradient: Array, step: int) -> Array:
        nonlocal velocity, place
        place = ahead if place is None else place
        velocity = MOMENTUM * velocity - RATE * gradient
        place = place + velocity
        return place + MOMENTUM * velocity

    return update


def adagrad() -> Update:
    """Duchi et al. 2011, "Adaptive subgradient methods", the diagonal form."""
    squares: Any = ADAGRAD_START

    def update(weights: Array, gradient: Array, step: int) -> Array:
        nonlocal squares
        squares = squares + gradient**2
        return weights - RATE * gradient / np.sqrt(squares + EPSILON)

    return update


def rmsprop() -> Update:
    """Tieleman & Hinton 2012, lecture 6.5 of "Neural networks for machine learning"."""
    mean_square: Any = 0.0

    def update(weights: Array, gradient: Array, step: int) -> Array:
        nonlocal mean_square
        mean_square = RMSPROP_DECAY * mean_square + (1 - RMSPROP_DECAY) * gradient**2
        return weights - RATE * gradient / np.sqrt(mean_square + EPSILON)

    return update


def adam() -> Update:
    """Kingma & Ba 2015, "Adam", with the order of computation that ends its section 2 (epsilon is epsilon-hat)."""
    first: Any = 0.0
    second: Any = 0.0

    def update(weights: Array, gradient: Array, step: int) -> Array:
        nonlocal first, second
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        rate = RATE * np.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)
        return weights - rate * first / (np.sqrt(second) + EPSILON)

    return update


def adamw() -> Update:
    """Loshchilov & Hutter 2019, "Decoupled weight decay regularization": Adam, and a decay beside the gradient."""
    by_adam = adam()
    return lambda weights, gradient, step: by_adam(weights, gradient, step) - RATE * WEIGHT_DECAY * weights


RULES: dict[OptimizerName, Callable[[], Update]] = {
    OptimizerName.SGD: sgd,
    OptimizerName.MOMENTUM: momentum,
    OptimizerName.NESTEROV: nesterov,
    OptimizerName.ADAGRAD: adagrad,
    OptimizerName.RMSPROP: rmsprop,
    OptimizerName.ADAM: adam,
    OptimizerName.ADAMW: adamw,
}


def linear_head() -> tuple[Any, list[Array]]:
    """Return a linear head from a seed, and its weights."""
    keras.utils.set_random_seed(0)
    model = build_head(HeadRecipe(l2=0.0), WIDTH, CLASSES)
    model.layers[-1].bias.assign([0.3, -0.2, 0.1])
    return model, [weights.astype(np.float64) for weights in model.get_weights()]


def trained(name: OptimizerName, loss_function: Any, truth: Any) -> tuple[list[Array], list[float]]:
    """Return the weights of the head after ten steps by Keras, and the loss before each."""
    model, _ = linear_head()
    model.compile(optimizer=build_optimizer(OptimizerRecipe(name=name, learning_rate=RATE)), loss=loss_function)
    losses = [float(model.train_on_batch(FEATURES, truth)) for _ in range(STEPS)]
    return model.get_weights(), losses


def textbook(name: OptimizerName) -> tuple[list[Array], list[float]]:
    """Return the same by NumPy: the gradient of the mean cross-entropy is (softmax - one-hot) / N."""
    _, (kernel, bias) = linear_head()
    update_kernel, update_bias = RULES[name](), RULES[name]()
    losses = []
    for step in range(1, STEPS + 1):
        logits = FEATURES @ kernel + bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax = odds / odds.sum(axis=1, keepdims=True)
        losses.append(float(-np.log(softmax[np.arange(ROWS), TARGETS]).mean()))
        error = (softmax - ONE_HOT) / ROWS
        kernel = update_kernel(kernel, FEATURES.T @ error, step)
        bias = update_bias(bias, error.sum(axis=0), step)
    return [kernel, bias], losses


@pytest.mark.parametrize("name", list(OptimizerName))
def test_every_optimizer_updates_a_linear_head_as_its_paper_says(name: OptimizerName) -> None:
    weights, losses = trained(name, task_loss(Task.MULTICLASS), TARGETS)
    expected, expected_losses = textbook(name)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for found, wanted in zip(weights, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_the_optimizers_differ_by_more_than_they_are_checked_to() -> None:
    kernels = [textbook(name)[0][0] for name in OptimizerName]
    for number, one in enumerate(kernels):
        for other in kernels[:number]:
            assert np.abs(one - other).max() > 1e-4


def test_classes_as_numbers_and_as_one_hot_rows_train_alike() -> None:
    by_number, losses = trained(OptimizerName.ADAM, task_loss(Task.MULTICLASS), TARGETS)
    one_hot_loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    by_row, other_losses = trained(OptimizerName.ADAM, one_hot_loss, ONE_HOT)
    assert losses == pytest.approx(other_losses, abs=1e-6)
    for one, other in zip(by_number, by_row, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_the_learning_rate_follows_its_formula(warmup_epochs: int) -> None:
    """A straight rise (Goyal et al. 2017), then half a cosine to zero (Loshchilov & Hutter 2017, without restarts)."""
    steps_per_epoch, epochs = 7, 5
    schedule = fine_tuning.learning_rate_schedule(
        FineTune(learning_rate=RATE, epochs=epochs, warmup_epochs=warmup_epochs), steps_per_epoch
    )
    rise, end = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    for step in range(end + 1):
        falling = RATE / 2 * (1 + np.cos(np.pi * (step - rise) / (end - rise)))
        assert float(schedule(step)) == pytest.approx(RATE * step / rise if step < rise else falling, abs=1e-7)
