"""Reads the table of labels of an archive: its encoding, its dialect, and the names of its columns. Knows no images."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.file_names import find_code_page
from errors import LayoutUnknown

_ALIASES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name"),
    "label": ("label", "labels", "class", "class_name", "category"),
    "target": ("target", "value", "y"),
    "group": ("group", "group_id"),
    "split": ("split", "subset", "fold_split"),
}
_MEANING = {alias: column for column, aliases in _ALIASES.items() for alias in aliases}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_INDEX_NAMES = ("", "unnamed: 0", "index")
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table by its columns, each with the number of its line, and what was unusual about the table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()


def read_table(data: bytes, name: str, code_page: str | None) -> LabelTable:
    """Read a table as spreadsheets and pandas write them, or JSON lines. Raises LayoutUnknown or ArchiveRefused."""
    text, notes = _decode(data, name, code_page)
    if name.lower().endswith(".jsonl"):
        return _from_json_lines(text, name)
    first = text.lstrip("\r\n").partition("\n")[0].strip().lower()
    delimiter = None
    if re.fullmatch(r'"?sep=.', first.rstrip('"')):  # Excel writes and reads it
        delimiter = first.strip('"')[-1:] or None
        text = text.lstrip("\r\n").partition("\n")[2]
        first = text.partition("\n")[0].lower()
    delimiter = delimiter or max(_DELIMITERS, key=lambda mark: (_known_columns(first, mark), mark == ","))
    if delimiter not in _DELIMITERS:
        raise LayoutUnknown(f"{name} says that {delimiter!r} separates its values. Use commas, semicolons or tabs.")
    if delimiter != ",":
        notes.append(f"{name} was read with {_DELIMITERS[delimiter]} between its values.")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, skipinitialspace=True)
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise LayoutUnknown(
            f"Line {reader.line_num} of {name} cannot be read as values separated by {_DELIMITERS[delimiter]}: "
            f"{error}. A value that contains quotes or separators must be in quotes, without spaces outside them."
        ) from error
    rows = _without_empty_columns(rows)
    header = rows[0][1] if rows else []
    if _has_index(rows):
        notes.append(f"The first column of {name} counts its rows; it was left out.")
        header, rows = header[1:], [(line, row[1:]) for line, row in rows]
    columns = _columns(header, name, notes)
    found = []
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise LayoutUnknown(f"Line {line} of {name}: expected {len(columns)} values. Received {len(row)}.")
        found.append((line, tuple(unicodedata.normalize("NFC", value.strip()) for value in row)))
    if delimiter == ";" and "target" in columns:
        found = _with_points(found, columns.index("target"))
    return LabelTable(columns, tuple(found), tuple(notes))


def _decode(data: bytes, name: str, code_page: str | None) -> tuple[str, list[str]]:
    """Return the text of a table. Raises LayoutUnknown or ArchiveRefused."""
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), None)
    if encoding is None and data[1:2] == b"\0" and data[3:4] == b"\0":
        encoding = "utf-16-le"
    try:
        text = data.decode(encoding or "utf-8")
        return text, [f"{name} was read as UTF-16."] if encoding and "16" in encoding else []
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise LayoutUnknown(f"{name} cannot be read as {encoding}: {error}. Save it as UTF-8.") from error
    if b"\0" in data:
        raise LayoutUnknown(f"{name} cannot be read as text: it contains zero bytes. Save it as comma-separated UTF-8.")
    values = {value for value in re.split(rb'[,;\t\r\n"|]', data) if not value.isascii()}
    found = find_code_page(values, code_page, f"values of {name}")
    return data.decode(found), [f"{name} is not in UTF-8; it was read as {found}."]


def _known_columns(first: str, delimiter: str) -> int:
    return sum(value.strip().strip('"') in _MEANING for value in first.split(delimiter))


def _has_index(rows: Sequence[tuple[int, Sequence[str]]]) -> bool:
    """Return whether the first column is the index that pandas writes: 0, 1, 2, … without a name."""
    if len(rows) < 2 or not rows[0][1] or rows[0][1][0].strip().lower() not in _INDEX_NAMES:
        return False
    return all(row and re.fullmatch(r"\s*\d+\s*", row[0]) for _, row in rows[1:])


def _without_empty_columns(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Return rows without the empty columns at their end, which spreadsheets add."""
    width = max((place for _, row in rows for place, value in enumerate(row, 1) if value.strip()), default=0)
    if not rows or width >= len(rows[0][1]):
        return rows
    return [(line, row[:width] if len(row) == len(rows[0][1]) else row) for line, row in rows]


def _columns(header: Sequence[str], name: str, notes: list[str]) -> tuple[str, ...]:
    given = [value.strip().lower() for value in header]
    columns = [_MEANING.get(value, value) for value in given]
    unknown = [value for value in given if value not in _MEANING]
    if (
        unknown
        or len(set(columns)) != len(columns)
        or "path" not in columns
        or ("label" in columns) == ("target" in columns)
    ):
        advice = "Write the names of the columns into the first line."
        if unknown and "path" in columns and ("label" in columns) != ("target" in columns):
            advice = f"Leave out or rename {' and '.join(map(repr, unknown))}."
        raise LayoutUnknown(
            f"Line 1 of {name}: expected path,label[,group][,split] or path,target[,group][,split]. "
            f"Received {','.join(header)!r}. {advice}"
        )
    renamed = [f"{old} as {new}" for old, new in zip(given, columns, strict=True) if old != new]
    if renamed:
        notes.append(f"Columns of {name} were read: {', '.join(renamed)}.")
    return tuple(columns)


def _with_points(rows: Sequence[tuple[int, tuple[str, ...]]], place: int) -> list[tuple[int, tuple[str, ...]]]:
    """Return rows with decimal points instead of the decimal commas of many languages."""
    points = [re.sub(r"^([+-]?\d*),(\d+)", r"\1.\2", row[place]) for _, row in rows]
    return [(line, (*row[:place], point, *row[place + 1 :])) for (line, row), point in zip(rows, points, strict=True)]


def _from_json_lines(text: str, name: str) -> LabelTable:
    """Read objects, one a line, as Hugging Face's image folders have them."""
    objects = []
    for line, one in enumerate(text.splitlines(), 1):
        if not one.strip():
            continue
        try:
            value = json.loads(one)
        except ValueError as error:
            raise LayoutUnknown(f"Line {line} of {name} cannot be read as JSON: {error}.") from error
        if not isinstance(value, dict):
            raise LayoutUnknown(f"Line {line} of {name}: expected an object. Received {one[:100]!r}.")
        objects.append((line, value))
    notes: list[str] = []
    columns = _columns(list(objects[0][1]) if objects else [], name, notes)
    rows = []
    for line, value in objects:
        if list(value) != list(objects[0][1]):
            raise LayoutUnknown(f"Line {line} of {name}: expected the keys of its first line.")
        rows.append((line, tuple(unicodedata.normalize("NFC", _text(line, name, item)) for item in value.values())))
    return LabelTable(columns, tuple(rows), tuple(notes))


def _text(line: int, name: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "|".join(value) or "|"
    if value is None:
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    raise LayoutUnknown(f"Line {line} of {name}: expected a text, a number or a list of texts. Received {value!r}.")
