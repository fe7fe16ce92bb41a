from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import sample
from flat_models import CountingLoader, flat_bundle
from PIL import Image
from waiting import until

from artifacts.images import IMAGE_RULE, ImageLimits, encode
from artifacts.store import Digest, Store
from errors import BundleRefused, Corrupt, DeadlineExceeded, ImageRefused, NotFound, Unavailable
from inference.predictor import ClassPrediction, Predictor
from inference.shelf import EngineLoader, Shelf, resident_bytes
from training.data.pixels import ImageDecoder

LIMITS = ImageLimits()
# A head of `flat_bundle` with the objects around it.
MODEL_BYTES = 48 * 2 * 4 + 2 * 4 + 4096


def make_shelf(store: Store, budget_bytes: int = 10**6, load: EngineLoader | None = None) -> Shelf:
    """Return a shelf that takes a network for twice the size of its file."""
    return Shelf(store, 1, budget_bytes, load or CountingLoader(), resident_bytes=lambda: 0)


def put(store: Store, backbone: bytes = b"a network", seed: int = 0) -> Digest:
    return store.put(flat_bundle(store.put(backbone), seed=seed).dump())


def test_models_on_one_backbone_share_its_engine(store: Store) -> None:
    loads = CountingLoader()
    shelf = make_shelf(store, 10**6, loads)
    one, other = (shelf.predictor(put(store, seed=seed)) for seed in (1, 2))
    assert len(loads.seen) == 1
    assert one.bundle.dump() != other.bundle.dump()
    assert shelf.predictor(put(store, seed=1)) is one


def test_many_who_ask_at_once_wait_for_one_load(store: Store) -> None:
    loads = CountingLoader()
    loads.held.add(store.put(b"a network"))
    shelf = make_shelf(store, 10**6, loads)
    digest = put(store)
    found: list[Predictor] = []
    threads = [threading.Thread(target=lambda: found.append(shelf.predictor(digest))) for _ in range(8)]
    for thread in threads:
        thread.start()
    loads.gate.set()
    for thread in threads:
        thread.join(120)
    assert len(found) == 8 and len(loads.seen) == 1


def test_the_backbone_not_asked_for_longest_makes_room(store: Store) -> None:
    loads = CountingLoader()
    digests = [put(store, backbone=bytes([number]) * 10_000) for number in range(3)]
    shelf = make_shelf(store, 50_000, loads)  # two of 2 x 10,000 bytes fit, with their models
    for digest in (*digests[:2], digests[0], digests[2], digests[0]):
        shelf.predictor(digest)
    assert len(loads.seen) == 3
    shelf.predictor(digests[1])
    assert len(loads.seen) == 4


def test_the_model_not_asked_for_longest_makes_room_and_its_backbone_stays(store: Store) -> None:
    loads = CountingLoader()
    digests = [put(store, seed=seed) for seed in range(3)]
    shelf = make_shelf(store, 2 * len(b"a network") + 2 * MODEL_BYTES, loads)
    first, second = (shelf.predictor(digest) for digest in digests[:2])
    assert shelf.predictor(digests[0]) is first
    shelf.predictor(digests[2])
    assert shelf.predictor(digests[0]) is first
    assert shelf.predictor(digests[1]) is not second
    assert len(loads.seen) == 1


def test_many_models_do_not_grow_past_the_budget(store: Store) -> None:
    budget_bytes = 50_000
    shelf = make_shelf(store, budget_bytes)
    kept = [weakref.ref(shelf.predictor(put(store, seed=seed))) for seed in range(200)]
    gc.collect()
    assert 10 < sum(predictor() is not None for predictor in kept) <= budget_bytes / MODEL_BYTES


def test_a_model_larger_than_the_budget_is_served_all_the_same(store: Store) -> None:
    loads = CountingLoader()
    shelf = make_shelf(store, 1, loads)
    one, other = put(store, backbone=b"one"), put(store, backbone=b"other")
    predictor = shelf.predictor(one)
    assert shelf.predictor(one) is predictor
    shelf.predictor(other)
    assert len(loads.seen) == 2
    assert shelf.predictor(one) is not predictor and len(loads.seen) == 3


def test_a_bundle_whose_golden_output_does_not_come_out_is_refused(store: Store) -> None:
    bundle = flat_bundle(store.put(b"a network"), seed=0)
    wrong = replace(bundle, golden_output=bundle.golden_output + 0.5 * np.abs(bundle.golden_output).max())
    shelf = make_shelf(store)
    with pytest.raises(BundleRefused, match="does not reproduce"):
        shelf.predictor(store.put(wrong.dump()))
    not_a_number = replace(bundle, golden_output=np.full_like(bundle.golden_output, np.nan))
    with pytest.raises(BundleRefused, match="does not reproduce"):
        shelf.predictor(store.put(not_a_number.dump()))


