from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from training import figures
from training.figures import drawn_names, png, shortened


def test_names_in_letters_that_a_font_has_are_drawn_as_they_are() -> None:
    drawn = drawn_names(["cat", "Кот", "γάτα", "$5", "a b"])
    assert drawn.names == ["cat", "Кот", "γάτα", "$5", "a b"] and drawn.fonts == ["DejaVu Sans"]


def test_names_in_letters_that_no_font_has_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [entry for entry in fontManager.ttflist if entry.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(fontManager, "ttflist", own)
    assert drawn_names(["cat", "고양이", "แมว", "बिल्ली", "🐈"]).names == ["cat", "고양이", "#3", "#4", "#5"]


def test_korean_japanese_and_chinese_names_are_drawn_without_a_font_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [entry for entry in fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", own)
    pictures = set()
    for pair in (
        ["고양이 cat", "강아지"],
        ["고양이 cat", "강아치"],
        ["ねこ", "イヌ"],
        ["小猫", "小狗"],
        ["小貓", "小狗"],
    ):
        drawn = drawn_names(pair)
        assert drawn.names == pair
        figure = Figure(figsize=(2, 1))
        figure.subplots().set_yticks([0, 1], pair, parse_math=False)
        pictures.add(png(figure, drawn.fonts))  # a missing letter would be a warning, which is an error in tests
    assert len(pictures) == 5, "letters, not boxes"


def test_letters_come_from_another_font_where_matplotlibs_own_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_OWN", "cmtt10")  # a font of formulas, which has no Cyrillic letters
    drawn = drawn_names(["cat", "Кот"])
    assert drawn.names == ["cat", "Кот"] and len(drawn.fonts) == 2
    pictures = []
    for fonts in (["cmtt10"], drawn.fonts):
        figure = Figure(figsize=(1, 1))
        figure.subplots().set_xticks([0], ["Кот"])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of missing letters, which is the point
            pictures.append(np.asarray(Image.open(io.BytesIO(png(figure, fonts)))))
    assert (pictures[0] != pictures[1]).any(), "letters, not boxes"


def test_long_names_lose_their_middle_and_stay_apart() -> None:
    long = [f"a species whose name is much too long for a picture, {end}" for end in ("male", "female", "male")]
    long[2] = long[2].replace("long", "long too")
    assert shortened(["cat", *long]) == [
        "cat",
        "a species wh…cture, male #2",
        "a species wh…ure, female",
        "a species wh…cture, male #4",
    ]
