from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.recipe import Task
from training.statistics import evaluation

LABELS = ["a", "b", "c"]
FOLDS = [{"accuracy": 1.0}, {"accuracy": 0.5}]


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert evaluation.wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_the_interval_holds_the_share_and_stays_between_zero_and_one(share: float, count: int) -> None:
    low, high = evaluation.wilson(share, count)
    assert 0 <= low <= share <= high <= 1


def test_a_multiclass_score_counts_by_hand() -> None:
    truth = np.array([0, 0, 1, 1, 2])
    logits = np.log(
        np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    ).astype(np.float32)
    metrics = evaluation.evaluate(Task.MULTICLASS, LABELS, truth, logits)
    assert metrics["accuracy"] == pytest.approx(0.8)
    assert metrics["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 1]]
    assert metrics["loss"] == pytest.approx(-np.mean(np.log([0.7, 0.2, 0.8, 0.6, 0.4])), rel=1e-6)
    assert metrics["per_class"][0] == {
        "label": "a",
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "images": 2,
    }
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 0.8 + 1.0) / 3)
    assert "roc_auc" not in metrics


def test_a_class_that_is_never_answered_counts_as_zero_without_a_warning() -> None:
    metrics = evaluation.evaluate(
        Task.MULTICLASS, LABELS, np.array([0, 1]), np.array([[1, 0, 0], [1, 0, 0]], np.float32)
    )
    assert [row["f1"] for row in metrics["per_class"]] == [pytest.approx(2 / 3), 0.0, 0.0]


def test_a_binary_score_has_an_area_under_the_curve() -> None:
    logits = np.array([[-2.0], [-1.0], [0.5], [-0.5], [3.0]], np.float32)
    metrics = evaluation.evaluate(Task.BINARY, ["no", "yes"], np.array([0, 0, 0, 1, 1]), logits)
    assert metrics["roc_auc"] == pytest.approx(5 / 6)
    assert metrics["confusion"] == [[2, 1], [1, 1]]


def test_pooling_repeats_adds_counts_but_does_not_narrow_the_interval() -> None:
    truth = np.array([0, 1, 2, 0])
    once = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]][None] * 5
    alone = np.arange(4)
    single = evaluation.evaluate_folds(Task.MULTICLASS, LABELS, truth, alone, once, FOLDS)
    twice = np.concatenate([once, once])
    double = evaluation.evaluate_folds(Task.MULTICLASS, LABELS, truth, alone, twice, FOLDS * 2)
    assert "groups" not in single
    assert [row["images"] for row in double["per_class"]] == [2, 1, 1]
    assert single["accuracy"] == double["accuracy"] == 0.75
    assert single["accuracy_ci95"] == double["accuracy_ci95"] == list(evaluation.wilson(0.75, 4))
    assert np.array_equal(2 * np.array(single["confusion"]), double["confusion"])
    assert single["accuracy_sd"] == pytest.approx(np.std([1.0, 0.5], ddof=1))


@pytest.mark.parametrize(("epochs", "median"), [([3], 3), ([1, 9, 2], 2), ([1, 2, 3, 10], 3)])
def test_the_median_epoch_is_the_later_of_the_middle_pair(epochs: list[int], median: int) -> None:
    assert evaluation.median_epoch(epochs) == median


def test_images_that_stand_or_fall_together_widen_the_interval_as_if_each_group_were_one_image() -> None:
    groups = np.repeat(np.arange(40), 10)
    together = np.repeat(np.arange(40) % 4 > 0, 10).astype(float)
    low, high = evaluation.wilson_over_groups(together, groups)
    assert (low, high) == pytest.approx(evaluation.wilson(0.75, 40), abs=0.005)
    assert evaluation.wilson_over_groups(np.ones(400), groups) == evaluation.wilson(1.0, 40)


def test_groups_that_are_alike_do_not_narrow_the_interval_of_independent_images() -> None:
    correct = np.tile([1.0, 0.0], 50)
    assert evaluation.wilson_over_groups(correct, np.repeat(np.arange(50), 2)) == evaluation.wilson(0.5, 100)


def test_the_interval_over_groups_holds_what_it_promises() -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        chances = random.beta(3, 1, size=30)  # of being right, for each of 30 persons; 0.75 on average
        correct = (random.random((30, 8)) < chances[:, None]).astype(float).ravel()
        low, high = evaluation.wilson_over_groups(correct, np.repeat(np.arange(30), 8))
        held.append(low <= 0.75 <= high)
    assert 0.92 <= np.mean(held) <= 0.98


