from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.bundle import Dense
from inference import heads
from recipes.layers import Activation
from recipes.recipe import Task


def dense(kernel: list[list[float]], bias: list[float], activation: Activation = Activation.LINEAR) -> Dense:
    return Dense(np.array(kernel, np.float32), np.array(bias, np.float32), activation)


def test_layers_are_applied_one_after_the_other() -> None:
    layers = [dense([[1, -1]], [0, 0], Activation.RELU), dense([[2], [3]], [1])]
    assert heads.logits(layers, np.array([[2.0], [-2.0]], np.float32)).tolist() == [[5.0], [7.0]]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (Activation.LINEAR, [-1000.0, 0.0, 2.0]),
        (Activation.RELU, [0.0, 0.0, 2.0]),
        (Activation.SIGMOID, [0.0, 0.5, 1 / (1 + np.exp(-2.0))]),
        (Activation.TANH, [-1.0, 0.0, np.tanh(2.0)]),
    ],
)
def test_every_activation_is_right_and_does_not_overflow(activation: Activation, expected: list[float]) -> None:
    found = heads.logits([dense([[1]], [0], activation)], np.array([[-1000.0], [0.0], [2.0]], np.float32))
    assert found[:, 0].tolist() == pytest.approx(expected)
    assert found.dtype == np.float32


@given(st.lists(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=1, max_size=8), st.floats(0.1, 10))
def test_probabilities_sum_to_one_and_keep_the_order(rows: list[list[float]], temperature: float) -> None:
    logits = np.array(rows)
    found = heads.probabilities(Task.MULTICLASS, logits, temperature)
    assert found.sum(axis=1) == pytest.approx(np.ones(len(rows)))
    assert (np.take_along_axis(found, logits.argmax(axis=1)[:, None], axis=1)[:, 0] == found.max(axis=1)).all()


def test_a_binary_answer_is_the_sigmoid_of_its_logit_and_follows_the_threshold() -> None:
    found = heads.probabilities(Task.BINARY, np.array([[0.0], [np.log(3.0)], [-800.0]]))
    assert found == pytest.approx(np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]))
    assert heads.answers(Task.BINARY, found).tolist() == [1, 1, 0]
    assert heads.answers(Task.BINARY, found, threshold=0.6).tolist() == [0, 1, 0]


def test_a_higher_temperature_is_less_sure() -> None:
    sure, unsure = (heads.probabilities(Task.MULTICLASS, np.array([[2.0, 0.0]]), t)[0, 0] for t in (1.0, 2.0))
    assert sure == pytest.approx(1 / (1 + np.exp(-2))) and unsure == pytest.approx(1 / (1 + np.exp(-1)))
