"""Escapes names that users chose, so that a Markdown document shows them as plain text."""

from __future__ import annotations

import html
import re

# Characters that begin emphasis, code, a link, a table cell or a formula. An underscore within a word is no markup.
_MARKS = re.compile(r"[\\`*\[\]{}|~$]|(?<![^\W_])_|_(?![^\W_])")
# The parts by which viewers recognise addresses, which they turn into links even without markup.
_AUTOLINK = re.compile(r":(?=//)|(?<=\bwww)\.|@", re.I)


def escaped(name: str) -> str:
    """Return a name with all Markdown and HTML escaped, on one line: every viewer shows the name itself."""
    text = html.escape(" ".join(name.split()), quote=False)
    text = _MARKS.sub(lambda found: "\\" + found[0], text)
    return _AUTOLINK.sub(lambda found: f"&#{ord(found[0])};", text)
