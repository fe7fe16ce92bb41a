from __future__ import annotations

import time

import pytest

from worker.inside.abreast import Abreast


def test_a_part_alone_says_how_far_it_is() -> None:
    abreast = Abreast()
    abreast.begin(3, 10, 0, 4.0, lambda: None)
    time.sleep(0.05)
    said = abreast.move(3, 5.5)
    assert (said["stage"], said["fold"], said["folds"], said["epoch"], said["epochs"]) == ("folds", 3, 1, 6, 10)
    assert said["share"] == pytest.approx(0.55)
    assert said["eta_s"] == pytest.approx(said["spent_s"] * 4.5 / 1.5), "what a checkpoint brought took no time"


def test_parts_side_by_side_say_how_far_they_are_together() -> None:
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, 0.0, lambda: None)
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
    abreast.begin(0, 10, 0, 0.0, lambda: None)
    abreast.move(0, 9.0)
    abreast.end(0)
    time.sleep(0.2)
    abreast.begin(None, 4, 0, 0.0, lambda: None)
    said = abreast.move(None, 1.0)
    assert (said["stage"], said["fold"], said["share"]) == ("final", None, 0.25)
    assert said["spent_s"] < 0.2


def test_how_long_a_network_takes_is_not_foretold_by_the_epochs_of_its_head() -> None:
    abreast = Abreast()
    abreast.begin(0, 100, 10, 0.0, lambda: None)
    time.sleep(0.02)
    said = abreast.move(0, 20.0)
    assert (said["epoch"], said["epochs"], said["eta_s"]) == (21, 110, None)
    assert said["share"] == pytest.approx(0.05 * 0.2)
    time.sleep(0.2)
    said = abreast.unfreeze(0, 20)
    assert (said["share"], said["epochs"], said["eta_s"]) == (pytest.approx(0.05), 30, None)
    time.sleep(0.02)
    said = abreast.move(0, 22.0)
    assert said["share"] == pytest.approx(0.05 + 0.95 * 0.2)
    assert 0 < said["eta_s"] < 4 * (said["spent_s"] - 0.2), "what the head took does not count"
    assert said["spent_s"] > 0.2, "but belongs to what the fold took"


def test_a_network_that_goes_on_where_it_was_is_foretold_by_its_new_epochs() -> None:
    abreast = Abreast()
    abreast.begin(None, 4, 10, 9.0, lambda: None)
    said = abreast.unfreeze(None, 4)
    assert (said["share"], said["eta_s"]) == (pytest.approx(0.05 + 0.95 * 0.5), None)
    time.sleep(0.02)
    said = abreast.move(None, 10.0)
    assert said["eta_s"] == pytest.approx(4 * said["spent_s"], rel=0.5)


def test_a_network_from_scratch_is_foretold_from_its_first_epoch_on() -> None:
    abreast = Abreast()
    abreast.begin(1, 0, 10, 0.0, lambda: None)
    time.sleep(0.02)
    said = abreast.move(1, 2.5)
    assert (said["share"], said["epoch"], said["epochs"]) == (0.25, 3, 10)
    assert said["eta_s"] == pytest.approx(3 * said["spent_s"])


def test_what_is_learned_is_kept_and_what_has_ended_is_not() -> None:
    kept: list[int] = []
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, 0.0, lambda number=number: kept.append(number))  # type: ignore[misc]
    abreast.end(1)
    abreast.flush()
    assert kept == [0, 2]