def test_pooling_tells_of_groups_where_there_are_some() -> None:
    truth = np.array([0, 1, 2, 0])
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]][None] * 5
    metrics = evaluation.evaluate_folds(Task.MULTICLASS, LABELS, truth, np.array([0, 0, 1, 2]), logits, FOLDS)
    assert metrics["groups"] == 3
    assert metrics["accuracy_ci95_groups"] == list(
        evaluation.wilson_over_groups(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, 2]))
    )


def test_a_multilabel_score_counts_by_hand() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    probabilities = np.array([[0.9, 0.2, 0.1], [0.7, 0.4, 0.1], [0.1, 0.1, 0.1], [0.6, 0.8, 0.3]])
    logits = np.log(probabilities / (1 - probabilities)).astype(np.float32)
    metrics = evaluation.evaluate(Task.MULTILABEL, LABELS, truth, logits)
    assert metrics["accuracy"] == 0.5  # the first and the third, which has none and is answered none
    assert [row["f1"] for row in metrics["per_class"]] == [pytest.approx(0.8), pytest.approx(2 / 3), 0.0]
    assert metrics["per_class"][1] == {
        "label": "b",
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "images": 2,
    }
    assert metrics["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)  # of the labels that there are
    assert metrics["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    right = np.where(truth > 0.5, probabilities, 1 - probabilities)
    assert metrics["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-6)
    assert "confusion" not in metrics


def test_a_regression_score_counts_by_hand() -> None:
    truth = np.array([[1000.0], [1001.0], [1003.0], [1004.0]])
    guesses = np.array([[1001.0], [1001.0], [1002.0], [1006.0]], np.float32)
    metrics = evaluation.evaluate(Task.REGRESSION, [], truth, guesses)
    assert metrics == {
        "rmse": pytest.approx(np.sqrt(6 / 4)),
        "mae": pytest.approx(1.0),
        "r2": pytest.approx(1 - 6 / 10),
        "loss": pytest.approx(1.5),
    }


def test_numbers_that_are_all_equal_explain_nothing() -> None:
    metrics = evaluation.evaluate(Task.REGRESSION, [], np.full((3, 1), 7.0), np.array([[7], [8], [7]], np.float32))
    assert metrics["r2"] == 0.0 and metrics["mae"] == pytest.approx(1 / 3)


def test_draws_without_the_outlier_do_not_count_as_explaining_nothing() -> None:
    """Predicting the mean of an outlier and 59 small numbers is far worse than nothing for the small ones alone."""
    truth = np.append(np.linspace(0, 1, 59), 1e9)[:, None]
    guesses = np.full((1, 60, 1), truth.mean())
    metrics = evaluation.scores_with_intervals(Task.REGRESSION, truth, np.arange(60), guesses)
    alone = 1 - np.square(truth[:59] - truth.mean()).sum() / np.square(truth[:59] - truth[:59].mean()).sum()
    assert metrics["r2"] == pytest.approx(0, abs=1e-9)
    assert metrics["r2_ci95"] == [pytest.approx(alone, rel=0.5), pytest.approx(0, abs=1e-3)]


def test_draws_of_equal_numbers_have_no_r2_and_are_left_out() -> None:
    truth = np.append(np.zeros(19), 5.0)[:, None]
    metrics = evaluation.scores_with_intervals(Task.REGRESSION, truth, np.arange(20), 0.9 * truth[None])
    assert metrics["r2_ci95"] == pytest.approx([0.98, 0.99], abs=0.01)


def test_the_interval_of_two_images_has_a_width() -> None:
    truth = np.array([[1.0], [2.0]])
    metrics = evaluation.evaluate_held_out(Task.REGRESSION, [], truth, np.arange(2), np.array([[2.0], [1.0]]))
    low, high = metrics["rmse_ci95"]  # chi-square with 2 degrees of freedom
    assert (metrics["rmse"], low, high) == pytest.approx((1.0, 0.5207, 6.2847), abs=1e-4)
    assert metrics["r2_ci95"][0] < metrics["r2"] < metrics["r2_ci95"][1] < 1
    labels = np.eye(2, dtype=np.float32)
    metrics = evaluation.evaluate_held_out(Task.MULTILABEL, LABELS[:2], labels, np.arange(2), 8 * labels - 4)
    assert metrics["f1_macro_ci95"] == list(evaluation.wilson(1.0, 2))


def test_numbers_are_pooled_with_an_interval_of_each_score_over_images_and_over_groups() -> None:
    random = np.random.default_rng(3)
    of_group = np.repeat(random.normal(size=40), 5)
    truth = random.normal(size=(200, 1))
    guesses = (truth + of_group[:, None]).astype(np.float32)[None]
    groups = np.repeat(np.arange(40), 5)
    folds = [{"rmse": 1.0, "mae": 2.0, "r2": 0.1}, {"rmse": 3.0, "mae": 2.0, "r2": 0.3}]
    metrics = evaluation.evaluate_folds(Task.REGRESSION, [], truth, groups, guesses, folds)
    for name in ("rmse", "mae", "r2"):
        low, high = metrics[f"{name}_ci95"]
        wider_low, wider_high = metrics[f"{name}_ci95_groups"]
        assert wider_low < low < metrics[name] < high < wider_high
    assert metrics["rmse_sd"] == pytest.approx(np.sqrt(2)) and metrics["mae_sd"] == 0.0
    assert metrics["interval"] == "bootstrap, over images; not over retraining"


def test_labels_are_pooled_with_intervals_of_both_means_and_of_images_that_are_all_right() -> None:
    random = np.random.default_rng(0)
    truth = (random.random((60, 3)) < 0.4).astype(np.float32)
    logits = (truth * 4 - 2 + random.normal(size=truth.shape, scale=2)).astype(np.float32)[None]
    folds = [{"f1_macro": 0.8, "f1_micro": 0.7, "accuracy": 0.5}] * 2
    metrics = evaluation.evaluate_folds(Task.MULTILABEL, LABELS, truth, np.arange(60), logits, folds)
    for name in ("f1_macro", "f1_micro", "accuracy"):
        low, high = metrics[f"{name}_ci95"]
        assert 0 <= low < metrics[name] < high <= 1
        assert metrics[f"{name}_sd"] == 0.0
    assert metrics["accuracy_ci95"] == list(evaluation.wilson(metrics["accuracy"], 60))


def test_one_held_out_image_has_a_score_and_no_interval() -> None:
    metrics = evaluation.evaluate_held_out(
        Task.REGRESSION, [], np.array([[1.0]]), np.array([0]), np.array([[3.0]], np.float32)
    )
    assert metrics["rmse"] == 2.0 and metrics["images"] == 1 and "rmse_ci95" not in metrics


def test_held_out_images_that_belong_together_have_an_interval_over_groups() -> None:
    truth = np.tile([0, 1], 20)
    logits = np.eye(2, dtype=np.float32)[np.repeat([[0, 1], [1, 0]], 10, axis=0).ravel()] * 5
    metrics = evaluation.evaluate_held_out(Task.MULTICLASS, ["a", "b"], truth, np.repeat(np.arange(8), 5), logits)
    low, high = metrics["accuracy_ci95_groups"]
    assert metrics["groups"] == 8 and low < metrics["accuracy_ci95"][0] and metrics["accuracy_ci95"][1] < high


def test_a_label_that_a_draw_or_a_fold_has_not_does_not_count_against_it() -> None:
    # A hundred labels of two images each, one in ten of them missed: draws miss an eighth of the labels.
    truth = np.zeros((1000, 100), np.float32)
    truth[np.arange(200), np.arange(200) % 100] = 1
    logits = np.where(truth == 1, 3.0, -3.0).astype(np.float32)
    logits[:20] = -3.0
    folds = [{"f1_macro": 1.0, "f1_micro": 1.0, "accuracy": 1.0}] * 2
    labels = [str(number) for number in range(100)]
    metrics = evaluation.evaluate_folds(Task.MULTILABEL, labels, truth, np.arange(1000), logits[None], folds)
    low, high = metrics["f1_macro_ci95"]
    assert metrics["f1_macro"] == pytest.approx((80 + 20 * 2 / 3) / 100)
    assert low < metrics["f1_macro"] < high
    first = evaluation.evaluate(Task.MULTILABEL, labels, truth[100:200], logits[100:200])
    assert first["f1_macro"] == 1.0
