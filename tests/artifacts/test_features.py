"""The cache of features: added rows can be read, and incomplete or damaged rows are ignored."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.features import SEGMENT_BYTES, FeatureCache, Features, FeatureSpace
from artifacts.store import Digest, digest_of
from errors import DiskFull
from recipes.recipe import Precision, Resize

WIDTH = 5
ENTRY_BYTES = 36  # 32 of the digest, 4 of the checksum
SPACE = FeatureSpace(1, 64, Resize.SQUASH, digest_of(b"a backbone"), Precision.FLOAT32)
IMAGES = [digest_of(bytes([number])) for number in range(12)]

Open = Callable[..., FeatureCache]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens caches in one folder, and closes all of them at the end of the test."""
    caches = []

    def open_cache(space: FeatureSpace = SPACE, width: int = WIDTH) -> FeatureCache:
        caches.append(FeatureCache(tmp_path, space, width))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def row(image: Digest, version: int = 0) -> Features:
    """Return the features of an image, different for every image and version."""
    return np.random.default_rng([version, *bytes.fromhex(image)]).normal(size=WIDTH).astype(np.float32)


def rows(images: Sequence[Digest], version: int = 0) -> Features:
    return np.stack([row(image, version) for image in images])


def segments(folder: Path, kind: str = "f32") -> list[Path]:
    """Return the files with this suffix, the oldest first."""
    return sorted(folder.rglob(f"*.{kind}"), key=lambda path: path.stat().st_mtime_ns)


# --- as a dictionary -------------------------------------------------------------------------------------------------

Step = tuple[str, list[int], int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "ask", "reopen"]), st.lists(st.integers(0, 11), max_size=6), st.integers()
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_the_cache_is_a_dictionary_that_survives(steps: list[Step]) -> None:
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), SPACE, WIDTH)
        known: dict[Digest, Features] = {}
        for action, numbers, version in steps:
            images = [IMAGES[number] for number in numbers]
            if action == "add":
                fresh = cache.missing(images)
                assert fresh == [image for image in dict.fromkeys(images) if image not in known]
                if fresh:
                    cache.add(fresh, rows(fresh, abs(version)))
                known |= {image: row(image, abs(version)) for image in fresh}
            elif action == "reopen":
                cache.close()
                cache = FeatureCache(Path(folder), SPACE, WIDTH)
            present = [image for image in images if image in known]
            found = cache.rows(present)
            assert found.dtype == np.float32 and found.shape == (len(present), WIDTH)
            for image, features in zip(present, found, strict=True):
                assert np.array_equal(features, known[image])
        assert cache.missing(IMAGES) == [image for image in IMAGES if image not in known]
        cache.close()


def test_rows_come_in_the_order_in_which_they_are_asked_for(opened: Open) -> None:
    cache = opened()
    for image in IMAGES[:4]:
        cache.add([image], row(image)[None])
    cache.close()
    cache.add(IMAGES[4:], rows(IMAGES[4:]))
    asked = [IMAGES[number] for number in (9, 2, 2, 5, 0, 9, 11)]
    assert np.array_equal(cache.rows(asked), rows(asked))
    assert np.array_equal(opened().rows(asked), rows(asked))


def test_nothing_asked_is_nothing_answered(opened: Open) -> None:
    cache = opened()
    assert cache.rows([]).shape == (0, WIDTH)
    assert cache.missing([]) == []
    cache.add([], np.empty((0, WIDTH), np.float32))
    assert cache.missing([*IMAGES[:3], *IMAGES[:3]]) == IMAGES[:3]


def test_an_image_that_is_missing_is_a_key_error(opened: Open) -> None:
    cache = opened()
    cache.add(IMAGES[:2], rows(IMAGES[:2]))
    with pytest.raises(KeyError):
        cache.rows(IMAGES[:3])


def test_strange_numbers_come_back_bit_by_bit(opened: Open) -> None:
    strange = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]], np.float32)
    opened().add(IMAGES[:1], strange)
    assert opened().rows(IMAGES[:1]).tobytes() == strange.tobytes()


def test_other_numbers_and_orders_of_memory_are_kept_as_float32(opened: Open) -> None:
    cache = opened()
    cache.add(IMAGES[:3], np.asfortranarray(rows(IMAGES[:3])))
    cache.add(IMAGES[3:5], rows(IMAGES[3:7])[::2])
    cache.add(IMAGES[5:6], row(IMAGES[5]).astype(np.float64)[None])  # type: ignore[arg-type]  # NumPy's default
    found = opened().rows(IMAGES[:6])
    assert np.array_equal(found[:3], rows(IMAGES[:3]))
    assert np.array_equal(found[3:5], rows(IMAGES[3:7])[::2])
    assert np.array_equal(found[5], row(IMAGES[5]))