def test_a_bundle_of_another_image_rule_is_refused(store: Store) -> None:
    bundle = replace(flat_bundle(store.put(b"a network"), seed=0), image_rule=IMAGE_RULE + 1)
    shelf = make_shelf(store)
    with pytest.raises(BundleRefused, match="image rule 2"):
        shelf.predictor(store.put(bundle.dump()))


def test_a_model_reads_deep_images_as_its_data_set_does(store: Store) -> None:
    bundle = replace(flat_bundle(store.put(b"a network"), seed=0), bit_depth=12)
    predictor = make_shelf(store).predictor(store.put(bundle.dump()))
    image = encode(Image.fromarray(np.full((8, 8), 2048, np.uint16)), "PNG")
    trained_on = ImageDecoder(store, bundle.size, bundle.resize, LIMITS, 1, bit_depth=12)
    (_, pixels), *_ = trained_on.batches([store.put(image)])
    assert np.array_equal(predictor.decode(0, image, LIMITS, math.inf), pixels[0]) and (pixels == 128).all()


def test_a_backbone_that_rotted_is_refused_and_can_be_mended(store: Store) -> None:
    digest = put(store)
    network = store.put(b"a network")
    store.path(network).write_bytes(b"a netw0rk")
    shelf = make_shelf(store)
    with pytest.raises(Corrupt):
        shelf.predictor(digest)
    store.delete(network)
    with pytest.raises(NotFound):
        shelf.predictor(digest)
    store.put(b"a network")
    assert shelf.predictor(digest).bundle.labels == ("dark", "light")


def test_a_prediction_has_every_label(store: Store) -> None:
    predictions = make_shelf(store).predictor(put(store)).predict([sample.png(1), sample.jpeg(2)], LIMITS, 60)
    assert [set(one.probabilities) for one in predictions if isinstance(one, ClassPrediction)] == [
        {"dark", "light"},
        {"dark", "light"},
    ]
    for one in predictions:
        assert isinstance(one, ClassPrediction)
        assert one.probability == max(one.probabilities.values()) == one.probabilities[one.label]


def test_a_bad_image_is_told_by_its_position(store: Store) -> None:
    with pytest.raises(ImageRefused, match="Image 2") as refused:
        make_shelf(store).predictor(put(store)).predict([sample.png(1), b"no image"], LIMITS, deadline_s=60)
    assert refused.value.extra == {"image": 1}


class Passing:
    """A clock that is 0.15 s later each time somebody looks at it."""

    def __init__(self) -> None:
        self._looks = itertools.count()

    def perf_counter(self) -> float:
        return 0.15 * next(self._looks)


def test_the_deadline_holds_while_images_are_decoded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make_shelf(store).predictor(put(store))
    monkeypatch.setattr("inference.predictor.time", Passing())
    with pytest.raises(DeadlineExceeded, match="Only 1 images were decoded"):
        predictor.predict([sample.png(1)] * 30, LIMITS, deadline_s=0.2)


def test_a_loaded_model_keeps_its_head_and_not_its_golden_images(store: Store) -> None:
    predictor = make_shelf(store).predictor(put(store))
    assert predictor.bundle.golden_input.size == predictor.bundle.golden_output.size == 0
    assert predictor.bundle.golden_input.base is None, "a slice of nothing would hold all of it"
    assert predictor.size_bytes == MODEL_BYTES - 4096


def test_what_waits_for_a_backbone_that_makes_room_is_answered(store: Store) -> None:
    shelf = make_shelf(store, budget_bytes=1)
    predictor = shelf.predictor(put(store, backbone=b"one"))
    asked = [predictor.submit(np.zeros((1, 8, 8, 3), np.uint8), 1e9) for _ in range(50)]
    shelf.predictor(put(store, backbone=b"other"))
    assert all(one is not None and one.result(120).features.shape == (1, 48) for one in asked)
    until(lambda: predictor.submit(np.zeros((1, 8, 8, 3), np.uint8), 1e9) is None)
    assert shelf.find(put(store, backbone=b"one")) is None


def test_a_shelf_tells_what_is_on_it_and_closes_it(store: Store) -> None:
    shelf = make_shelf(store)
    for seed in (1, 2):
        shelf.predictor(put(store, seed=seed))
    [loaded] = shelf.loaded()
    assert (loaded.digest, loaded.models, loaded.size_bytes) == (store.put(b"a network"), 2, 2 * len(b"a network"))
    shelf.close()
    assert shelf.loaded() == [] and loaded.batcher.is_closed
    with pytest.raises(Unavailable):
        loaded.batcher.submit(np.zeros((1, 8, 8, 3), np.uint8), 1e9).result(0)


def test_what_a_network_takes_is_measured_without_what_others_take_for_a_moment(store: Store) -> None:
    decoding = 240_000_000
    readings = [decoding, 0, decoding, 0, decoding] * 2
    networks = iter([1_000_000] * 5 + [31_000_000] * 5)
    shelf = Shelf(store, 1, 10**9, CountingLoader(), resident_bytes=lambda: next(networks) + readings.pop())
    shelf.predictor(put(store))
    assert shelf.loaded()[0].size_bytes == 30_000_000
    before = resident_bytes()
    kept = np.ones(200_000_000, np.uint8)  # much, beside what threads of other tests may free just now
    assert resident_bytes() - before > 100_000_000 and len(kept)


