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


def test_chinese_japanese_and_korean_letters_are_written_beside_latin_ones() -> None:
    texts = [
        "contribution to 고양이",
        "contribution to 강아지",
        "to ねこ",
        "to イヌ",
        "to 小貓",
        "café 小猫",
        "cafe 小猫",
    ]
    assert all(map(can_write, texts))
    assert len({np.asarray(caption(200, text)).tobytes() for text in texts}) == len(texts), "letters, not boxes"


def test_a_line_in_several_scripts_is_cut_too() -> None:
    strip = np.asarray(caption(60, "contribution to 고양이 고양이"))
    assert (strip[:, -2:] == 255).all() and (strip < 128).any()
