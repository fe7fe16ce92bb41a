"""AVIF files whose boxes and streams disagree, and those whose parts would multiply memory or time."""

from __future__ import annotations

import base64
import io
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from artifacts import av1_streams, avif_files
from artifacts.av1_streams import DamagedStreamError
from artifacts.images import ImageLimits, decode, inspect, thumbnail
from errors import ImageRefused
from recipes.recipe import Resize

LIMITS = ImageLimits()
# A 10-bit AVIF of 67 × 45 pixels, as libavif writes it; Pillow writes only 8 bits.
TEN_BITS = base64.b64decode(
    """
    AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAA
    AAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAArgAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEA
    AGF2MDFDb2xvcgAAAABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAAQwAAAC0AAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBAEwA
    AAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAAtm1kYXQSAAoJGBlhWNUCAgaEMp4BE8PDwxDDDDDP
    IIQA2ypEwVbF305qhPTlfAhz4E+Up9vjoC+vlWp2VBPa2yMvnYlbzyOgp6ZJbn9nC2dEzDnGlqx4egw9vEWYWDuP7/9fmzqEb6LX
    vf1Orx8aimjEJzV/7FVEo9qhPnJwvQSHiPGstvRvrsE2QsshDrbp0u13CmXNEfDqmwzlo9OgSW/08gZw9I5ydR9O0ZvM6Sile+A=
    """
)


def avif(size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 99).save(file, "AVIF", speed=10, **options)
    return file.getvalue()


def animated(size: tuple[int, int]) -> bytes:
    return avif(size, save_all=True, append_images=[Image.new("RGB", size, colour) for colour in ("red", "blue")])


def forged(data: bytes, real: tuple[int, int], stated: tuple[int, int]) -> bytes:
    """Return an AVIF that states another size in its boxes, and in the headers of its tracks."""
    data = data.replace(
        b"ispe" + bytes(4) + struct.pack(">2I", *real), b"ispe" + bytes(4) + struct.pack(">2I", *stated)
    )
    old, new = (struct.pack(">2I", width << 16, height << 16) for width, height in (real, stated))
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("data", "size", "count"),
    [
        (avif(), (64, 48), 1),
        (avif((1, 1)), (1, 1), 1),
        (avif((67, 45), "RGBA"), (67, 45), 2),
        (avif((333, 1), "L"), (333, 1), 1),
        (avif((64, 48), subsampling="4:4:4", quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"), (64, 48), 1),
        (animated((50, 37)), (50, 37), 2),
        (TEN_BITS, (67, 45), 1),
    ],
)
def test_the_frames_of_usual_files_have_the_size_of_the_image(data: bytes, size: tuple[int, int], count: int) -> None:
    frames = avif_files.coded(data).frames
    assert [(frame.width, frame.height) for frame in frames] == [size] * count
    facts = inspect(data, LIMITS)
    assert (facts.width, facts.height) == size
    decode(data, 8, Resize.CROP, LIMITS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "animated"])
def test_a_stream_that_is_larger_than_the_stated_size_is_refused(mode: str) -> None:
    real, stated = (2000, 1500), (64, 48)
    data = forged(animated(real) if mode == "animated" else avif(real, mode), real, stated)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == stated
    for read in (inspect, lambda data, limits: thumbnail(data, 8, limits)):
        with pytest.raises(ImageRefused, match="64 × 48 pixels, but holds a picture of up to 2,000 × 1,500"):
            read(data, LIMITS)


def test_a_smaller_stream_reserves_the_memory_of_the_stated_size() -> None:
    reserved: list[int] = []

    @contextmanager
    def reserve(size_bytes: int) -> Iterator[None]:
        reserved.append(size_bytes)
        yield

    for data in (avif((64, 48)), forged(avif((64, 48)), (64, 48), (3000, 2000))):
        decode(data, 8, Resize.CROP, LIMITS, reserve)
    assert reserved[1] - reserved[0] > 18 * 3000 * 2000


def bits(*fields: tuple[int, int]) -> bytes:
    """Return fields of a value and a number of bits as bytes, filled up with zeros."""
    text = "".join(f"{value:0{size}b}" for value, size in fields if size)
    return bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))


def unit(kind: int, content: bytes) -> bytes:
    return bytes([kind << 3 | 2, len(content)]) + content


# Profile 0 without a reduced header, timing or delays; one operating point; 64 × 48 pixels in fields of 16 bits; no
# numbers of frames; all tools and the order off, screen content chosen by frames; 8 bits, 4:2:0; no film grain.
SEQUENCE = unit(
    1, bits((0, 7), (0, 5), (0, 17), (15, 4), (15, 4), (63, 16), (47, 16), (0, 9), (1, 1), (1, 1), (0, 10), (0, 8))
)


def key_frame(states_size: int) -> bytes:
    """Return a frame unit: a shown key frame without screen content tools, which may state its own size."""
    return unit(6, bits((0, 1), (0, 2), (1, 1), (0, 1), (0, 1), (states_size, 1)))


def test_a_frame_that_states_its_own_size_counts_as_the_largest_that_it_can_state() -> None:
    for states_size, expected in ((0, (64, 48)), (1, (65_536, 65_536))):
        found = list(av1_streams.frames(memoryview(SEQUENCE + key_frame(states_size))))
        assert found[0] is None
        assert found[1] is not None
        assert (found[1].width, found[1].height) == expected


