"""The manifest of a data set version: a file with one line of JSON for each image, sorted by path.

A run learns from the manifest alone which images a version has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from artifacts.layout import Split
from artifacts.store import Digest, parse_digest


@dataclass(frozen=True)
class Row:
    """One image of a data set version. Row i of an array with values for images belongs to image i of the manifest."""

    path: str
    sha256: Digest
    labels: tuple[str, ...]
    target: float | None
    group: str | None
    split: Split


def dump(rows: Iterable[Row]) -> bytes:
    """Return the bytes of a manifest with these rows, sorted by path."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in sorted(rows, key=lambda row: row.path))
    return "".join(line + "\n" for line in lines).encode()


def load(data: bytes) -> list[Row]:
    """Return the rows of a manifest in its order, which is sorted by path."""
    return [_row(json.loads(line)) for line in data.decode().split("\n") if line]


def _row(fields: dict[str, Any]) -> Row:
    return Row(
        path=fields["path"],
        sha256=parse_digest(fields["sha256"]),
        labels=tuple(fields["labels"]),
        target=fields["target"],
        group=fields["group"],
        split=Split(fields["split"]),
    )


def group_rows(rows: Sequence[Row]) -> list[int]:
    """Return a group number for each row.

    Rows with the same group or the same file get the same number, and so do rows that are linked through other rows.
    """
    leader = list(range(len(rows)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows):
        keys = [("file", str(row.sha256))] + ([("group", row.group)] if row.group is not None else [])
        for key in keys:
            leader[find(number)] = find(first.setdefault(key, number))
    return [find(number) for number in range(len(rows))]


def splits_of(rows: Sequence[Row], groups: Sequence[int]) -> list[Split]:
    """Return the split of each row, where all rows of a group get the same split.

    A group is in `test` if any of its rows is, otherwise in `validation` if any of its rows is, otherwise in `train`.
    """
    rank = {Split.TRAIN: 0, Split.VALIDATION: 1, Split.TEST: 2}
    best: dict[int, Split] = {}
    for row, group in zip(rows, groups, strict=True):
        best[group] = max(best.get(group, Split.TRAIN), row.split, key=rank.__getitem__)
    return [best[group] for group in groups]
