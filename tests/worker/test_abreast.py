from __future__ import annotations

import time

import pytest

from worker.inside.abreast import Abreast


def test_a_part_alone_says_how_far_it_is() -> None:
    abreast = Abreast()
    abreast.begin(3, 10, 4.0, lambda: None)
    time.sleep(0.05)
    said = abreast.move(3, 5.5)
    assert (said["stage"], said["fold"], said["folds"], said["epoch"], said["epochs"]) == ("folds", 3, 1, 6, 10)
    assert said["share"] == pytest.approx(0.55)
    assert said["eta_s"] == pytest.approx(said["spent_s"] * 4.5 / 1.5), "what a checkpoint brought took no time"


def test_parts_side_by_side_say_how_far_they_are_together() -> None:
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0.0, lambda: None)
    time.sleep(0.05)
    abreast.move(0, 2.0)
    abreast.move(1, 4.0)
    said = abreast.move(2, 6.0)
    assert (said["folds"], said["share"]) == (3, pytest.approx(1.2))
    assert said["eta_s"] == pytest.approx(said["spent_s"] * 18 / 12)
    abreast.end(2)
    said = abreast.move(1, 5.0)
    assert (said["folds"], said["share"]) == (2, pytest.approx(0.7))
    assert said["eta_s"] == pytest.approx(said["spent_s"] * 13 / 13), "those that have ended say what an epoch takes"


def test_the_final_fit_begins_anew() -> None:
    abreast = Abreast()
    abreast.begin(0, 10, 0.0, lambda: None)
    abreast.move(0, 9.0)
    abreast.end(0)
    time.sleep(0.2)
    abreast.begin(None, 4, 0.0, lambda: None)
    said = abreast.move(None, 1.0)
    assert (said["stage"], said["fold"], said["share"]) == ("final", None, 0.25)
    assert said["spent_s"] < 0.2


def test_what_is_learned_is_kept_and_what_has_ended_is_not() -> None:
    kept: list[int] = []
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0.0, lambda number=number: kept.append(number))  # type: ignore[misc]
    abreast.end(1)
    abreast.flush()
    assert kept == [0, 2]