@pytest.mark.parametrize("shape", [(1, WIDTH), (3, WIDTH), (2, WIDTH - 1), (2, WIDTH + 1), (2,), (2, WIDTH, 1)])
def test_rows_of_another_shape_are_a_bug_that_is_told(opened: Open, shape: tuple[int, ...]) -> None:
    cache = opened()
    with pytest.raises(ValueError, match=r"Expected features \[2, 5\]\. Received .* This is a bug"):
        cache.add(IMAGES[:2], np.zeros(shape, np.float32))
    assert cache.missing(IMAGES) == IMAGES


# --- spaces ----------------------------------------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "image_rule": 2,
    "size": 65,
    "resize": Resize.CROP,
    "backbone": digest_of(b"another backbone"),
    "bit_depth": 12,
}


def test_each_thing_that_features_depend_on_makes_another_space(opened: Open) -> None:
    opened().add(IMAGES, rows(IMAGES))
    names = {SPACE.name}
    for field, value in OTHERS.items():
        space = replace(SPACE, **{field: value})
        names.add(space.name)
        assert opened(space).missing(IMAGES) == IMAGES
    assert len(names) == 1 + len(OTHERS)
    assert {field.name for field in fields(FeatureSpace)} == {*OTHERS, "precision"}
    assert opened(replace(SPACE)).missing(IMAGES) == []


def test_the_name_of_a_space_stays_what_it_is() -> None:
    assert SPACE.name == FeatureSpace(1, 64, Resize("squash"), SPACE.backbone, Precision("float32")).name
    assert SPACE.name == "f3334a5e17724a3e1cd0d061a50f0b53", "another name would make every cache that exists useless"


def test_rows_of_another_width_do_not_count(opened: Open) -> None:
    opened(width=4).add(IMAGES, rows(IMAGES)[:, :4].copy())
    assert opened(width=5).missing(IMAGES) == IMAGES
    assert opened(width=4).missing(IMAGES) == []


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(opened: Open, tmp_path: Path) -> tuple[Path, Path]:
    """The data and the index of one segment with five rows."""
    cache = opened()
    cache.add(IMAGES[:5], rows(IMAGES[:5]))
    cache.close()
    (data,), (index,) = segments(tmp_path), segments(tmp_path, "index")
    assert data.stat().st_size == 5 * 4 * WIDTH and index.stat().st_size == 5 * ENTRY_BYTES
    return data, index


def kept(cache: FeatureCache) -> list[Digest]:
    """Return the images of the segment that the cache still has, after checking their rows."""
    missing = set(cache.missing(IMAGES[:5]))
    present = [image for image in IMAGES[:5] if image not in missing]
    assert np.array_equal(cache.rows(present), rows(present) if present else np.empty((0, WIDTH)))
    return present


def test_a_torn_tail_is_not_there_wherever_it_is_torn(opened: Open, written: tuple[Path, Path]) -> None:
    data, index = written
    whole, entries = data.read_bytes(), index.read_bytes()
    for length in range(len(whole) + 1):
        data.write_bytes(whole[:length])
        assert kept(opened()) == IMAGES[: length // (4 * WIDTH)]
    for length in range(len(entries) + 1):
        index.write_bytes(entries[:length])
        assert kept(opened()) == IMAGES[: length // ENTRY_BYTES]


@pytest.mark.parametrize("tail", [b"x", b"xxxx", b"x" * 4 * WIDTH, b"x" * (4 * WIDTH + 7)])
def test_a_row_without_its_entry_is_not_there(opened: Open, written: tuple[Path, Path], tail: bytes) -> None:
    data, _ = written
    data.write_bytes(data.read_bytes() + tail)
    assert kept(opened()) == IMAGES[:5]


@pytest.mark.parametrize(
    "tail",
    [bytes(ENTRY_BYTES), bytes.fromhex(IMAGES[7]) + bytes(4), b"x" * ENTRY_BYTES],
    ids=["zeros", "the checksum of nothing", "any checksum"],
)
def test_an_entry_without_its_row_is_not_there(opened: Open, written: tuple[Path, Path], tail: bytes) -> None:
    _, index = written
    index.write_bytes(index.read_bytes() + tail)
    cache = opened()
    assert kept(cache) == IMAGES[:5]
    named = Digest(tail[:32].hex())
    assert cache.missing([named]) == [named]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5 * 4 * WIDTH - 1), st.integers(1, 255))
def test_a_flipped_byte_costs_its_row_and_no_other(position: int, flip: int) -> None:
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), SPACE, WIDTH)
        cache.add(IMAGES[:5], rows(IMAGES[:5]))
        cache.close()
        (data,) = segments(Path(folder))
        content = bytearray(data.read_bytes())
        content[position] ^= flip
        data.write_bytes(content)
        hit = position // (4 * WIDTH)
        cache = FeatureCache(Path(folder), SPACE, WIDTH)
        assert kept(cache) == IMAGES[:hit] + IMAGES[hit + 1 : 5]
        cache.add([IMAGES[hit]], rows([IMAGES[hit]]))
        cache.close()
        assert kept(FeatureCache(Path(folder), SPACE, WIDTH)) == IMAGES[:5]


