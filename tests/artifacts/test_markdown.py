from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.markdown import escaped


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("daisy", "daisy"),
        ("sea_lion-2.5 (old) 강아지", "sea_lion-2.5 (old) 강아지"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"),
        ("a | b", r"a \| b"),
        ("*bold* _it_ `code` $x$", r"\*bold\* \_it\_ \`code\` \$x\$"),
        (
            "https://evil.example www.evil.example me@evil.example",
            "https&#58;//evil.example www&#46;evil.example me&#64;evil.example",
        ),
        ("two\nlines", "two lines"),
        ("&lt;", "&amp;lt;"),
    ],
)
def test_a_name_is_text_and_no_markup(name: str, text: str) -> None:
    assert escaped(name) == text


@given(st.text())
def test_every_name_is_shown_as_it_is(name: str) -> None:
    shown = html.unescape(re.sub(r"\\([\\`*\[\]{}|~$_])", r"\1", escaped(name)))
    assert shown == " ".join(name.split())
    assert not set("<>\n") & set(escaped(name))