@pytest.mark.parametrize(
    "stream", [key_frame(0), SEQUENCE[:5], SEQUENCE + b"\x32", SEQUENCE + b"\x32\x7f", b"\x0a" + b"\xff" * 9]
)
def test_a_stream_that_cannot_be_followed_is_refused(stream: bytes) -> None:
    with pytest.raises(DamagedStreamError):
        list(av1_streams.frames(memoryview(stream)))


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def file(*items: bytes, extents: tuple[tuple[int, int], ...] = (), idat: bytes = b"", more: bytes = b"") -> bytes:
    """Return an AVIF of one item of type `av01`, in these pieces of the box `idat`."""
    entry = box(b"infe", struct.pack(">I2H4sx", 2 << 24, 1, 0, b"av01"))
    pieces = b"".join(struct.pack(">2I", *extent) for extent in extents)
    iloc = struct.pack(">I3H", 1 << 24, 0x4400, 1, 1) + struct.pack(">3H", 1, 0, len(extents)) + pieces
    meta = box(
        b"meta", bytes(4), box(b"iinf", struct.pack(">IH", 0, 1), entry), box(b"iloc", iloc), box(b"idat", idat), more
    )
    return box(b"ftyp", b"avif", bytes(4), b"avif") + meta + b"".join(items)


STREAM = SEQUENCE + key_frame(0)


def test_an_item_in_pieces_inside_the_boxes_is_read() -> None:
    data = file(extents=((0, 7), (7, len(STREAM) - 7)), idat=STREAM)
    assert [(frame.width, frame.height) for frame in avif_files.coded(data).frames] == [(64, 48)]


def track(chunk: int, samples: int) -> bytes:
    tables = box(b"stsd", struct.pack(">2I", 0, 1), box(b"av01", bytes(78)))
    tables += box(b"stco", struct.pack(">3I", 0, 1, chunk)) + box(b"stsz", struct.pack(">3I", 0, 1, samples))
    tables += box(b"stsc", struct.pack(">5I", 0, 1, 1, samples, 1))
    return box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", tables)))))


def references(count: int) -> bytes:
    return box(b"iref", bytes(4), box(b"dimg", struct.pack(">2H", 1, count), bytes(2 * count)))


def properties(size: int, uses: int) -> bytes:
    owned = b"".join(struct.pack(">HBB", 1, 1, 1) for _ in range(uses))
    return box(b"iprp", box(b"ipco", box(b"what", bytes(size))), box(b"ipma", struct.pack(">2I", 0, uses), owned))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (file(extents=((0, 500),), idat=STREAM), "damaged"),
        (file(extents=((2**32 - 1, 1),), idat=STREAM), "damaged"),
        (file(extents=((0, len(STREAM) - 1),), idat=STREAM), "damaged"),
        (file(more=box(b"iinf", bytes(6))), "damaged"),
        (file(more=b"\0\0\0\x07free"), "damaged"),
        (file(more=b"\0\0\1\0free"), "damaged"),
        (file(box(b"meta", bytes(4))), "damaged"),
        (file(track(2**32 - 1, 1)), "damaged"),
        (file(more=properties(0, 1)[:-1]), "damaged"),
        (file(track(0, 2_000_000)), "too many parts"),
        (file(more=references(20_000)), "too many parts"),
        (file(more=properties(100_000, 200)), "too many parts"),
        (file(box(b"free") * 110_000), "too many parts"),
        (file(extents=((0, 0),) * 65_535, more=references(5_000)), "too many parts"),
        (file(extents=((0, 2**31),) * 500, idat=bytes(10_000)), "the same bytes"),
        (file(extents=((0, 220_000),), idat=b"\x12\0" * 110_000), "too many parts"),
    ],
)
def test_a_file_of_an_unreadable_or_endless_structure_is_refused_before_it_is_opened(data: bytes, match: str) -> None:
    with pytest.raises(ImageRefused, match=match):
        inspect(data, LIMITS)


def test_many_frames_of_one_item_are_refused() -> None:
    whole = avif()
    stream = whole[whole.index(b"mdat") + 4 :]
    assert whole.count(struct.pack(">I", len(stream))) == 1
    data = whole.replace(struct.pack(">I", len(stream)), struct.pack(">I", 4 * len(stream))) + 3 * stream
    assert inspect(data, LIMITS).width == 64
    with pytest.raises(ImageRefused, match="megapixels in all its pictures"):
        inspect(data, ImageLimits(pixels=64 * 48))


def test_no_changed_file_raises_anything_else_or_holds_more_than_its_size() -> None:
    source = random.Random(0)
    seeds = [
        avif(),
        avif((67, 45), "RGBA"),
        animated((50, 37)),
        TEN_BITS,
        file(extents=((0, len(STREAM)),), idat=STREAM),
    ]
    accepted = 0
    for number in range(2000):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.choice([0, 1, 2, 127, 128, 255, source.randrange(256)])
        try:
            frames = avif_files.coded(bytes(data)).frames
            if number % 4 == 0:
                facts = inspect(bytes(data), ImageLimits(pixels=100_000))
                assert all(frame.width <= facts.width and frame.height <= facts.height for frame in frames)
                accepted += 1
        except ImageRefused:
            continue
    assert accepted > 50
