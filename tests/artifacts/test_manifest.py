"""The manifest of a data set version, its groups and its splits."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.layout import Split
from artifacts.manifest import Row, dump, group_rows, load, splits_of
from artifacts.store import digest_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FILES = [digest_of(bytes([number])) for number in range(5)]
ROW = Row("daisy/1.png", FILES[0], ("daisy",), None, None, Split.TRAIN)

rows_of_anything = st.lists(
    st.builds(
        Row,
        path=TEXTS,
        sha256=st.binary(max_size=8).map(digest_of),
        labels=st.lists(TEXTS, max_size=3).map(tuple),
        target=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        group=st.none() | TEXTS,
        split=st.sampled_from(Split),
    ),
    max_size=8,
    unique_by=lambda row: row.path,
)

# Few files and few groups, so that rows meet often.
rows_that_meet = st.lists(
    st.builds(
        replace,
        st.just(ROW),
        sha256=st.sampled_from(FILES),
        group=st.none() | st.sampled_from(["", "a", "b", "c", *FILES]),
        split=st.sampled_from(Split),
    ),
    max_size=12,
)


def belong_together(one: Row, other: Row) -> bool:
    return one.sha256 == other.sha256 or (one.group is not None and one.group == other.group)


def closed(rows: Sequence[Row]) -> list[set[int]]:
    """Return, for each row, the rows in its group, found by walking from row to row."""
    found = []
    for start in range(len(rows)):
        reached, ahead = {start}, [start]
        while ahead:
            here = ahead.pop()
            near = {there for there in range(len(rows)) if belong_together(rows[here], rows[there])} - reached
            reached |= near
            ahead += near
        found.append(reached)
    return found


# --- the file --------------------------------------------------------------------------------------------------------


@given(rows_of_anything)
def test_rows_come_back_in_the_order_of_their_paths(rows: list[Row]) -> None:
    assert load(dump(rows)) == sorted(rows, key=lambda row: row.path)


@given(rows_of_anything, st.randoms())
def test_the_order_of_the_rows_does_not_change_the_manifest(rows: list[Row], source: random.Random) -> None:
    shuffled = source.sample(rows, len(rows))
    assert dump(shuffled) == dump(rows)
    assert dump(load(dump(rows))) == dump(rows)


def test_each_image_is_one_line_of_json() -> None:
    strange = replace(ROW, path="daisy/\u2028é\n.png", labels=("a", "b"), target=0.1, group="g", split=Split.TEST)
    lines = dump([ROW, strange]).decode().removesuffix("\n").split("\n")
    assert [json.loads(line)["path"] for line in lines] == [ROW.path, strange.path]
    assert json.loads(lines[1]) == {
        "path": strange.path,
        "sha256": FILES[0],
        "labels": ["a", "b"],
        "target": 0.1,
        "group": "g",
        "split": "test",
    }


def test_a_manifest_may_be_empty() -> None:
    assert dump([]) == b""
    assert load(b"") == []


@pytest.mark.parametrize(("field", "value"), [("sha256", "x" * 64), ("sha256", ""), ("split", "holdout")])
def test_a_manifest_that_was_not_written_here_is_not_believed(field: str, value: str) -> None:
    line = json.loads(dump([ROW])) | {field: value}
    with pytest.raises(ValueError, match=value or "Received"):
        load(json.dumps(line).encode())


# --- groups ----------------------------------------------------------------------------------------------------------


@given(rows_that_meet)
def test_rows_share_a_number_exactly_if_a_chain_of_files_and_groups_joins_them(rows: list[Row]) -> None:
    groups = group_rows(rows)
    assert len(groups) == len(rows)
    for number, together in enumerate(closed(rows)):
        assert {other for other, group in enumerate(groups) if group == groups[number]} == together


@given(rows_that_meet, st.randoms())
def test_the_order_of_the_rows_does_not_change_the_groups(rows: list[Row], source: random.Random) -> None:
    order = source.sample(range(len(rows)), len(rows))
    groups, shuffled = group_rows(rows), group_rows([rows[number] for number in order])
    for one, other in itertools.combinations(range(len(rows)), 2):
        assert (shuffled[one] == shuffled[other]) == (groups[order[one]] == groups[order[other]])


def test_a_group_that_is_named_like_a_file_is_not_that_file() -> None:
    rows = [replace(ROW, group=FILES[1]), replace(ROW, sha256=FILES[1])]
    assert len(set(group_rows(rows))) == 2


def test_rows_without_a_group_stand_alone() -> None:
    assert len(set(group_rows([replace(ROW, sha256=file) for file in FILES]))) == len(FILES)
    assert group_rows([]) == []


def test_a_long_chain_is_one_group() -> None:
    rows = [
        replace(ROW, sha256=digest_of(str((number + 1) // 2).encode()), group=f"g{number // 2}")
        for number in range(20_000)
    ]
    assert len(set(group_rows(rows))) == 1
    assert len(set(group_rows(rows[::-1]))) == 1


# --- splits ----------------------------------------------------------------------------------------------------------

RANK = [Split.TRAIN, Split.VALIDATION, Split.TEST]


@given(rows_that_meet)
def test_a_group_is_in_one_split_test_before_validation_before_train(rows: list[Row]) -> None:
    splits = splits_of(rows, group_rows(rows))
    assert len(splits) == len(rows)
    for number, together in enumerate(closed(rows)):
        assert splits[number] is max((rows[other].split for other in together), key=RANK.index)


def test_a_copy_of_a_test_image_is_not_trained_on() -> None:
    rows = [replace(ROW, path="train/1.png"), replace(ROW, path="test/9.png", split=Split.TEST)]
    assert splits_of(rows, group_rows(rows)) == [Split.TEST, Split.TEST]
