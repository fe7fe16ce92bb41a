from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss

from recipes.recipe import Task
from training.statistics.baseline import compare_with_constant_answer

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.choice(3, 90, p=[0.6, 0.3, 0.1])
ALONE = np.arange(90)


def noise(scale: float = 1.0, outputs: int = 3) -> npt.NDArray[np.float32]:
    return np.random.default_rng(1).normal(0, scale, (1, 90, outputs)).astype(np.float32)


def test_differences_are_those_of_the_shares_and_of_chance() -> None:
    logits = noise() + np.eye(3, dtype=np.float32)[TRUTH]
    found = compare_with_constant_answer(Task.MULTICLASS, TRUTH, ALONE, logits, 0.0)
    probabilities = np.exp(logits[0]) / np.exp(logits[0]).sum(axis=1, keepdims=True)
    shares = np.tile(np.bincount(TRUTH) / 90, (90, 1))
    assert found["loss_difference"] == pytest.approx(log_loss(TRUTH, probabilities) - log_loss(TRUTH, shares), rel=1e-5)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(TRUTH, logits[0].argmax(axis=1)))
    assert found["balanced_accuracy_difference"] == pytest.approx(found["balanced_accuracy"] - 1 / 3)
    for name in ("loss_difference", "balanced_accuracy_difference"):
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high


@pytest.mark.parametrize(
    ("logits", "is_better"),
    [
        (noise(), False),
        (noise() + 3 * np.eye(3, dtype=np.float32)[TRUTH], True),
        (np.tile(np.log([0.6, 0.3, 0.1]), (1, 90, 1)).astype(np.float32), False),  # the constant answer itself
        (100 * (noise() + 2 * np.eye(3, dtype=np.float32)[TRUTH]), True),  # much too sure, but often right
        (-3 * np.eye(3, dtype=np.float32)[None, TRUTH], False),  # clearly worse
    ],
)
def test_a_model_is_better_if_one_of_both_intervals_says_so(logits: npt.NDArray[np.float32], is_better: bool) -> None:
    assert compare_with_constant_answer(Task.MULTICLASS, TRUTH, ALONE, logits, 0.0)["is_better"] is is_better


def test_images_that_stand_or_fall_together_prove_less() -> None:
    """Four people of 20 or 25 photographs: the model knows three of them."""
    people = np.repeat(np.arange(4), [20, 25, 20, 25])
    truth = people % 2
    logits = np.where(people == 3, -2.0, np.where(truth > 0, 2.0, -2.0)).astype(np.float32)[None, :, None]
    assert compare_with_constant_answer(Task.BINARY, truth, ALONE, logits, 0.0)["is_better"]
    assert not compare_with_constant_answer(Task.BINARY, truth, people, logits, 0.0)["is_better"]


def test_four_images_that_are_all_right_are_enough() -> None:
    logits = np.array([[[-3], [3], [-3], [3]]], np.float32)
    assert compare_with_constant_answer(Task.BINARY, np.array([0, 1, 0, 1]), np.arange(4), logits, 0.0)["is_better"]


def test_each_label_is_compared_with_its_own_share() -> None:
    has = (np.random.default_rng(2).random((90, 3)) < [0.5, 0.2, 0.05]).astype(np.float32)
    rare = np.tile(np.log([0.5 / 0.5, 0.2 / 0.8, 0.05 / 0.95]), (1, 90, 1))
    assert not compare_with_constant_answer(Task.MULTILABEL, has, ALONE, rare, 0.0)["is_better"]
    knows = compare_with_constant_answer(Task.MULTILABEL, has, ALONE, (8 * has - 4)[None], 0.0)
    assert knows["is_better"] and knows["balanced_accuracy"] == 1.0 and knows["balanced_accuracy_difference"] == 0.5


def test_numbers_are_better_if_r2_is_positive() -> None:
    for r2 in (-1.1, 0.0, 0.1):
        found = compare_with_constant_answer(Task.REGRESSION, np.zeros((90, 1)), ALONE, noise(outputs=1), r2)
        assert found == {"r2": r2, "is_better": r2 > 0}
