from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import sample

from artifacts.images import ImageLimits
from artifacts.recipe import Resize
from artifacts.store import Digest, Store
from errors import Corrupt
from training.pixels import Decoder, Loaded, drop_pixels, load_pixels


@pytest.fixture
def decoder(store: Store) -> Decoder:
    return Decoder(store, 16, Resize.SQUASH, ImageLimits(), threads=2)


def digests(store: Store, count: int) -> list[Digest]:
    return [store.put(sample.png(number)) for number in range(count)]


def test_pixels_are_decoded_once_and_read_from_a_file_after_that(
    store: Store, decoder: Decoder, tmp_path: Path
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


def test_another_size_or_other_images_are_another_file(store: Store, decoder: Decoder, tmp_path: Path) -> None:
    rows = digests(store, 3)
    larger = Decoder(store, 24, Resize.SQUASH, ImageLimits(), threads=2)
    for images, how in ((rows, decoder), (rows[::-1], decoder), (rows, larger)):
        pixels = load_pixels(images, how, tmp_path, lambda *done: None)
        assert np.array_equal(pixels, np.concatenate([squares for _, squares in how.batches(images)]))
    assert len(list(tmp_path.glob("*.u8"))) == 3


def test_an_image_that_rotted_leaves_no_file(store: Store, decoder: Decoder, tmp_path: Path) -> None:
    rows = [*digests(store, 3), store.put(b"no image")]
    with pytest.raises(Corrupt, match=rows[3]):
        load_pixels(rows, decoder, tmp_path / "pixels", lambda *done: None)
    assert list((tmp_path / "pixels").iterdir()) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / f"{name}.u8"
        file.write_bytes(bytes(100))
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    drop_pixels(tmp_path, 200)
    assert sorted(file.stem for file in tmp_path.glob("*.u8")) == ["middle", "new"]
    drop_pixels(tmp_path / "nowhere", 200)


def test_loaded_pixels_come_in_the_order_that_is_asked_for(store: Store, decoder: Decoder) -> None:
    rows = digests(store, 20)
    pixels = np.concatenate([squares for _, squares in decoder.batches(rows)])
    wanted = rows[::-1]
    found = np.concatenate([squares for _, squares in Loaded(rows, pixels).batches(wanted)])
    assert np.array_equal(found, pixels[::-1])
