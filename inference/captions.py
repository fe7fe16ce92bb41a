"""Text in pictures that Pillow draws: captions above or below, in a font that has the letters. Knows no models."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from artifacts.images import Pixels

LINE = 16
"""Height of a line of text in pixels."""
_SIZE = 11
# Pillow's own font has Latin letters only. It finds these by name in the folders of the system's fonts.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "DroidSansFallbackFull.ttf",
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

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def caption(width: int, *lines: str) -> Image.Image:
    """Return lines of text, black on white, so wide that they fit a picture of `width` pixels; long ones end in `…`."""
    strip = Image.new("RGB", (width, LINE * len(lines)), "white")
    for number, line in enumerate(lines):
        write(strip, (2, LINE * number), line, width - 4)
    return strip


def write(picture: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text into a picture, cut to `width` pixels; `place` is left and top."""
    font = _font_for(text) or _own_font()
    shown = text
    while len(shown) > 1 and font.getlength(shown) > width:
        shown = shown.removesuffix("…")[:-1] + "…"
    left, top = place
    ImageDraw.Draw(picture).text((left, top + 1), shown, fill="black", font=font)


def can_write(text: str) -> bool:
    """Return whether a font of this machine has all letters of a text."""
    return _font_for(text) is not None


def below(picture: Pixels, strip: Image.Image) -> Pixels:
    """Return a picture in colours, uint8 [H, W, 3], with a strip of the same width below it."""
    return np.concatenate([picture, np.asarray(strip)], axis=0)


@cache
def _own_font() -> Font:
    return ImageFont.load_default(_SIZE)


@cache
def _system_fonts() -> tuple[Font, ...]:
    found = []
    for name in _SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, _SIZE))
        except OSError:
            continue
    return tuple(found)


def _font_for(text: str) -> Font | None:
    """Return the first font that has all letters of a text; None if there is none."""
    letters = {letter for letter in text if not letter.isspace()}
    for font in (_own_font(), *_system_fonts()):
        if all(_has(font, letter) for letter in letters):
            return font
    return None


def _has(font: Font, letter: str) -> bool:
    if letter.isascii():
        return True
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))
