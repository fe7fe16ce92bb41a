from __future__ import annotations

import numpy as np
import pytest

from training.statistics import power_law

IMAGES = np.array([80.0, 160.0, 320.0, 560.0, 800.0])


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"), [(0.05, 2.0, 0.5), (0.0, 1.0, 0.3), (0.1, 5.0, 1.0), (3.0, 40.0, 0.2)]
)
def test_a_law_is_recovered_from_its_points(floor: float, scale: float, exponent: float) -> None:
    law = power_law.fit_power_law(IMAGES, floor + scale * IMAGES**-exponent)
    assert float(law.exponent) == pytest.approx(exponent, rel=0.01)
    assert float(law.floor) == pytest.approx(floor, rel=0.03, abs=0.002)
    assert float(law.error(np.array([1600.0]))[0]) == pytest.approx(floor + scale * 1600**-exponent, rel=0.005)


def test_a_curve_that_does_not_fall_has_no_law_but_its_mean() -> None:
    for errors in (np.full(5, 0.2), np.array([0.1, 0.15, 0.2, 0.25, 0.3])):
        law = power_law.fit_power_law(IMAGES, errors)
        assert float(law.scale) == pytest.approx(0, abs=1e-9) and float(law.floor) == pytest.approx(0.2)
        assert float(law.error(np.array([1600.0]))[0]) == pytest.approx(0.2)


def test_neither_floor_nor_scale_is_below_zero_and_no_error_rises_with_more_images() -> None:
    errors = np.random.default_rng(3).uniform(0, 1, (300, 5))
    law = power_law.fit_power_law(IMAGES, errors)
    assert (law.floor >= 0).all() and (law.scale >= 0).all()
    assert (np.diff(law.error(np.append(IMAGES, 1600.0)), axis=-1) <= 1e-12).all()


def test_many_curves_are_fitted_as_each_alone() -> None:
    errors = 0.1 + 2 * IMAGES**-0.5 + np.random.default_rng(3).normal(0, 0.01, (3, 70, 5))
    together = power_law.fit_power_law(IMAGES, errors)
    assert together.floor.shape == (3, 70)
    alone = power_law.fit_power_law(IMAGES, errors[2, 5])
    for name in ("floor", "scale", "exponent"):
        assert float(getattr(alone, name)) == pytest.approx(float(getattr(together, name)[2, 5]))


def test_no_other_law_is_nearer_to_the_points() -> None:
    errors = 0.1 + 2 * IMAGES**-0.5 + np.random.default_rng(5).normal(0, 0.02, 5)
    law = power_law.fit_power_law(IMAGES, errors)
    found = np.square(law.error(IMAGES) - errors).sum()
    for floor in np.linspace(0, 0.3, 61):
        for exponent in np.linspace(0.05, 2, 79):
            falls = IMAGES**-exponent
            scale = max(0.0, (errors - floor) @ falls / (falls @ falls))
            assert np.square(floor + scale * falls - errors).sum() >= found - 1e-6
