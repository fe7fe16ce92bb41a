"""The tree of errors: its drawing in the module's docstring, and errors that are sent to another process."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import errors
from errors import (
    Crashed,
    EspalierError,
    ImageRefused,
    Invalid,
    RecipeInvalid,
    Refused,
    StoreRefused,
    StoreUnavailable,
    Unavailable,
    errors_by_code,
    from_record,
)

ALL = pytest.mark.parametrize("kind", errors_by_code().values(), ids=list(errors_by_code()))


def descendants(kind: type[EspalierError]) -> list[type[EspalierError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in descendants(child))]


def drawn() -> dict[str, str]:
    """Return each error that the module's docstring draws, with the name above it."""
    above: dict[int, str] = {-1: ""}
    found = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"([│ ]*(?:[├└]── )?)([A-Z][A-Za-z]+)(?:  +\S.*)?", line):
            depth = len(match[1]) // 4
            found[match[2]] = above[depth - 1]
            above[depth] = match[2]
    return found


def make(kind: type[EspalierError], detail: str, **extra: Any) -> EspalierError:
    return kind("head.l2", detail, **extra) if kind is RecipeInvalid else kind(detail, **extra)


def test_the_tree_is_the_one_that_is_drawn() -> None:
    classes = descendants(EspalierError)
    real = {kind.__name__: kind.__mro__[1].__name__ for kind in classes} | {"EspalierError": ""}
    assert drawn() == real


def test_no_two_errors_share_a_code() -> None:
    classes = descendants(EspalierError)
    assert {kind.code: kind for kind in classes} == dict(errors_by_code())
    assert len(errors_by_code()) == len(classes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in errors_by_code())


@ALL
def test_each_error_says_in_its_docstring_what_happened(kind: type[EspalierError]) -> None:
    assert "__doc__" in vars(kind)
    assert kind.__doc__ and kind.__doc__.endswith(".")


def test_only_what_may_pass_by_itself_is_transient() -> None:
    assert {kind for kind in errors_by_code().values() if kind.is_transient} == {
        Unavailable,
        StoreUnavailable,
        StoreRefused,
        Crashed,
    }


@ALL
def test_an_error_comes_back_from_its_record_as_it_was(kind: type[EspalierError]) -> None:
    error = make(kind, "Expected one thing. Received: another.", image=3)
    again = from_record(json.loads(json.dumps(error.record())))
    assert type(again) is kind
    assert str(again) == again.detail == error.detail == str(error)
    assert again.extra == error.extra
    assert again.record() == error.record()
    assert again.record()["code"] == kind.code


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.lists(st.integers(), max_size=3)


@given(
    st.sampled_from(sorted(errors_by_code())),
    st.text(),
    st.dictionaries(st.sampled_from(["image", "limit", "received", "field"]), plain),
)
def test_any_record_survives_the_way_there_and_back(code: str, detail: str, extra: dict[str, Any]) -> None:
    record = {"code": code, "detail": detail, **extra}
    if code == RecipeInvalid.code:
        record.setdefault("field", "epochs")
    assert from_record(record).record() == record


def test_a_recipe_error_keeps_its_field() -> None:
    error = RecipeInvalid("folds.k", "Expected at most 3 folds. Received 5.", limit=3)
    assert error.field == "folds.k"
    assert error.record() == {
        "code": "recipe-invalid",
        "detail": "Expected at most 3 folds. Received 5.",
        "field": "folds.k",
        "limit": 3,
    }
    again = from_record(error.record())
    assert isinstance(again, RecipeInvalid) and again.field == "folds.k"


@pytest.mark.parametrize("record", [{"code": "from-a-newer-version", "detail": "something"}, {"detail": "something"}])
def test_an_unknown_code_is_an_error_all_the_same(record: dict[str, Any]) -> None:
    error = from_record(record)
    assert type(error) is EspalierError
    assert error.record() == {"code": "internal", "detail": "something"}


def test_a_record_may_be_empty_and_is_not_changed() -> None:
    record: dict[str, Any] = {}
    assert from_record(record).detail == ""
    kept = ImageRefused("too large", image=1).record()
    from_record(kept)
    assert kept == {"code": "image-refused", "detail": "too large", "image": 1}


def test_what_was_sent_wrongly_is_invalid() -> None:
    with pytest.raises(Invalid, match="too large"):
        raise from_record(ImageRefused("too large").record())


def test_a_refused_file_is_a_value() -> None:
    assert Refused("a/1.png", "damaged") == Refused("a/1.png", "damaged")
    assert vars(Refused("a/1.png", "damaged")) == {"path": "a/1.png", "reason": "damaged"}
    assert not isinstance(Refused("a/1.png", "damaged"), Exception)
    with pytest.raises(FrozenInstanceError):
        Refused("a/1.png", "damaged").reason = "sound"  # type: ignore[misc]  # this is the point
