"""Text in pictures that Pillow draws: captions above or below, in fonts that have the letters. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from artifacts.images import Pixels

BUNDLED_FONT = Path(__file__).resolve().parents[1] / "console" / "vendor" / "wqy-microhei.ttc"
"""The font for Chinese, Japanese and Korean that Espalier brings, because many machines have none."""
LINE = 16
"""Height of a line of text in pixels."""
_SIZE = 11
_BASELINE = 13
# For other scripts. Pillow finds these by name in the folders of the system's fonts.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "AppleSDGothicNeo.ttc",
    "Hiragino Sans GB.ttc",
    "malgun.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
)
# No font has this code point, so that a font draws its sign for letters that it lacks.
_NO_LETTER = "\uffff"

Font = ImageFont.FreeTypeFont
_Run = tuple[Font, str]


def caption(width: int, *lines: str) -> Image.Image:
    """Return lines of text, black on white, in a strip of `width` pixels; a line that is too long ends in `…`."""
    strip = Image.new("RGB", (width, LINE * len(lines)), "white")
    for number, line in enumerate(lines):
        write(strip, (2, LINE * number), line, width - 4)
    return strip


def write(picture: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text into a picture, cut to `width` pixels; `place` is left and top."""
    shown = text if len(text) <= width else f"{text[:width]}…"
    while len(shown) > 1 and text_width(shown) > width:
        shown = shown.removesuffix("…")[:-1] + "…"
    draw = ImageDraw.Draw(picture)
    left, top = float(place[0]), place[1]
    for font, part in _runs(shown):
        draw.text((left, top + _BASELINE), part, fill="black", font=font, anchor="ls")
        left += font.getlength(part)


def text_width(text: str) -> float:
    """Return how many pixels wide a line of text is."""
    return sum(font.getlength(part) for font, part in _runs(text))


def can_write(text: str) -> bool:
    """Return whether the fonts of Espalier and of this machine together have all letters of a text."""
    return all(_font_of(letter) is not None for letter in _letters(text))


def below(picture: Pixels, strip: Image.Image) -> Pixels:
    """Return a picture in colours, uint8 [H, W, 3], with a strip of the same width below it."""
    return np.concatenate([picture, np.asarray(strip)], axis=0)


@cache
def _fonts() -> Sequence[Font]:
    """Return the fonts in the order of preference: Pillow's own, which has Latin letters, the bundled, the system's."""
    own = ImageFont.load_default(_SIZE)
    assert isinstance(own, Font), "Pillow's wheels have FreeType"
    found = [own, ImageFont.truetype(BUNDLED_FONT, _SIZE)]
    for name in _SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, _SIZE))
        except OSError:
            continue
    return found


def _runs(text: str) -> Iterator[_Run]:
    """Yield the parts of a text, each with a font that has its letters.

    A text whose letters are all in one font is one part, because the letters of some scripts change with their
    neighbours. Letters that no font has are drawn as boxes by the first font.
    """
    fonts = _fonts()
    whole = next((font for font in fonts if all(_has(font, letter) for letter in _letters(text))), None)
    if whole is not None:
        yield whole, text
        return
    chosen = fonts[0]
    of_letters = []
    for letter in text:
        if not letter.isspace():
            chosen = _font_of(letter) or fonts[0]
        of_letters.append((chosen, letter))
    for font, part in groupby(of_letters, key=lambda one: one[0]):
        yield font, "".join(letter for _, letter in part)


def _letters(text: str) -> set[str]:
    return {letter for letter in text if not letter.isspace()}


def _font_of(letter: str) -> Font | None:
    return next((font for font in _fonts() if _has(font, letter)), None)


@lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    return _drawn(font, letter) != _drawn(font, _NO_LETTER)


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