def test_a_segment_without_its_data_is_not_there(opened: Open, written: tuple[Path, Path]) -> None:
    data, _ = written
    data.unlink()
    cache = opened()
    assert kept(cache) == []
    cache.add(IMAGES, rows(IMAGES))
    assert kept(opened()) == IMAGES[:5]


def test_a_segment_without_its_index_is_not_there(opened: Open, written: tuple[Path, Path]) -> None:
    _, index = written
    index.unlink()
    assert kept(opened()) == []


def test_the_index_names_each_image_with_the_checksum_of_its_row(written: tuple[Path, Path]) -> None:
    data, index = written
    assert data.read_bytes() == rows(IMAGES[:5]).tobytes()
    assert index.read_bytes() == b"".join(
        bytes.fromhex(image) + zlib.crc32(row(image).tobytes()).to_bytes(4, "little") for image in IMAGES[:5]
    )


# --- writers ---------------------------------------------------------------------------------------------------------


def test_two_writers_do_not_disturb_each_other(opened: Open, tmp_path: Path) -> None:
    one, other = opened(), opened()
    for number in range(0, 12, 2):
        one.add(IMAGES[number : number + 1], rows(IMAGES[number : number + 1]))
        other.add(IMAGES[number + 1 : number + 2], rows(IMAGES[number + 1 : number + 2]))
    assert len(segments(tmp_path)) == 2
    assert one.missing(IMAGES) == IMAGES[1::2] and other.missing(IMAGES) == IMAGES[::2]
    both = opened()
    assert both.missing(IMAGES) == []
    assert np.array_equal(both.rows(IMAGES), rows(IMAGES))


def test_two_writers_may_write_the_same_image(opened: Open) -> None:
    one, other = opened(), opened()
    one.add(IMAGES, rows(IMAGES))
    other.add(IMAGES, rows(IMAGES))
    assert np.array_equal(opened().rows(IMAGES), rows(IMAGES))


def test_what_was_added_is_there_for_others_before_the_writer_ends(opened: Open) -> None:
    writer = opened()
    writer.add(IMAGES[:3], rows(IMAGES[:3]))
    assert opened().missing(IMAGES) == IMAGES[3:]
    writer.add(IMAGES[3:], rows(IMAGES[3:]))
    assert opened().missing(IMAGES) == []


def test_a_writer_fills_its_segment_and_begins_a_new_one_after_closing(opened: Open, tmp_path: Path) -> None:
    cache = opened()
    for image in IMAGES[:3]:
        cache.add([image], rows([image]))
    assert len(segments(tmp_path)) == 1
    cache.close()
    cache.close()
    cache.add(IMAGES[3:], rows(IMAGES[3:]))
    assert len(segments(tmp_path)) == 2
    assert np.array_equal(cache.rows(IMAGES), rows(IMAGES))


@pytest.mark.parametrize("at_once", [True, False])
def test_segments_roll_over_at_their_limit(at_once: bool) -> None:
    width = SEGMENT_BYTES // 4 // 4  # four rows fill a segment
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), SPACE, width)
        many = np.repeat(np.arange(6, dtype=np.float32)[:, None], width, axis=1)
        for start in range(0, 6, 6 if at_once else 1):
            stop = 6 if at_once else start + 1
            cache.add(IMAGES[start:stop], many[start:stop])
        sizes = [path.stat().st_size for path in segments(Path(folder))]
        assert sorted(sizes) == [SEGMENT_BYTES // 2, SEGMENT_BYTES]
        cache.close()
        again = FeatureCache(Path(folder), SPACE, width)
        assert again.missing(IMAGES[:6]) == []
        assert np.array_equal(again.rows(IMAGES[5:2:-1]), many[5:2:-1])


def test_a_row_wider_than_a_segment_has_one_for_itself() -> None:
    width = SEGMENT_BYTES // 4 + 1
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), SPACE, width)
        cache.add(IMAGES[:1], np.ones((1, width), np.float32))
        cache.close()
        assert (FeatureCache(Path(folder), SPACE, width).rows(IMAGES[:1]) == 1).all()


@pytest.mark.parametrize("many", [False, True], ids=["at the flush", "while writing"])
def test_a_full_disk_is_told_and_shifts_no_row(
    opened: Open, tmp_path: Path, fill_disk: Callable[[Path], None], many: bool
) -> None:
    cache = opened()
    cache.add(IMAGES[:2], rows(IMAGES[:2]))
    fill_disk(tmp_path / SPACE.name)
    lost = [digest_of(b"%d" % number) for number in range(5000)] if many else IMAGES[2:3]
    with pytest.raises(DiskFull):
        cache.add(lost, np.zeros((len(lost), WIDTH), np.float32))
    assert cache.missing([*IMAGES[:2], *lost]) == lost
    cache.add(IMAGES[3:6], rows(IMAGES[3:6]))  # there is room again
    present = [*IMAGES[:2], *IMAGES[3:6]]
    assert np.array_equal(cache.rows(present), rows(present))
    cache.close()
    assert np.array_equal(opened().rows(present), rows(present))
