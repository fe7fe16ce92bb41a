from __future__ import annotations

import pytest
from manual_clock import ManualClock

from recipes.recipe import Mode
from worker.messages import JobProgress
from worker.run_progress import ProgressEstimator

STATE = JobProgress(stage="folds", share=0.5, fold=0, epoch=2, epochs=3, spent_s=1.0, eta_s=1.0)


def test_a_part_alone_says_how_far_it_is() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    estimator.begin_fit(3, 10, 0, done=4.0)
    clock.sleep(6)
    said = estimator.epochs_done(3, 5.5)
    assert (said.stage, said.fold, said.folds, said.epoch, said.epochs) == ("folds", 3, 1, 6, 10)
    assert said.share == pytest.approx(0.55)
    assert said.spent_s == 6
    assert said.eta_s == pytest.approx(6 * 4.5 / 1.5), "what a checkpoint brought took no time"


def test_parts_side_by_side_say_how_far_they_are_together() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    for number in (0, 1, 2):
        estimator.begin_fit(number, 10, 0)
    clock.sleep(6)
    estimator.epochs_done(0, 2.0)
    estimator.epochs_done(1, 4.0)
    said = estimator.epochs_done(2, 6.0)
    assert (said.folds, said.share) == (3, pytest.approx(1.2))
    assert (said.spent_s, said.eta_s) == (6, pytest.approx(6 * 18 / 12))
    estimator.end_fit(2)
    clock.sleep(1)
    said = estimator.epochs_done(1, 5.0)
    assert (said.folds, said.share) == (2, pytest.approx(0.7))
    assert (said.spent_s, said.eta_s) == (7, pytest.approx(7 * 13 / 13)), (
        "those that have ended say what an epoch takes"
    )


def test_the_final_fit_begins_anew() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    estimator.begin_fit(0, 10, 0)
    clock.sleep(9)
    estimator.epochs_done(0, 9.0)
    estimator.end_fit(0)
    clock.sleep(20)
    estimator.begin_fit(None, 4, 0)
    clock.sleep(2)
    said = estimator.epochs_done(None, 1.0)
    assert (said.stage, said.fold, said.share) == ("final", None, 0.25)
    assert (said.spent_s, said.eta_s) == (2, pytest.approx(2 * 3 / 1))


def test_how_long_a_network_takes_is_foretold_neither_by_its_head_nor_by_its_first_step() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    estimator.begin_fit(0, 100, 10)
    clock.sleep(1)
    said = estimator.epochs_done(0, 20.0)
    assert (said.epoch, said.epochs, said.eta_s) == (21, 110, None)
    assert said.share == pytest.approx(0.05 * 0.2)
    said = estimator.network_unfrozen(0, 20)
    assert (said.share, said.epochs, said.eta_s) == (pytest.approx(0.05), 30, None)
    clock.sleep(30)  # the network is built and compiled
    assert estimator.epochs_done(0, 20.5).eta_s is None
    clock.sleep(3)
    said = estimator.epochs_done(0, 22.0)
    assert said.share == pytest.approx(0.05 + 0.95 * 0.2)
    assert said.eta_s == pytest.approx(3 * 8 / 1.5)
    assert said.spent_s == 34, "all of it is what the fold took"


def test_a_network_that_goes_on_where_it_was_is_foretold_by_its_new_epochs() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    estimator.begin_fit(None, 4, 10, done=9.0, spent_s=100.0)
    clock.sleep(5)
    said = estimator.network_unfrozen(None, 4)
    assert (said.share, said.eta_s) == (pytest.approx(0.05 + 0.95 * 0.5), None)
    assert estimator.epochs_done(None, 9.5).eta_s is None
    clock.sleep(2)
    said = estimator.epochs_done(None, 10.0)
    assert said.eta_s == pytest.approx(2 * 4 / 0.5)
    assert said.spent_s == 107, "with those of the attempts before"


def test_what_other_parts_did_before_a_network_learned_along_foretells_nothing() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    for number in (0, 1):
        estimator.begin_fit(number, 4, 10)
        estimator.network_unfrozen(number, 4)
    clock.sleep(50)
    estimator.epochs_done(0, 5.0)
    clock.sleep(6)
    said = estimator.epochs_done(1, 6.0)
    assert said.eta_s == pytest.approx(6 * (9 + 8) / 2)


def test_a_network_from_scratch_is_foretold_from_its_first_epoch_on() -> None:
    clock = ManualClock()
    estimator = ProgressEstimator(clock.monotonic)
    estimator.begin_fit(1, 0, 10)
    clock.sleep(5)
    said = estimator.epochs_done(1, 2.5)
    assert (said.share, said.epoch, said.epochs) == (0.25, 3, 10)
    assert (said.spent_s, said.eta_s) == (5, pytest.approx(5 * 7.5 / 2.5))


def test_folds_that_ended_foretell_those_that_do_not_know_yet_and_the_final_fit() -> None:
    head = STATE.model_copy(update={"eta_s": None, "spent_s": 4.0})
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 3, [], [head])["eta_s"] is None, "the network has not begun"
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 3, [10.0], [head])["eta_s"] == pytest.approx(6.0 + 10.0 + 10.0)
    final = head.model_copy(update={"stage": "final", "fold": None})
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 3, [10.0, 10.0, 13.0], [final])["eta_s"] == pytest.approx(
        11.0 - 4.0
    )
    late = final.model_copy(update={"spent_s": 20.0})
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 3, [10.0, 10.0, 13.0], [late])["eta_s"] == 0.0


def test_a_fold_that_does_not_know_yet_takes_as_long_as_one_that_does() -> None:
    nearly = STATE.model_copy(update={"spent_s": 990.0, "eta_s": 10.0})
    begun = STATE.model_copy(update={"fold": 1, "spent_s": 20.0, "eta_s": None})
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 2, [], [nearly, begun])["eta_s"] == pytest.approx(980.0 + 1000.0)
    brought = STATE.model_copy(update={"spent_s": 900.0, "eta_s": 100.0})  # a checkpoint had most of it
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 3, [], [brought])["eta_s"] == pytest.approx(
        100.0 + 2 * 1000.0 + 1000.0
    )


def test_a_fold_that_takes_longer_than_others_is_believed() -> None:
    slow = STATE.model_copy(update={"fold": 1, "spent_s": 30.0, "eta_s": 7.0})
    assert ProgressEstimator.of_run(Mode.FINE_TUNING, 2, [10.0], [slow])["eta_s"] == pytest.approx(7.0 + 10.0)
