"""Writes docs/settings.md from settings.py. Run as `python -m ops.write_settings_docs`."""

from __future__ import annotations

from pathlib import Path

from pydantic_core import PydanticUndefined

from settings import Settings, variable_name

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"

_HEAD = """# Settings

Read from the environment. Written by `python -m ops.write_settings_docs` from `settings.py`.

| setting | default | meaning |
|---|---|---|
"""


def settings_document() -> str:
    """Return the text of docs/settings.md: a table with a row for each setting."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined, ()) else _code(field.default)
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{variable_name(name)}` | {default} | {meaning} |\n")
    return _HEAD + "".join(lines)


def _code(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"`{text}`"


if __name__ == "__main__":
    TARGET.write_text(settings_document())