def test_a_network_is_not_held_to_take_what_another_takes_that_loads_meanwhile(store: Store) -> None:
    loads = CountingLoader()
    slow, quick, last = (put(store, backbone=name * 100) for name in (b"slow", b"quick", b"last"))
    loads.held.add(store.put(b"slow" * 100))
    shelf = Shelf(store, 1, 10**9, loads, resident_bytes=lambda: 1_000_000 + 20_000_000 * len(loads.seen))
    thread = threading.Thread(target=shelf.predictor, args=(slow,))
    thread.start()
    until(lambda: loads.seen)
    shelf.predictor(quick)
    loads.gate.set()
    thread.join(120)
    shelf.predictor(last)
    assert [one.size_bytes for one in shelf.loaded()] == [2 * 500, 2 * 400, 20_000_000]


def test_a_bundle_is_read_only_if_its_backbone_is_loaded(store: Store) -> None:
    loads = CountingLoader()
    shelf = make_shelf(store, 10**6, loads)
    one, other = put(store, seed=1), put(store, seed=2)
    backbone = store.put(b"a network")
    missing = Digest("0" * 64)
    assert shelf.predictor_if_warm(missing, backbone) is None and not loads.seen, "the store has no such bundle"
    shelf.predictor(one)
    assert shelf.predictor_if_warm(one, backbone) is shelf.find(one)
    warm = shelf.predictor_if_warm(other, backbone)
    assert warm is not None and warm is shelf.find(other) and len(loads.seen) == 1
    with pytest.raises(NotFound):
        shelf.predictor_if_warm(missing, backbone)
    elsewhere = put(store, backbone=b"another")
    assert shelf.predictor_if_warm(elsewhere, backbone) is None, "a row that names another backbone loads none"


def test_a_backbone_is_not_dropped_before_its_first_model_though_another_is_asked_meanwhile(store: Store) -> None:
    loads = CountingLoader()
    hot, cold = put(store, backbone=b"hot" * 5000), put(store, backbone=b"cold" * 5000)
    shelf = make_shelf(store, 50_000, loads)  # one of them
    shelf.predictor(hot)
    loads.held.add(store.put(b"cold" * 5000))
    found: list[Predictor] = []
    thread = threading.Thread(target=lambda: found.append(shelf.predictor(cold)))
    thread.start()
    until(lambda: len(loads.seen) == 2)
    assert shelf.find(hot) is not None
    loads.gate.set()
    thread.join(120)
    assert shelf.find(cold) is found[0] and not found[0].is_closed
    assert shelf.find(hot) is None and len(loads.seen) == 2


def test_a_backbone_whose_batcher_died_is_loaded_again(store: Store) -> None:
    loads = CountingLoader()
    shelf = make_shelf(store, 10**6, loads)
    one, other = put(store, seed=1), put(store, seed=2)
    for digest in (one, other):
        shelf.predictor(digest)
    shelf.loaded()[0].batcher.close()
    assert not shelf.predictor(one).is_closed and not shelf.predictor(other).is_closed
    assert len(loads.seen) == 2 and shelf.loaded()[0].models == 2


def test_a_load_that_fails_leaves_nothing_and_the_next_that_waits_loads_it(store: Store) -> None:
    loads = CountingLoader()
    network = store.put(b"a network")
    loads.held.add(network)
    digests = [put(store, seed=seed) for seed in range(4)]
    shelf = make_shelf(store, 10**6, loads)
    store.path(network).write_bytes(b"a netw0rk")
    ends: list[object] = []

    def load(digest: Digest) -> None:
        try:
            ends.append(shelf.predictor(digest))
        except Corrupt as error:
            ends.append(error)

    for digest in digests[:2]:
        load(digest)
    store.path(network).write_bytes(b"a network")
    threads = [threading.Thread(target=load, args=(digest,)) for digest in digests]
    for thread in threads:
        thread.start()
    loads.gate.set()
    for thread in threads:
        thread.join(120)
    assert [type(end) for end in ends] == [Corrupt, Corrupt, *[Predictor] * 4]
    assert len(loads.seen) == 1 and shelf.loaded()[0].models == 4


def test_a_shelf_that_was_closed_while_it_loaded_keeps_nothing(store: Store) -> None:
    loads = CountingLoader()
    loads.held.add(store.put(b"a network"))
    shelf = make_shelf(store, 10**6, loads)
    errors: list[Exception] = []

    def load() -> None:
        try:
            shelf.predictor(put(store))
        except Unavailable as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    until(lambda: loads.seen)
    shelf.close()
    loads.gate.set()
    thread.join(120)
    assert len(errors) == 1 and shelf.loaded() == []
