"""Names that users chose, as text of a Markdown document."""

from __future__ import annotations

import html
import re

# What begins emphasis, code, a link, a cell or a formula. Not an underscore within a word, which begins nothing.
_MARKS = re.compile(r"[\\`*\[\]{}|~$]|(?<![^\W_])_|_(?![^\W_])")
# Viewers turn addresses into links by themselves.
_AUTOLINK = re.compile(r":(?=//)|(?<=\bwww)\.|@", re.I)


def escaped(name: str) -> str:
    """Return a name so that every viewer shows it as it is: neither markup nor HTML, on one line."""
    text = html.escape(" ".join(name.split()), quote=False)
    text = _MARKS.sub(lambda found: "\\" + found[0], text)
    return _AUTOLINK.sub(lambda found: f"&#{ord(found[0])};", text)
