from __future__ import annotations

import keras
import numpy as np
import pytest

from recipes.recipe import OptimizerName, OptimizerRecipe
from training.fitting.compile_options import build_optimizer
from training.fitting.update_rules import update_rule

STEPS = 5


@pytest.mark.parametrize("name", list(OptimizerName))
def test_a_rule_takes_the_steps_of_the_optimizer_of_its_name(name: OptimizerName) -> None:
    recipe = OptimizerRecipe(name=name, learning_rate=0.01)
    random = np.random.default_rng(0)
    weights = random.normal(size=(2, 4, 3)).astype(np.float32)
    gradients = random.normal(size=(STEPS, 2, 4, 3)).astype(np.float32)
    variable = keras.Variable(weights)
    theirs, ours = build_optimizer(recipe), update_rule(recipe)
    remembered = [np.full_like(weights, value) for value in ours.initial_state]
    for step, gradient in enumerate(gradients):
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        ours.update(weights, gradient.copy(), remembered, np.array([step, step]), np.empty_like(weights))
        assert weights == pytest.approx(keras.ops.convert_to_numpy(variable), rel=1e-5, abs=1e-6)


def test_heads_that_took_other_numbers_of_steps_have_rates_of_their_own() -> None:
    adam = update_rule(OptimizerRecipe(name="adam"))
    begun = np.zeros((2, 4, 3), dtype=np.float32)
    weights, gradient = begun.copy(), np.ones_like(begun)
    adam.update(weights, gradient, [begun.copy(), begun.copy()], np.array([0, 99]), begun.copy())
    assert weights[0] == pytest.approx(-0.001, rel=1e-3), "a first step is as long as the learning rate"
    assert 0 > weights[1].max() > -0.001
