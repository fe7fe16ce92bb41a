from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manual_clock import ManualClock

from artifacts.images import ImageLimits
from artifacts.store import Store, StoreAddress, digest_of
from recipes.recipe import Precision
from training.fitting.checkpoint import Checkpoint
from training.fitting.fold_outcome import FoldOutcome
from training.fitting.learners import Plan
from training.fitting.training_loop import Snapshot
from training.progress import FoldResult
from worker.child.channel import Channel
from worker.child.run_reporter import Heartbeat, RunReporter
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
        bit_depth=16,
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


def test_on_a_drain_every_fit_that_runs_writes_its_last_state_and_one_that_has_ended_does_not(store: Store) -> None:
    heard = io.StringIO()
    order = training_order(store.root).model_copy(update={"checkpoint_share": 0.001})  # too little to write anything
    reporter = RunReporter(Channel(io.StringIO(), heard), store, order)
    fits = [reporter.begin_fit(fold, Plan(10)) for fold in range(3)]
    for fit in fits:
        fit._writer._copied_at = -1000.0
        fit.offer_checkpoint(lambda: Checkpoint(None, Snapshot([{"loss": 1.0}], [np.arange(9.0)], [], None)))
    result = FoldResult(1, 1, 1, "epochs", metrics={}, history=[], seconds=1.0)
    reporter.fold_ended(FoldOutcome(result, (), "head", {Precision.FLOAT32: np.zeros((1, 1), np.float32)}))
    reporter.flush()
    messages = [json.loads(line) for line in heard.getvalue().splitlines()]
    assert [message["fold"] for message in messages if message["type"] == "checkpoint"] == [0, 2]


def test_a_child_says_at_most_once_a_second_that_it_lives_and_what_a_step_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, said = ManualClock(), io.StringIO()
    monkeypatch.setattr("worker.child.run_reporter.time", clock)
    heartbeat = Heartbeat(Channel(io.StringIO(), said))
    for _ in range(11):
        clock.sleep(0.25)
        heartbeat.step()
    messages = [json.loads(line) for line in said.getvalue().splitlines()]
    assert messages == [{"type": "alive", "step_s": 0.25}] * 2


def test_a_child_says_at_once_that_a_network_learns_along_and_then_what_its_epochs_take(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, heard = ManualClock(), io.StringIO()
    monkeypatch.setattr("worker.child.run_reporter.time", clock)
    reporter = RunReporter(Channel(io.StringIO(), heard), store, training_order(store.root))
    fit = reporter.begin_fit(0, Plan(4, 10))

    def said() -> list[dict[str, Any]]:
        messages = map(json.loads, heard.getvalue().splitlines())
        return [message["state"] for message in messages if message["type"] == "progress"]

    clock.sleep(5)
    fit.epochs_done(2.0)
    assert (said()[-1]["epochs"], said()[-1]["eta_s"]) == (14, None)
    fit.network_unfrozen(2)
    assert (said()[-1]["epochs"], said()[-1]["share"], said()[-1]["eta_s"]) == (12, 0.05, None)
    clock.sleep(5)
    fit.epochs_done(2.5)
    clock.sleep(5)
    fit.epochs_done(3.0)
    assert said()[-1]["eta_s"] == pytest.approx(5 * 9 / 0.5)
    before = len(said())
    clock.sleep(5)
    reporter.images(0, 1)
    assert len(said()) == before, "that is a sign of life alone"
    reporter.images(1, 2)
    assert said()[-1]["share"] == 0.5
