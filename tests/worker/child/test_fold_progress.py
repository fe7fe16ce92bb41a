from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from manual_clock import ByHand

from artifacts.images import ImageLimits
from artifacts.store import Store, StoreAddress, digest_of
from training.fitting.learners import Plan
from worker.child.channel import Channel
from worker.child.fold_progress import Abreast
from worker.child.train import _Reporter
from worker.messages import TrainingSpec, TrainOrder, TrainPart, WeightsSource


def training_order(folder: Path) -> TrainOrder:
    """Return the order to train a run that nothing is known of yet."""
    spec = TrainingSpec(
        run="run_1",
        store=StoreAddress(str(folder)),
        features="",
        pixels="",
        pixels_bytes=0,
        image_limits=ImageLimits(),
        threads=1,
        source=WeightsSource("", "", 1.0, 1.0),
        recipe={},
        manifest=digest_of(b"manifest"),
        labels=(),
        weights=None,
        candidates={},
    )
    return TrainOrder(
        part=TrainPart.ALL,
        fold=0,
        outcomes={},
        checkpoints={},
        final_checkpoints=(),
        checkpoint_share=1.0,
        extraction=None,
        spec=spec,
    )


def test_a_part_alone_says_how_far_it_is() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(3, 10, 0, lambda: None, done=4.0)
    clock.sleep(6)
    said = abreast.move(3, 5.5)
    assert (said.stage, said.fold, said.folds, said.epoch, said.epochs) == ("folds", 3, 1, 6, 10)
    assert said.share == pytest.approx(0.55)
    assert said.spent_s == 6
    assert said.eta_s == pytest.approx(6 * 4.5 / 1.5), "what a checkpoint brought took no time"


def test_parts_side_by_side_say_how_far_they_are_together() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, lambda: None)
    clock.sleep(6)
    abreast.move(0, 2.0)
    abreast.move(1, 4.0)
    said = abreast.move(2, 6.0)
    assert (said.folds, said.share) == (3, pytest.approx(1.2))
    assert (said.spent_s, said.eta_s) == (6, pytest.approx(6 * 18 / 12))
    abreast.end(2)
    clock.sleep(1)
    said = abreast.move(1, 5.0)
    assert (said.folds, said.share) == (2, pytest.approx(0.7))
    assert (said.spent_s, said.eta_s) == (7, pytest.approx(7 * 13 / 13)), (
        "those that have ended say what an epoch takes"
    )


def test_the_final_fit_begins_anew() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(0, 10, 0, lambda: None)
    clock.sleep(9)
    abreast.move(0, 9.0)
    abreast.end(0)
    clock.sleep(20)
    abreast.begin(None, 4, 0, lambda: None)
    clock.sleep(2)
    said = abreast.move(None, 1.0)
    assert (said.stage, said.fold, said.share) == ("final", None, 0.25)
    assert (said.spent_s, said.eta_s) == (2, pytest.approx(2 * 3 / 1))


def test_how_long_a_network_takes_is_foretold_neither_by_its_head_nor_by_its_first_step() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(0, 100, 10, lambda: None)
    clock.sleep(1)
    said = abreast.move(0, 20.0)
    assert (said.epoch, said.epochs, said.eta_s) == (21, 110, None)
    assert said.share == pytest.approx(0.05 * 0.2)
    said = abreast.unfreeze(0, 20)
    assert (said.share, said.epochs, said.eta_s) == (pytest.approx(0.05), 30, None)
    clock.sleep(30)  # the network is built and compiled
    assert abreast.move(0, 20.5).eta_s is None
    clock.sleep(3)
    said = abreast.move(0, 22.0)
    assert said.share == pytest.approx(0.05 + 0.95 * 0.2)
    assert said.eta_s == pytest.approx(3 * 8 / 1.5)
    assert said.spent_s == 34, "all of it is what the fold took"


def test_a_network_that_goes_on_where_it_was_is_foretold_by_its_new_epochs() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(None, 4, 10, lambda: None, done=9.0, brought_s=100.0)
    clock.sleep(5)
    said = abreast.unfreeze(None, 4)
    assert (said.share, said.eta_s) == (pytest.approx(0.05 + 0.95 * 0.5), None)
    assert abreast.move(None, 9.5).eta_s is None
    clock.sleep(2)
    said = abreast.move(None, 10.0)
    assert said.eta_s == pytest.approx(2 * 4 / 0.5)
    assert said.spent_s == 107, "with those of the attempts before"


def test_what_other_parts_did_before_a_network_learned_along_foretells_nothing() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    for number in (0, 1):
        abreast.begin(number, 4, 10, lambda: None)
        abreast.unfreeze(number, 4)
    clock.sleep(50)
    abreast.move(0, 5.0)
    clock.sleep(6)
    said = abreast.move(1, 6.0)
    assert said.eta_s == pytest.approx(6 * (9 + 8) / 2)


def test_a_network_from_scratch_is_foretold_from_its_first_epoch_on() -> None:
    clock = ByHand()
    abreast = Abreast(clock.monotonic)
    abreast.begin(1, 0, 10, lambda: None)
    clock.sleep(5)
    said = abreast.move(1, 2.5)
    assert (said.share, said.epoch, said.epochs) == (0.25, 3, 10)
    assert (said.spent_s, said.eta_s) == (5, pytest.approx(5 * 7.5 / 2.5))


def test_what_is_learned_is_kept_and_what_has_ended_is_not() -> None:
    kept: list[int] = []
    abreast = Abreast()
    for number in (0, 1, 2):
        abreast.begin(number, 10, 0, lambda number=number: kept.append(number))  # type: ignore[misc]
    abreast.end(1)
    abreast.flush()
    assert kept == [0, 2]


def test_a_child_says_at_once_that_a_network_learns_along_and_then_what_its_epochs_take(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, heard = ByHand(), io.StringIO()
    monkeypatch.setattr("worker.child.train.time", clock)
    monkeypatch.setattr("worker.child.train.Abreast", lambda: Abreast(clock.monotonic))
    reporter = _Reporter(Channel(io.StringIO(), heard), store)
    reporter.follow(training_order(store.root))
    part = reporter.part(0, Plan(4, 10))

    def said() -> list[dict[str, Any]]:
        messages = map(json.loads, heard.getvalue().splitlines())
        return [message["state"] for message in messages if message["type"] == "progress"]

    clock.sleep(5)
    part.batch(2.0)
    assert (said()[-1]["epochs"], said()[-1]["eta_s"]) == (14, None)
    part.unfrozen(2)
    assert (said()[-1]["epochs"], said()[-1]["share"], said()[-1]["eta_s"]) == (12, 0.05, None)
    clock.sleep(5)
    part.batch(2.5)
    clock.sleep(5)
    part.batch(3.0)
    assert said()[-1]["eta_s"] == pytest.approx(5 * 9 / 0.5)
    before = len(said())
    clock.sleep(5)
    reporter.images(0, 1)
    assert len(said()) == before, "that is a sign of life alone"
    reporter.images(1, 2)
    assert said()[-1]["share"] == 0.5
