"""Turns matplotlib figures into files, without pyplot and its global state, and finds fonts for names in any script."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from inference.captions import BUNDLED_FONT

# matplotlib's own font has Latin, Greek, Cyrillic, Arabic and Hebrew letters, but none of China, Japan, Korea or India.
_OWN = "DejaVu Sans"
# The bundled font has a name of its own here, so that it is found even where another version of it is installed.
_BUNDLED = FontEntry(fname=str(BUNDLED_FONT), name="Bundled with Espalier", weight=400, size="scalable")
# These have a box for every letter. matplotlib brings the first.
_BOXES = ("Last Resort", "LastResort", "Adobe Blank", "Unicode BMP Fallback")
# Characters of a name beside a picture.
_LONGEST = 24


def png(figure: Figure, fonts: Sequence[str] = (_OWN,)) -> bytes:
    """Return a figure as a PNG of 100 dots per inch; each letter comes from the first of the fonts that has it."""
    _known_fonts()
    for text in figure.findobj(Text):
        text.set_fontfamily(list(fonts))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


@dataclass(frozen=True)
class DrawnNames:
    """Names as a picture can show them.

    Attributes:
        names: each name, or its number such as `#3` if neither Espalier nor this machine has a font with its letters.
        fonts: families of fonts that together have all letters of the names.
    """

    names: Sequence[str]
    fonts: Sequence[str]


def drawn_names(names: Sequence[str]) -> DrawnNames:
    """Return names as a picture can show them, with the fonts that have their letters.

    These are matplotlib's own, then the bundled one, then those of the machine. Names are numbered from 1 in their
    order; whoever draws numbers must say in the text what they mean.
    """
    letters = _letters(names)
    fonts: list[str] = []
    missing = letters
    known: set[str] = set()
    for entry in sorted(_known_fonts(), key=_preference):
        if fonts and not missing:
            break
        if entry.name in known or entry.name.startswith(_BOXES):
            continue
        known.add(entry.name)
        found = missing & _letters_of(entry.fname)
        if found or entry.name == _OWN:
            fonts.append(entry.name)
            missing = missing - found
    shown = [f"#{number}" if _letters([name]) & missing else name for number, name in enumerate(names, 1)]
    return DrawnNames(shown, fonts)


def shortened(names: Sequence[str]) -> list[str]:
    """Return names that fit beside a picture: long ones without their middle, with their number if they look alike."""
    cut = [name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}" for name in names]
    seen = Counter(cut)
    return [f"{short} #{number}" if seen[short] > 1 else short for number, short in enumerate(cut, 1)]


def _known_fonts() -> Sequence[FontEntry]:
    """Return all fonts that matplotlib knows, with the bundled one, which it forgets when it looks for fonts anew."""
    if _BUNDLED not in fontManager.ttflist:
        fontManager.ttflist.append(_BUNDLED)
    return fontManager.ttflist


def _preference(entry: FontEntry) -> tuple[bool, bool, int, bool]:
    """Return a sort key: matplotlib's own font, the bundled one, then upright fonts of regular weight."""
    return entry.name != _OWN, entry != _BUNDLED, abs(int(entry.weight) - 400), entry.style != "normal"


def _letters(names: Iterable[str]) -> set[int]:
    return {ord(letter) for name in names for letter in name if not letter.isspace()}


def _letters_of(path: str) -> set[int]:
    """Return the letters that a font file has; none if it cannot be read."""
    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return set()
