from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from training.data.targets import Float64
from training.statistics import resampling


def mean(sums: Float64) -> dict[str, Float64]:
    return {"mean": sums[..., 1] / sums[..., 0]}


def with_ones(values: Float64) -> Float64:
    return np.stack([np.ones_like(values), values], axis=-1)


def test_the_interval_of_a_mean_is_that_of_students_t() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = resampling.bootstrap_intervals(with_ones(values), np.arange(400), mean)["mean"]
    wanted = stats.t.interval(0.95, 399, loc=values.mean(), scale=values.std(ddof=1) / 20)
    assert (low, high) == pytest.approx(wanted, abs=0.01)


def test_the_interval_over_a_few_groups_holds_what_it_promises() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 5)
    held = []
    for _ in range(300):
        values = (random.normal(size=12)[:, None] + random.normal(size=(12, 5))).ravel()
        low, high = resampling.bootstrap_intervals(with_ones(values), groups, mean)["mean"]
        held.append(low <= 0 <= high)
    assert 0.91 <= np.mean(held) <= 0.985


def test_very_many_groups_are_drawn_in_bags_and_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=200_000)
    low, high = resampling.bootstrap_intervals(with_ones(values), np.arange(200_000), mean)["mean"]
    half = 1.96 * values.std() / np.sqrt(200_000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_sums_over_groups_take_any_numbers_for_groups() -> None:
    sums = resampling.block_sums(np.array([[1.0], [2.0], [4.0]]), np.array([70, -3, 70]))
    assert sums.tolist() == [[2.0], [5.0]]
