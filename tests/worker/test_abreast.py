from __future__ import annotations

import pytest
from clock import ByHand

from worker.inside.abreast import Abreast


def test_a_part_alone_says_how_far_it_is() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(3, 10, 0, 4.0, lambda: None)
    clock.sleep(6)
    said = abreast.move(3, 5.5)
    assert (said["stage"], said["fold"], said["folds"], said["epoch"], said["epochs"]) == ("folds", 3, 1, 6, 10)
    assert said["share"] == pytest.approx(0.55)
    assert said["spent_s"] == 6
    assert said["eta_s"] == pytest.approx(6 * 4.5 / 1.5), "what a checkpoint brought took no time"


def test_parts_side_by_side_say_how_far_they_are_together() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, 0.0, lambda: None)
    clock.sleep(6)
    abreast.move(0, 2.0)
    abreast.move(1, 4.0)
    said = abreast.move(2, 6.0)
    assert (said["folds"], said["share"]) == (3, pytest.approx(1.2))
    assert (said["spent_s"], said["eta_s"]) == (6, pytest.approx(6 * 18 / 12))
    abreast.end(2)
    clock.sleep(1)
    said = abreast.move(1, 5.0)
    assert (said["folds"], said["share"]) == (2, pytest.approx(0.7))
    assert (said["spent_s"], said["eta_s"]) == (7, pytest.approx(7 * 13 / 13)), (
        "those that have ended say what an epoch takes"
    )


def test_the_final_fit_begins_anew() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(0, 10, 0, 0.0, lambda: None)
    clock.sleep(9)
    abreast.move(0, 9.0)
    abreast.end(0)
    clock.sleep(20)
    abreast.begin(None, 4, 0, 0.0, lambda: None)
    clock.sleep(2)
    said = abreast.move(None, 1.0)
    assert (said["stage"], said["fold"], said["share"]) == ("final", None, 0.25)
    assert (said["spent_s"], said["eta_s"]) == (2, pytest.approx(2 * 3 / 1))


def test_how_long_a_network_takes_is_not_foretold_by_the_epochs_of_its_head() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(0, 100, 10, 0.0, lambda: None)
    clock.sleep(1)
    said = abreast.move(0, 20.0)
    assert (said["epoch"], said["epochs"], said["eta_s"]) == (21, 110, None)
    assert said["share"] == pytest.approx(0.05 * 0.2)
    clock.sleep(9)
    said = abreast.unfreeze(0, 20)
    assert (said["share"], said["epochs"], said["eta_s"]) == (pytest.approx(0.05), 30, None)
    clock.sleep(4)
    said = abreast.move(0, 22.0)
    assert said["share"] == pytest.approx(0.05 + 0.95 * 0.2)
    assert said["eta_s"] == pytest.approx(4 * 8 / 2), "what the head took does not count"
    assert said["spent_s"] == 14, "but belongs to what the fold took"


def test_a_network_that_goes_on_where_it_was_is_foretold_by_its_new_epochs() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(None, 4, 10, 9.0, lambda: None)
    clock.sleep(5)
    said = abreast.unfreeze(None, 4)
    assert (said["share"], said["eta_s"]) == (pytest.approx(0.05 + 0.95 * 0.5), None)
    clock.sleep(2)
    said = abreast.move(None, 10.0)
    assert (said["spent_s"], said["eta_s"]) == (7, pytest.approx(2 * 4 / 1))


def test_a_network_from_scratch_is_foretold_from_its_first_epoch_on() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(1, 0, 10, 0.0, lambda: None)
    clock.sleep(5)
    said = abreast.move(1, 2.5)
    assert (said["share"], said["epoch"], said["epochs"]) == (0.25, 3, 10)
    assert (said["spent_s"], said["eta_s"]) == (5, pytest.approx(5 * 7.5 / 2.5))


def test_what_is_learned_is_kept_and_what_has_ended_is_not() -> None:
    kept: list[int] = []
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, 0.0, lambda number=number: kept.append(number))  # type: ignore[misc]
    abreast.end(1)
    abreast.flush()
    assert kept == [0, 2]
