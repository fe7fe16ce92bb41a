from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sample
from working import slow_jpeg

from artifacts.bundle import Bundle, Dense
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.recipe import Activation, Precision, Resize, Task
from artifacts.store import Digest, Store
from errors import BundleRefused, Corrupt, DeadlineExceeded, ImageRefused, NotFound
from inference import heads
from inference.engine import Engine, FlatEngine
from inference.predictor import Predictor
from inference.shelf import Shelf

SIZE = 8
LIMITS = ImageLimits()


def make_bundle(backbone: Digest, seed: int = 0) -> Bundle:
    """Return a bundle for the flat engine: brightness of the red channel decides."""
    random = np.random.default_rng(seed)
    layers = (Dense(random.normal(size=(48, 2)).astype(np.float32), np.zeros(2, np.float32), Activation.LINEAR),)
    golden = random.integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    return Bundle(
        task=Task.MULTICLASS,
        labels=("dark", "light"),
        backbone=backbone,
        engine="flat",
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=SIZE,
        resize=Resize.SQUASH,
        layers=layers,
        golden_input=golden,
        golden_output=heads.logits(layers, FlatEngine().features(golden)),
    )


class Loads:
    """Loads flat engines and counts them."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path: Path, precision: Precision, threads: int) -> Engine:
        self.gate.wait(10)
        self.paths.append(path)
        return FlatEngine()


def put(store: Store, backbone: bytes = b"a network", seed: int = 0) -> Digest:
    return store.put(make_bundle(store.put(backbone), seed).dump())


def test_models_on_one_backbone_share_its_engine(store: Store) -> None:
    loads = Loads()
    shelf = Shelf(store, threads=1, budget_bytes=10**6, load=loads)
    one, other = (shelf.predictor(put(store, seed=seed)) for seed in (1, 2))
    assert len(loads.paths) == 1
    assert one.bundle.dump() != other.bundle.dump()
    assert shelf.predictor(put(store, seed=1)) is one


def test_many_who_ask_at_once_wait_for_one_load(store: Store) -> None:
    loads = Loads()
    loads.gate.clear()
    shelf = Shelf(store, threads=1, budget_bytes=10**6, load=loads)
    digest = put(store)
    found: list[Predictor] = []
    threads = [threading.Thread(target=lambda: found.append(shelf.predictor(digest))) for _ in range(8)]
    for thread in threads:
        thread.start()
    loads.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8 and len(loads.paths) == 1


def test_the_backbone_not_asked_for_longest_makes_room(store: Store) -> None:
    loads = Loads()
    digests = [put(store, backbone=bytes([number]) * 10_000) for number in range(3)]
    shelf = Shelf(store, threads=1, budget_bytes=50_000, load=loads)  # two of 2 x 10,000 bytes fit, with their models
    for digest in (*digests[:2], digests[0], digests[2], digests[0]):
        shelf.predictor(digest)
    assert len(loads.paths) == 3
    shelf.predictor(digests[1])
    assert len(loads.paths) == 4


def test_the_model_not_asked_for_longest_makes_room_and_its_backbone_stays(store: Store) -> None:
    loads = Loads()
    digests = [put(store, seed=seed) for seed in range(3)]
    two = 2 * len(b"a network") + sum(len(store.read(digest)) for digest in digests[:2])
    shelf = Shelf(store, threads=1, budget_bytes=two + 100, load=loads)
    first, second = (shelf.predictor(digest) for digest in digests[:2])
    assert shelf.predictor(digests[0]) is first
    shelf.predictor(digests[2])
    assert shelf.predictor(digests[0]) is first
    assert shelf.predictor(digests[1]) is not second
    assert len(loads.paths) == 1


def test_many_models_do_not_grow_past_the_budget(store: Store) -> None:
    budget_bytes = 50_000
    shelf = Shelf(store, threads=1, budget_bytes=budget_bytes, load=Loads())
    one_bytes = len(store.read(put(store)))
    kept = [weakref.ref(shelf.predictor(put(store, seed=seed))) for seed in range(200)]
    gc.collect()
    assert 10 < sum(predictor() is not None for predictor in kept) <= budget_bytes / one_bytes


def test_a_model_larger_than_the_budget_is_served_all_the_same(store: Store) -> None:
    loads = Loads()
    shelf = Shelf(store, threads=1, budget_bytes=1, load=loads)
    one, other = put(store, backbone=b"one"), put(store, backbone=b"other")
    predictor = shelf.predictor(one)
    assert shelf.predictor(one) is predictor
    shelf.predictor(other)
    assert len(loads.paths) == 2
    assert shelf.predictor(one) is not predictor and len(loads.paths) == 3


def test_a_bundle_whose_golden_output_does_not_come_out_is_refused(store: Store) -> None:
    bundle = make_bundle(store.put(b"a network"))
    wrong = replace(bundle, golden_output=bundle.golden_output + 0.5 * np.abs(bundle.golden_output).max())
    shelf = Shelf(store, threads=1, budget_bytes=10**6, load=Loads())
    with pytest.raises(BundleRefused, match="answers differently"):
        shelf.predictor(store.put(wrong.dump()))
    not_a_number = replace(bundle, golden_output=np.full_like(bundle.golden_output, np.nan))
    with pytest.raises(BundleRefused, match="answers differently"):
        shelf.predictor(store.put(not_a_number.dump()))


def test_a_bundle_of_another_image_rule_is_refused(store: Store) -> None:
    bundle = replace(make_bundle(store.put(b"a network")), image_rule=IMAGE_RULE + 1)
    shelf = Shelf(store, threads=1, budget_bytes=10**6, load=Loads())
    with pytest.raises(BundleRefused, match="image rule 2"):
        shelf.predictor(store.put(bundle.dump()))


def test_a_backbone_that_rotted_is_refused_and_can_be_mended(store: Store) -> None:
    digest = put(store)
    network = store.put(b"a network")
    store.path(network).write_bytes(b"a netw0rk")
    shelf = Shelf(store, threads=1, budget_bytes=10**6, load=Loads())
    with pytest.raises(Corrupt):
        shelf.predictor(digest)
    store.delete(network)
    with pytest.raises(NotFound):
        shelf.predictor(digest)
    store.put(b"a network")
    assert shelf.predictor(digest).bundle.labels == ("dark", "light")


def test_a_prediction_has_every_label_and_says_where_its_time_went(store: Store) -> None:
    predictor = Shelf(store, threads=1, budget_bytes=10**6, load=Loads()).predictor(put(store))
    predictions, timings = predictor.predict([sample.png(1), sample.jpeg(2)], LIMITS, deadline_s=1)
    assert [set(one.probabilities) for one in predictions] == [{"dark", "light"}] * 2
    assert all(one.probability == max(one.probabilities.values()) for one in predictions)
    assert timings.decode > 0 and timings.backbone > 0 and timings.head > 0 and timings.queue >= 0


def test_a_bad_image_is_told_by_its_position(store: Store) -> None:
    predictor = Shelf(store, threads=1, budget_bytes=10**6, load=Loads()).predictor(put(store))
    with pytest.raises(ImageRefused, match="Image 2") as refused:
        predictor.predict([sample.png(1), b"no image"], LIMITS, deadline_s=1)
    assert refused.value.extra == {"image": 1}


def test_an_engine_that_stays_busy_is_waited_for_until_the_deadline() -> None:
    turn = threading.Lock()
    predictor = Predictor(make_bundle(Digest("0" * 64)), FlatEngine(), turn)
    with turn, pytest.raises(DeadlineExceeded):
        predictor.predict([sample.png(1)], LIMITS, deadline_s=0.05)
    assert predictor.predict([sample.png(1)], LIMITS, deadline_s=0.05)


def test_the_deadline_holds_while_images_are_decoded(store: Store) -> None:
    predictor = Shelf(store, threads=1, budget_bytes=10**6, load=Loads()).predictor(put(store))
    slow = slow_jpeg(60)  # more than half a second
    started = time.perf_counter()
    with pytest.raises(DeadlineExceeded, match="Only 1 images were decoded"):
        predictor.predict([slow] * 30, LIMITS, deadline_s=0.2)
    assert time.perf_counter() - started < 5
