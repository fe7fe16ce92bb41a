from __future__ import annotations

import numpy as np

from inference.captions import LINE, can_write, caption


def test_a_line_that_is_too_long_is_cut() -> None:
    strip = np.asarray(caption(60, "x" * 500, "short"))
    assert strip.shape == (2 * LINE, 60, 3)
    assert (strip[:, -2:] == 255).all(), "nothing is written over the border"
    assert (strip[:LINE] < 128).any() and (strip[LINE:] < 128).any()


def test_letters_that_no_font_has_are_known_beforehand() -> None:
    assert can_write("Käse, é") and can_write("")
    assert not can_write("cat \U0010fffd"), "a code point for private use"
