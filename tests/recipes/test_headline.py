from __future__ import annotations

from recipes.headline import written_numbers


def test_numbers_far_from_zero_have_the_digits_in_which_they_differ() -> None:
    assert written_numbers(1e12, 1e12 + 20, 1e12 + 9.5) == ["1000000000000", "1000000000020", "1000000000009.5"]
    assert written_numbers(0.0, 196.0, 118.26) == ["0", "196", "118.3"]
    assert written_numbers(7.0, 7.0) == ["7", "7"]
