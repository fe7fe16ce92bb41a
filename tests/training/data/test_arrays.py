from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sample
from exporting import Exports

from artifacts.features import FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store
from errors import Corrupt
from inference.engine import OpenVinoEngine
from recipes.catalogue import BackboneName
from recipes.recipe import Precision, Resize
from training.data.arrays import drop_unused, load_maps, load_pixels, maps_bytes
from training.data.pixels import ImageDecoder
from training.networks import backbones


@pytest.fixture
def decoder(store: Store) -> ImageDecoder:
    return ImageDecoder(store, 16, Resize.SQUASH, ImageLimits(), threads=2)


def digests(store: Store, count: int) -> list[Digest]:
    return [store.put(sample.png(number)) for number in range(count)]


def test_pixels_are_decoded_once_and_read_from_a_file_after_that(
    store: Store, decoder: ImageDecoder, tmp_path: Path
) -> None:
    rows = digests(store, 20)
    rows.append(rows[3])
    told: list[tuple[int, int]] = []
    pixels = load_pixels(rows, decoder, tmp_path / "pixels", lambda *done: told.append(done))
    assert pixels.shape == (21, 16, 16, 3) and pixels.dtype == np.uint8
    assert told == [(16, 21), (21, 21)]
    decoded = np.concatenate([squares for _, squares in decoder.batches(rows)])
    assert np.array_equal(pixels, decoded)
    for row in set(rows):
        store.delete(row)
    again = load_pixels(rows, decoder, tmp_path / "pixels", lambda *done: told.append(done))
    assert np.array_equal(again, decoded) and len(told) == 2


def test_another_size_or_other_images_are_another_file(store: Store, decoder: ImageDecoder, tmp_path: Path) -> None:
    rows = digests(store, 3)
    larger = ImageDecoder(store, 24, Resize.SQUASH, ImageLimits(), threads=2)
    shallow = replace(decoder, bit_depth=12)
    for images, how in ((rows, decoder), (rows[::-1], decoder), (rows, larger), (rows, shallow)):
        pixels = load_pixels(images, how, tmp_path, lambda *done: None)
        assert np.array_equal(pixels, np.concatenate([squares for _, squares in how.batches(images)]))
    assert len(list(tmp_path.glob("*.rows"))) == 4


def test_an_image_that_rotted_leaves_no_file(store: Store, decoder: ImageDecoder, tmp_path: Path) -> None:
    rows = [*digests(store, 3), store.put(b"no image")]
    with pytest.raises(Corrupt, match=rows[3]):
        load_pixels(rows, decoder, tmp_path / "pixels", lambda *done: None)
    assert list((tmp_path / "pixels").iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / f"{name}.rows"
        file.write_bytes(bytes(100))
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    drop_unused(tmp_path, 200)
    assert sorted(file.stem for file in tmp_path.glob("*.rows")) == ["middle", "new"]
    drop_unused(tmp_path / "nowhere", 200)


def test_what_a_killed_process_left_unfinished_goes_once_nobody_writes_to_it(tmp_path: Path) -> None:
    left, present = tmp_path / "a.rows.0123abcd", tmp_path / "b.rows.4567cdef"
    for file in (left, present):
        file.write_bytes(bytes(100))
    os.utime(left, (time.time() - 7200,) * 2)
    drop_unused(tmp_path, 10**6)
    assert list(tmp_path.iterdir()) == [present]


@pytest.mark.slow
def test_maps_are_computed_once_where_there_is_room_and_another_network_has_others(
    store: Store, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = digests(store, 70)
    pixels = load_pixels(rows, ImageDecoder(store, 32, Resize.SQUASH, ImageLimits(), 2), tmp_path, lambda *done: None)
    weights = exports.weights(BackboneName.VGG16).read_bytes()
    for cut in ("block1", "block2"):
        model = backbones.build_backbone(BackboneName.VGG16, cut, 32, weights)
        backbone = store.put(exports.get(BackboneName.VGG16, cut).onnx)
        engine = OpenVinoEngine(store.path(backbone), Precision.FLOAT32, 2)
        space = FeatureSpace(IMAGE_RULE, 32, Resize.SQUASH, backbone, Precision.FLOAT32)
        told: list[tuple[int, int]] = []
        size_bytes = maps_bytes(pixels, engine)
        assert load_maps(rows, pixels, engine, space, tmp_path, size_bytes - 1, lambda *done: None) is None
        maps = load_maps(rows, pixels, engine, space, tmp_path, size_bytes, lambda *done, told=told: told.append(done))
        assert maps is not None and maps.nbytes == size_bytes
        assert told == [(64, 70), (70, 70)]
        expected = np.asarray(model(pixels)["maps"])
        assert maps.shape == expected.shape
        assert (np.abs(maps - expected) <= np.maximum(1e-3, 1e-3 * np.abs(expected))).all()
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda folder, free=size_bytes: SimpleNamespace(free=free))
            again = load_maps(
                rows, pixels, engine, space, tmp_path, size_bytes, lambda *done, told=told: told.append(done)
            )
            assert again is not None and np.array_equal(again, maps) and len(told) == 2
            assert load_maps(rows[:-1], pixels[:-1], engine, space, tmp_path, size_bytes, lambda *done: None) is None
