"""What a training child does with its checkpoints when there is nowhere to put them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import Bucket, NetworkProxy
from manual_clock import ManualClock

from artifacts.store import Digest, Store, Writer
from training.fitting.checkpoint import Checkpoint
from training.fitting.training_loop import Snapshot
from worker.child import checkpoints
from worker.child.channel import Channel
from worker.child.checkpoints import CheckpointWriter


class RecordingChannel(Channel):
    """The child's end of a conversation that only speaks."""

    def __init__(self) -> None:
        self.heard = io.StringIO()
        super().__init__(io.StringIO(), self.heard)

    def checkpoints(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.heard.getvalue().splitlines()]


def state(epochs: int) -> Checkpoint:
    """Return what there is after so many epochs."""
    history = [{"loss": 1.0 / (epoch + 1)} for epoch in range(epochs)]
    return Checkpoint(None, Snapshot(history, [np.arange(9.0)], [], None))


MARKED = {"run": "run_1"}


def writer(store: Store, said: RecordingChannel, found: list[Digest] | None = None) -> CheckpointWriter:
    return CheckpointWriter(said, store, MARKED, 0, found or [], share=1.0)


def offered(writer: CheckpointWriter, epochs: int) -> None:
    writer.offer(lambda: state(epochs))


def epochs_of(store: Store, said: RecordingChannel, kept: list[Digest]) -> int:
    """Return how many epochs the next attempt goes on from."""
    found = writer(store, said, kept).found
    assert found is not None and found.snapshot is not None
    return len(found.snapshot.history)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_training_goes_on(
    tmp_path: Path,
    fill_disk: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Filling(Store):
        """A folder on a disk that is full whenever somebody says so."""

        is_full = False

        def writer(self) -> Writer:
            writer = super().writer()
            if self.is_full:
                fill_disk(self.root / "incoming")
            return writer

    store, said = Filling(tmp_path / "store"), RecordingChannel()
    kept = writer(store, said)
    offered(kept, 1)
    (first,) = said.checkpoints()
    store.is_full = True
    offered(kept, 2)
    assert said.checkpoints() == [first] and "Checkpoint not written: The disk is full" in capsys.readouterr().err
    assert list(store.digests()) == [first["sha256"]] and not list((store.root / "incoming").iterdir())
    assert epochs_of(store, said, [first["sha256"]]) == 1
    store.is_full = False
    offered(kept, 3)
    _, third = said.checkpoints()
    assert third["epochs"] == 3 and epochs_of(store, said, [third["sha256"], first["sha256"]]) == 3


def test_a_checkpoint_that_the_bucket_does_not_take_leaves_the_one_before_and_the_training_goes_on(
    bucket: Bucket, line: NetworkProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, said = bucket.seen_from(tmp_path / "far", line.endpoint).store(), RecordingChannel()
    kept = writer(store, said)
    offered(kept, 1)
    line.cut()
    offered(kept, 2)
    line.mend()
    (first,) = said.checkpoints()
    assert bucket.digests() == {first["sha256"]} and "is unavailable" in capsys.readouterr().err
    there = bucket.seen_from(tmp_path / "there").store()
    assert epochs_of(there, said, [first["sha256"]]) == 1


def test_after_a_checkpoint_that_did_not_fit_the_disk_is_left_alone_for_a_while(
    tmp_path: Path, fill_disk: Callable[[Path], None]
) -> None:
    tried: list[int] = []

    class Full(Store):
        def writer(self) -> Writer:
            writer = super().writer()
            tried.append(1)
            fill_disk(self.root / "incoming")
            return writer

    kept = CheckpointWriter(RecordingChannel(), Full(tmp_path / "store"), MARKED, 0, [], share=0.5)
    kept._copied_at = kept._written_at = -1000.0
    offered(kept, 1)
    kept._copied_at = -1000.0
    offered(kept, 2)
    assert tried == [1] and kept._pause_s == checkpoints._DISK_PAUSE_S


def test_the_seconds_of_all_attempts_add_up_and_are_divided_among_those_who_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    monkeypatch.setattr(checkpoints, "time", clock)
    store, said = Store(tmp_path / "store"), RecordingChannel()
    kept: list[Digest] = []
    for abreast, spent_s, expected_s in ((1, 100.0, 100.0), (2, 60.0, 130.0), (1, 10.0, 140.0)):
        attempt = CheckpointWriter(said, store, MARKED, 0, kept[-1:], share=1.0, count_fits=lambda count=abreast: count)
        clock.sleep(spent_s)
        offered(attempt, 1)
        kept = [message["sha256"] for message in said.checkpoints()]
        found = writer(store, said, kept[-1:]).found
        assert found is not None and found.seconds == pytest.approx(expected_s)
    attempt._count_fits = lambda: 3
    clock.sleep(90.0)
    offered(attempt, 2)
    found = writer(store, said, [said.checkpoints()[-1]["sha256"]]).found
    assert found is not None and found.seconds == pytest.approx(170.0)


def test_a_harmed_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    store, said = Store(tmp_path / "store"), RecordingChannel()
    kept = writer(store, said)
    offered(kept, 1)
    offered(kept, 2)
    first, second = (Digest(message["sha256"]) for message in said.checkpoints())
    whole = store.read(second)
    store.path_for(second).write_bytes(whole[:-9])
    assert epochs_of(store, said, [second, first]) == 1
    store.delete(second)
    assert epochs_of(store, said, [second, first]) == 1
