"""Decoding of images: the result for each kind of image, and which images are refused."""

from __future__ import annotations

import io
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from sample import jpeg, picture, png, zipped
from working import slow_jpeg

from artifacts import images
from artifacts.images import IMAGE_RULE, MIB, ImageFacts, ImageLimits, Pixels, decode, encode, inspect, thumbnail
from errors import ImageRefused
from recipes.recipe import Resize

ROOT = Path(__file__).parent.parent.parent
LIMITS = ImageLimits()
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)

Doors = pytest.mark.parametrize(
    "door",
    [
        lambda data, limits: inspect(data, limits),
        lambda data, limits: decode(data, 8, Resize.SQUASH, limits),
        lambda data, limits: thumbnail(data, 8, limits),
    ],
    ids=["inspect", "decode", "thumbnail"],
)
Door = Callable[[bytes, ImageLimits], object]


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file, with the metadata in `options`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def plain(colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def pixels(data: bytes, size: int = 8, resize: Resize = Resize.SQUASH) -> Pixels:
    return decode(data, size, resize, LIMITS)


def colour_of(data: bytes) -> list[int]:
    """Return the one colour that an image has."""
    found = np.unique(pixels(data).reshape(-1, 3), axis=0)
    assert len(found) == 1
    return [int(value) for value in found[0]]


# --- orientation -----------------------------------------------------------------------------------------------------


def corners() -> Pixels:
    """Return an upright image, 24 pixels wide and 16 high, with a different colour in each corner."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12], upright[8:, 12:] = RED, GREEN, BLUE, WHITE
    upright[0, 0] = BLACK
    return upright


# How a camera stores an upright picture, from the EXIF standard: which side the 0th row and the 0th column show.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


def shot(orientation: int, format: str, upright: Pixels | None = None, **options: Any) -> bytes:
    """Return the image file that a camera writes when it is held in this orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    stored = STORED[orientation](corners() if upright is None else upright)
    return saved(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_a_picture_comes_out_upright(orientation: int, format: str, options: dict[str, Any]) -> None:
    data = shot(orientation, format, **options)
    assert inspect(data, LIMITS) == ImageFacts(24, 16, format)
    upright = encode(Image.fromarray(corners()), "PNG")
    for resize in Resize:
        difference = np.abs(pixels(data, 24, resize).astype(int) - pixels(upright, 24, resize)).max()
        assert difference <= (8 if format in ("JPEG", "AVIF") else 0)
    with Image.open(io.BytesIO(thumbnail(data, 12, LIMITS))) as small:
        assert small.size == (12, 8)
        shown = np.asarray(small.convert("RGB")).astype(int)
    for (y, x), colour in {(2, 2): RED, (2, 9): GREEN, (6, 2): BLUE, (6, 9): WHITE}.items():
        assert np.abs(shown[y, x] - colour).max() < 60


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.fromarray(corners()), "PNG", exif=exif)
    assert inspect(data, LIMITS) == ImageFacts(24, 16, "PNG")
    assert np.array_equal(pixels(data), pixels(encode(Image.fromarray(corners()), "PNG")))


def with_tags(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Return a JPEG whose EXIF has these entries (tag, type, count, value), which may be invalid."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(68)
    whole = saved(Image.fromarray(corners()), "JPEG", quality=95)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]


@pytest.mark.parametrize(
    ("tag", "kind"),
    [(256, 1), (258, 4), (270, 11), (282, 1), (282, 2), (700, 2), (700, 4), (33723, 11), (34665, 4), (34853, 4)],
)
def test_odd_tags_beside_the_orientation_do_no_harm(tag: int, kind: int) -> None:
    data = with_tags((274, 3, 1, b"\x03\0\0\0"), (tag, kind, 1, b"a\0\1\0"))
    assert inspect(data, LIMITS) == ImageFacts(24, 16, "JPEG")
    turned = pixels(saved(Image.fromarray(corners()), "JPEG", quality=95), 24, Resize.PAD)[::-1, ::-1]
    assert np.array_equal(pixels(data, 24, Resize.PAD), turned)
    assert thumbnail(data, 8, LIMITS)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "orientation",
    [
        chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ],
)
def test_the_orientation_of_a_png_may_stand_before_or_behind_its_pixels(orientation: bytes, before: bool) -> None:
    plain_png = encode(Image.fromarray(corners()), "PNG")
    at = 33 if before else -12
    data = plain_png[:at] + chunk(b"tEXt", b"Comment\0") + orientation + plain_png[at:]
    assert np.array_equal(pixels(data, 24, Resize.PAD), pixels(plain_png, 24, Resize.PAD)[::-1, ::-1])


NONSENSE = b"\0\x08\0\x02\x01\x12\0\x03" + bytes(30)


def with_chunks(*chunks: bytes) -> bytes:
    whole = png(1)
    return whole[:33] + b"".join(chunks) + whole[33:]


@pytest.mark.parametrize(
    "data",
    [
        with_chunks(chunk(b"eXIf", NONSENSE)),
        with_chunks(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        with_chunks(chunk(b"eXIf", NONSENSE)[:-1] + b"?"),
        with_chunks(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))),
        with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21)))),
        with_chunks(*[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20)))] * 70),
        with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  4\nno hex"))),
        with_chunks(chunk(b"tEXt", b"Comment\0text")[:-1] + b"?"),
        with_chunks(chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2**21)))),
        with_chunks(chunk(b"iCCP", b"profile\0\0nothing that zlib knows")),
    ],
)
def test_what_a_png_says_besides_its_pixels_may_be_long_and_broken(data: bytes) -> None:
    assert inspect(data, LIMITS) == ImageFacts(40, 40, "PNG")
    assert np.array_equal(pixels(data), pixels(png(1)))
    assert thumbnail(data, 8, LIMITS)


def test_broken_exif_of_other_formats_does_no_harm() -> None:
    exif = b"II*\0\x08\0\0\0" + bytes(30)
    for kind in ("WEBP", "AVIF", "JPEG"):
        data = saved(picture(1), kind, exif=exif).replace(b"II*\0\x08", b"none\x08")
        assert b"none\x08" in data
        assert np.array_equal(pixels(data), pixels(saved(picture(1), kind)))


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_its_colours(format: str) -> None:
    data = saved(plain((200, 100, 50)), format)
    assert inspect(data, LIMITS) == ImageFacts(8, 8, format)
    found = pixels(data)
    assert found.dtype == np.uint8 and found.shape == (8, 8, 3)
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 3


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = saved(Image.fromarray(levels), "PNG")
    assert data[24] == 16, "the file holds 16 bits"
    found = pixels(data, 256)
    assert np.array_equal(found[..., 0], np.rint(levels / 257.0).astype(np.uint8))
    assert np.array_equal(found[..., 0], found[..., 1]) and np.array_equal(found[..., 0], found[..., 2])


def test_sixteen_bit_greys_may_be_large() -> None:
    levels = np.full((3000, 3000), 40_000, np.uint16)
    assert colour_of(saved(Image.fromarray(levels), "PNG", compress_level=1)) == [156, 156, 156]


def test_sixteen_bit_greys_may_be_transparent() -> None:
    for grey, colour in {(0, 0): 255, (0, 1): 0, (40_000, 40_000): 255, (40_001, 40_000): 156}.items():
        head = chunk(b"IHDR", struct.pack(">2I5B", 2, 2, 16, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", grey[1]))
        rows = zlib.compress((b"\0" + struct.pack(">2H", grey[0], grey[0])) * 2)
        assert colour_of(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")) == [colour] * 3


# Colour types of PNG by the number of values per pixel, and how many of these are no transparency.
KINDS = {1: (0, 1), 2: (4, 1), 3: (2, 3), 4: (6, 3)}


def deep_png(values: npt.NDArray[np.uint16], transparency: bytes = b"") -> bytes:
    """Return a PNG of 16-bit values [height, width, 1 to 4]: grey or colours, the even ones with transparency."""
    height, width, channels = values.shape
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, KINDS[channels][0], 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values), 1)
    clear = chunk(b"tRNS", transparency) if transparency else b""
    return b"\x89PNG\r\n\x1a\n" + head + clear + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep(peak: int, channels: int, side: int = 16) -> npt.NDArray[np.uint16]:
    """Return random values up to `peak`, which one of them reaches, all opaque."""
    values = np.random.default_rng(peak).integers(0, peak + 1, (side, side, channels), np.uint16)
    values[3, 2, 0] = peak
    if channels % 2 == 0:
        values[..., -1] = 65535
    return values


@pytest.mark.parametrize(
    ("peak", "bit_depth"),
    [(0, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16383, 14), (16384, 16), (65535, 16)],
)
@pytest.mark.parametrize("channels", KINDS)
def test_the_bit_depth_is_the_smallest_that_holds_all_values(channels: int, peak: int, bit_depth: int) -> None:
    assert inspect(deep_png(deep(peak, channels)), LIMITS) == ImageFacts(16, 16, "PNG", bit_depth)


def test_other_images_have_no_bit_depth() -> None:
    for data in (png(1), jpeg(1), saved(plain(RED), "AVIF"), saved(plain(0, "CMYK"), "TIFF")):
        assert inspect(data, LIMITS).bit_depth is None
        assert np.array_equal(pixels(data), decode(data, 8, Resize.SQUASH, LIMITS, bit_depth=10))


@pytest.mark.parametrize("channels", KINDS)
@pytest.mark.parametrize("bit_depth", [10, 12, 14])
def test_fewer_than_sixteen_bits_are_scaled_from_what_they_are(
    channels: int, bit_depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, most = deep(2**bit_depth - 1, channels), 2**bit_depth - 1
    data, colours = deep_png(values), values[..., : KINDS[channels][1]]
    expected = np.broadcast_to(np.rint(colours * (255.0 / most)), (16, 16, 3))
    found = decode(data, 16, Resize.SQUASH, LIMITS, bit_depth=bit_depth)
    assert np.array_equal(found, expected)
    with Image.open(io.BytesIO(thumbnail(data, 16, LIMITS))) as small:
        assert np.abs(np.asarray(small).mean() - expected.mean()) < 8, "a thumbnail shows the image's own bits"
    assert (decode(data, 16, Resize.SQUASH, LIMITS, bit_depth=10)[(colours > 1023).all(axis=2)] == 255).all()
    monkeypatch.setattr(images, "_STRIP_PIXELS", 60)
    assert np.array_equal(decode(data, 16, Resize.SQUASH, LIMITS, bit_depth=bit_depth), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_tiffs_are_scaled_like_deep_pngs(channels: int, compression: int, order: str) -> None:
    values = deep(4095, channels)
    data = deep_tiff(values, compression, order)
    assert inspect(data, LIMITS) == ImageFacts(16, 16, "TIFF", 12)
    for bit_depth in (12, 16):
        found = [decode(file, 9, Resize.CROP, LIMITS, bit_depth=bit_depth) for file in (data, deep_png(values))]
        assert np.array_equal(*found)


def deep_tiff(values: npt.NDArray[np.uint16], compression: int, order: str) -> bytes:
    """Return a TIFF of one strip of 16-bit values, grey or colours, plain (1) or deflated (8)."""
    height, width, channels = values.shape
    strip = values.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if compression == 8 else strip
    bits_at = 8 + len(strip)
    tags = [(256, width), (257, height), (258, 16 if channels == 1 else bits_at), (259, compression)]
    tags += [(262, 1 if channels == 1 else 2), (273, 8), (277, channels), (278, height), (279, len(strip))]
    entries = b"".join(
        struct.pack(f"{order}2HI", tag, 3, channels) + struct.pack(f"{order}2H", value, 0)
        if tag == 258 and channels == 1
        else struct.pack(f"{order}2H2I", tag, 3 if tag == 258 else 4, channels if tag == 258 else 1, value)
        for tag, value in tags
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", bits_at + 6)
    return start + strip + struct.pack(f"{order}3H", 16, 16, 16) + struct.pack(f"{order}H", 9) + entries + bytes(4)


def test_a_clear_colour_of_a_deep_image_is_laid_on_white() -> None:
    for channels in (1, 3):
        values = np.full((4, 4, channels), 4000, np.uint16)
        values[:2] = 2000
        found = decode(
            deep_png(values, struct.pack(f">{channels}H", *[4000] * channels)), 4, Resize.CROP, LIMITS, bit_depth=12
        )
        assert (found[:2] == 125).all() and (found[2:] == 255).all()


def test_a_transparent_deep_image_is_laid_on_white() -> None:
    for channels in (2, 4):
        values = np.full((4, 4, channels), 4095, np.uint16)
        values[..., -1] = 0
        values[:2] = 0
        assert (decode(deep_png(values), 4, Resize.CROP, LIMITS, bit_depth=12) == 255).all()
        values[:2, :, -1] = 65535
        assert (decode(deep_png(values), 4, Resize.CROP, LIMITS, bit_depth=12)[:2] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "1", "CMYK", "I;16"])
def test_strips_have_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shades = np.random.default_rng(0).integers(0, 256, (31, 23, 4), np.uint8)
    wide = Image.fromarray(shades[..., 0].astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(shades).convert("RGB").quantize(9) if mode == "P" else None
    image = image or (Image.fromarray(shades) if mode == "RGBA" else Image.fromarray(shades).convert(mode))
    transparency = {"P": b"\x80\x10\xff", "L": 7, "1": 0, "RGB": tuple(map(int, shades[3, 3, :3]))}.get(mode)
    kind = "TIFF" if mode in ("PA", "CMYK") else "PNG"
    data = saved(image, kind, **({} if transparency is None else {"transparency": transparency}))
    whole = {resize: pixels(data, 31, resize) for resize in Resize}
    monkeypatch.setattr(images, "_STRIP_PIXELS", 60)
    assert all(np.array_equal(pixels(data, 31, resize), found) for resize, found in whole.items())


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (plain((255, 0, 0, 0), "RGBA"), {}, [255, 255, 255]),
        (plain((255, 0, 0, 128), "RGBA"), {}, [255, 127, 127]),
        (plain((255, 0, 0, 255), "RGBA"), {}, [255, 0, 0]),
        (plain((0, 0), "LA"), {}, [255, 255, 255]),
        (plain((0, 102), "LA"), {}, [153, 153, 153]),
        (plain(0, "L"), {"transparency": 0}, [255, 255, 255]),
        (plain(0, "L"), {"transparency": 7}, [0, 0, 0]),
        (plain(0, "1"), {"transparency": 0}, [255, 255, 255]),
        (plain(RED), {"transparency": RED}, [255, 255, 255]),
        (plain(RED), {"transparency": BLUE}, [255, 0, 0]),
        (plain(RED).quantize(2), {"transparency": 0}, [255, 255, 255]),
        (plain(RED).quantize(2), {"transparency": b"\x80"}, [255, 127, 127]),
        (plain(RED).quantize(2), {}, [255, 0, 0]),
    ],
)
def test_transparency_is_laid_on_white(image: Image.Image, options: dict[str, Any], colour: list[int]) -> None:
    data = saved(image, "PNG", **options)
    assert inspect(data, LIMITS) == ImageFacts(8, 8, "PNG")
    assert colour_of(data) == colour


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_transparency_of_other_formats_is_laid_on_white_too(format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert colour_of(saved(plain((255, 0, 0, 0), "RGBA"), format, **options)) == [255, 255, 255]


def test_colour_under_transparency_does_not_bleed_into_edges() -> None:
    image = plain((255, 0, 0, 0), "RGBA")
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    found = pixels(saved(image, "PNG"), 4)
    assert np.array_equal(found[:, 0], [[0, 0, 255]] * 4) and np.array_equal(found[:, 3], [[255, 255, 255]] * 4)
    assert (found[..., 2] == 255).all(), "blue on white; red was not to be seen"


def test_printers_colours_become_screen_colours() -> None:
    found = pixels(saved(plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found - RED).max() <= 6
    assert pixels(saved(plain((0, 0, 0, 255), "CMYK"), "JPEG", quality=95)).max() <= 6


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_one_bit_is_black_and_white(format: str) -> None:
    image = plain(0, "1")
    image.paste(1, (0, 0, 4, 8))
    found = pixels(saved(image, format))
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB"])
def test_greys_are_the_same_in_each_channel(mode: str) -> None:
    data = saved(Image.linear_gradient("L").resize((16, 16)).convert(mode), "PNG")
    found = pixels(data, 16)
    assert np.array_equal(found[..., 0], found[..., 1]) and np.array_equal(found[..., 0], found[..., 2])
    assert found[0].max() < 20 and found[-1].min() > 235


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first_frame_counts(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    moving = saved(plain(RED), format, save_all=True, append_images=[plain(BLUE), plain(GREEN)], duration=50, **options)
    with Image.open(io.BytesIO(moving)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert inspect(moving, LIMITS) == ImageFacts(8, 8, format, has_more=True)
    assert colour_of(moving) == [255, 0, 0]


def test_of_several_pages_the_first_counts_and_the_others_are_noticed() -> None:
    pages = saved(plain(RED), "TIFF", save_all=True, append_images=[plain(BLUE)])
    assert inspect(pages, LIMITS) == ImageFacts(8, 8, "TIFF", has_more=True)
    assert colour_of(pages) == [255, 0, 0]
    for other in (plain(BLUE, size=(4, 4)), plain(0, "1", size=(4, 4))):  # a smaller copy, as viewers want it
        pyramid = saved(plain(RED), "TIFF", save_all=True, append_images=[other])
        assert inspect(pyramid, LIMITS) == ImageFacts(8, 8, "TIFF")


def test_a_jpeg_with_more_pictures_behind_it_is_a_jpeg() -> None:
    several = saved(picture(1, RED), "MPO", save_all=True, append_images=[picture(2, BLUE)])
    with Image.open(io.BytesIO(several)) as image:
        assert image.format == "MPO"
    assert inspect(several, LIMITS) == ImageFacts(40, 40, "JPEG")
    assert np.array_equal(pixels(several), pixels(saved(picture(1, RED), "JPEG")))


# --- geometry --------------------------------------------------------------------------------------------------------


def bands(*colours: tuple[int, int, int], across: bool = True) -> bytes:
    """Return a picture of square fields of 10 pixels, beside each other or on top of each other."""
    fields = np.repeat(np.repeat(np.array([colours], np.uint8), 10, 0), 10, 1)
    return encode(Image.fromarray(np.ascontiguousarray(fields if across else fields.swapaxes(0, 1))), "PNG")


@pytest.mark.parametrize("across", [True, False])
def test_squash_shows_everything_and_forgets_the_aspect(across: bool) -> None:
    found = pixels(bands(RED, GREEN, BLUE, across=across), 30)
    found = found if across else found.swapaxes(0, 1)
    for start, colour in zip((0, 10, 20), (RED, GREEN, BLUE), strict=True):
        assert (found[:, start : start + 10] == colour).all()


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("size", [4, 10, 17, 40])
def test_crop_shows_the_square_in_the_middle(across: bool, size: int) -> None:
    found = pixels(bands(RED, GREEN, BLUE, across=across), size, Resize.CROP)
    found = found if across else found.swapaxes(0, 1)
    edge = -(-size // 20)  # antialiasing looks half a pixel beyond the cut
    assert (found[:, edge:-edge] == GREEN).all()
    assert (found[..., 1] > 127).all()
    assert np.array_equal(found[..., 0], found[:, ::-1, 2]), "as much of the left field as of the right one"


@pytest.mark.parametrize("across", [True, False])
def test_crop_cuts_as_much_on_both_sides(across: bool) -> None:
    found = pixels(bands(RED, BLUE, across=across), 10, Resize.CROP)
    found = found if across else found.swapaxes(0, 1)
    assert (found[:, :5] == RED).all() and (found[:, 5:] == BLUE).all()


@pytest.mark.parametrize("across", [True, False])
def test_pad_shows_everything_between_black_borders(across: bool) -> None:
    found = pixels(bands(RED, GREEN, BLUE, across=across), 30, Resize.PAD)
    found = found if across else found.swapaxes(0, 1)
    assert (found[:10] == BLACK).all() and (found[20:] == BLACK).all()
    for start, colour in zip((0, 10, 20), (RED, GREEN, BLUE), strict=True):
        assert (found[10:20, start : start + 10] == colour).all()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.sampled_from(Resize))
def test_a_plain_picture_stays_plain_whatever_its_shape(width: int, height: int, size: int, resize: Resize) -> None:
    found = decode(encode(plain((200, 100, 50), size=(width, height)), "PNG"), size, resize, LIMITS)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    filled = (found == (200, 100, 50)).all(axis=2)
    if resize is Resize.PAD:
        assert (found[~filled] == 0).all()
        rows, columns = filled.any(axis=1), filled.any(axis=0)
        assert rows.sum() == max(1, round(size * min(1, height / width)))
        assert columns.sum() == max(1, round(size * min(1, width / height)))
        assert filled.sum() == rows.sum() * columns.sum()
        assert abs(int(rows[::-1].argmax()) - int(rows.argmax())) <= 1, "the borders are alike"
    else:
        assert filled.all()


@given(st.integers(1, 40), st.sampled_from(Resize))
def test_a_square_is_resized_the_same_in_every_way(size: int, resize: Resize) -> None:
    assert np.array_equal(pixels(png(5), size, resize), pixels(png(5), size))


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    for resize in Resize:
        assert np.array_equal(pixels(png(3), 40, resize), np.asarray(picture(3)))


def test_image_rule_1_gives_these_pixels() -> None:
    assert IMAGE_RULE == 1
    y, x = np.mgrid[:9, :12]
    image = np.stack([x * 20, y * 25, (x * y) % 7 * 40], axis=-1).astype(np.uint8)
    data = encode(Image.fromarray(image), "PNG")
    found = {resize: pixels(data, 3, resize).tolist() for resize in Resize}
    assert found == {
        Resize.SQUASH: [
            [[38, 31, 72], [110, 31, 96], [182, 31, 85]],
            [[38, 100, 118], [110, 100, 117], [182, 100, 126]],
            [[38, 169, 72], [110, 169, 74], [182, 169, 78]],
        ],
        Resize.CROP: [
            [[25, 31, 58], [80, 31, 111], [140, 31, 70]],
            [[25, 100, 111], [80, 100, 139], [140, 100, 93]],
            [[25, 169, 66], [80, 169, 88], [140, 169, 58]],
        ],
        Resize.PAD: [
            [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
            [[38, 55, 89], [110, 55, 104], [182, 55, 101]],
            [[38, 145, 94], [110, 145, 92], [182, 145, 100]],
        ],
    }, "other pixels are another rule: give it a number, since caches and bundles name it"


# --- large files -----------------------------------------------------------------------------------------------------


def landscape(width: int, height: int) -> Image.Image:
    """Return an image with gradients, waves and sharp edges, like a photograph."""
    y, x = np.mgrid[:height, :width] / 200.0
    waves = [128 + 100 * np.sin(3 * x + y), 255 * (y / y.max()), 128 + 60 * np.sign(np.sin(x * 2) * np.cos(y * 3))]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("resize", Resize)
def test_a_large_jpeg_is_decoded_in_part_and_looks_nearly_the_same(resize: Resize, orientation: int) -> None:
    upright = np.asarray(landscape(1600, 1000))
    data = shot(orientation, "JPEG", upright, quality=92)
    with Image.open(io.BytesIO(data)) as whole:
        stored = np.asarray(whole)
    if orientation == 6:
        stored = np.ascontiguousarray(np.rot90(stored, -1))
    full = encode(Image.fromarray(stored), "PNG")
    difference = np.abs(pixels(data, 96, resize).astype(int) - pixels(full, 96, resize))
    assert 0 < difference.mean() < 1 and difference.max() < 24


def test_a_small_jpeg_is_decoded_whole() -> None:
    with Image.open(io.BytesIO(jpeg(1, side=190))) as whole:
        full = encode(whole.convert("RGB"), "PNG")
    assert np.array_equal(pixels(jpeg(1, side=190), 48), pixels(full, 48))


def lossless(grey: npt.NDArray[np.uint8]) -> bytes:
    """Return a lossless JPEG: each pixel as its difference from the one before, with codes of five bits."""
    height, width = grey.shape
    before = np.roll(grey, 1, axis=1).astype(int)
    before[1:, 0], before[0, 0] = grey[:-1, 0], 128
    bits = ""
    for difference in (grey - before).ravel():
        size = int(abs(difference)).bit_length()
        value = int(difference) if difference > 0 else int(difference) + 2**size - 1
        bits += f"{size:05b}" + (f"{value:0{size}b}" if size else "")
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")

    def segment(kind: int, body: bytes) -> bytes:
        return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body

    frame = segment(0xC3, struct.pack(">B2HB3B", 8, height, width, 1, 1, 0x11, 0))
    codes = segment(0xC4, bytes([0, 0, 0, 0, 0, 17, *bytes(11), *range(17)]))
    return b"\xff\xd8" + frame + codes + segment(0xDA, bytes([1, 1, 0, 1, 0, 0])) + coded + b"\xff\xd9"


def test_a_lossless_jpeg_is_read_in_one_scale_wherever_it_is_read() -> None:
    grey = np.asarray(landscape(300, 200).convert("L"))
    data, same = lossless(grey), saved(Image.fromarray(grey), "PNG")
    assert inspect(data, LIMITS) == ImageFacts(300, 200, "JPEG")
    for size in (8, 32, 200, 400):
        assert np.array_equal(pixels(data, size), pixels(same, size))
    assert thumbnail(data, 16, LIMITS) == thumbnail(same, 16, LIMITS)


def test_decoding_gives_the_same_pixels_every_time_and_in_every_thread() -> None:
    files = [saved(landscape(640, 400), kind) for kind in FORMATS]
    before = [pixels(data, 32, Resize.CROP) for data in files]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda data: pixels(data, 32, Resize.CROP), files * 4))
    assert all(np.array_equal(one, other) for one, other in zip(before * 4, again, strict=True))


# --- thumbnails and metadata -----------------------------------------------------------------------------------------


def traces(data: bytes) -> set[str]:
    """Return the metadata of an image file."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        harmless = {"loop", "background", "timestamp", "duration", "jfif", "jfif_version", "jfif_unit", "jfif_density"}
        return {str(name) for name in image.info} - harmless | ({"exif"} if len(image.getexif()) else set())


def telling(format: str) -> bytes:
    """Return an image with metadata: place, author and colour profile."""
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    options: dict[str, Any] = {"exif": exif, "icc_profile": b"a profile of colours" * 10}
    if format == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
        options["pnginfo"].add_text("Comment", "taken at home")
    elif format == "WEBP":
        options["xmp"] = b"<x:xmpmeta/>"
    else:
        options["comment"] = b"taken at home"
    data = saved(picture(1), format, **options)
    assert {"exif", "icc_profile"} <= traces(data)
    return data


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_thumbnail_carries_no_metadata(format: str) -> None:
    small = thumbnail(telling(format), 16, LIMITS)
    assert traces(small) == set()
    assert not any(chunk in small for chunk in (b"EXIF", b"ICCP", b"XMP ", b"somebody"))
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.size, image.mode) == ("WEBP", (16, 16), "RGB")


@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_encoded_image_carries_no_metadata(source: str, format: str) -> None:
    with Image.open(io.BytesIO(telling(source))) as image:
        data = encode(image, format)
        assert "icc_profile" in image.info, "the image itself is left as it was"
    assert traces(data) == set()


def test_an_encoded_palette_keeps_its_transparency() -> None:
    with Image.open(io.BytesIO(saved(plain(RED).quantize(2), "PNG", transparency=0))) as image:
        assert colour_of(encode(image, "PNG")) == [255, 255, 255]


@pytest.mark.parametrize(
    ("size", "small"), [((40, 20), (16, 8)), ((20, 40), (8, 16)), ((10, 5), (10, 5)), ((3000, 2), (16, 1))]
)
def test_a_thumbnail_keeps_the_aspect_and_never_grows(size: tuple[int, int], small: tuple[int, int]) -> None:
    for kind in FORMATS:
        with Image.open(io.BytesIO(thumbnail(saved(plain(RED, size=size), kind), 16, LIMITS))) as image:
            assert image.size == small
            assert np.abs(np.asarray(image).astype(int) - RED).max() < 12


def test_a_thumbnail_shows_transparency_as_white() -> None:
    with Image.open(io.BytesIO(thumbnail(saved(plain((255, 0, 0, 0), "RGBA"), "PNG"), 8, LIMITS))) as image:
        assert np.asarray(image).min() > 250


# --- refusals --------------------------------------------------------------------------------------------------------


@Doors
@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "an empty file"),
        (bytes(2000), "an empty file, or only zeros"),
        (b"text in a file called 1.jpg\n" * 10, "something else"),
        (b"RIFF\0\0\0\0WEBP", "something else"),
        (zipped({"1.jpg": b"data"}), "a zip"),
        (b"%PDF-1.7\n" + bytes(100), "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n" + bytes(100), "a PostScript file"),
        (b"8BPS\0\1" + bytes(100), "a Photoshop file"),
        (b"icns" + struct.pack(">I", 108) + bytes(100), "an icon"),
        (b"SIMPLE  =                    T" + b" " * 2850, "a FITS file"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "an SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC.* Convert it to JPEG"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "a HEIC.* Convert it to JPEG"),
        (b"\xff\x0a" + bytes(50), "a JPEG XL"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(50), "a camera's raw file"),
        (bytes(128) + b"DICM" + bytes(50), "a DICOM file"),
        (b"data:image/png;base64,iVBORw0KGgo=", "the text of a data URL"),
        *(
            (saved(plain(RED), kind), name)
            for kind, name in {"ICO": "an icon", "PPM": "a PNM", "JPEG2000": "a JPEG 2000", "DDS": "a DDS"}.items()
        ),
        *((saved(plain(RED), kind), "something else") for kind in ("TGA", "PCX")),
    ],
)
def test_what_is_no_image_of_an_allowed_format_is_refused_by_its_name(door: Door, data: bytes, name: str) -> None:
    with pytest.raises(ImageRefused, match=rf"Expected an image \(JPEG, .*\)\. Received {name}"):
        door(data, LIMITS)


@Doors
@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"])
def test_the_start_of_an_image_is_refused(door: Door, start: bytes) -> None:
    with pytest.raises(ImageRefused):
        door(start, LIMITS)


@Doors
def test_a_format_is_allowed_by_name(door: Door) -> None:
    limits = ImageLimits(formats=("TIFF", "PNG"))
    door(saved(plain(RED), "TIFF"), limits)
    door(saved(plain(RED), "PNG"), limits)
    with pytest.raises(ImageRefused, match=r"Expected an image \(TIFF, PNG\)\. Received a JPEG\..*_IMAGE_FORMATS"):
        door(saved(plain(RED), "JPEG"), limits)
    with pytest.raises(ImageRefused, match=r"Received an AVIF\."):
        door(saved(plain(RED), "AVIF"), limits)


def test_a_tiff_is_read_where_it_is_allowed() -> None:
    limits = ImageLimits(formats=("TIFF",))
    data = saved(plain(RED), "TIFF")
    assert inspect(data, limits) == ImageFacts(8, 8, "TIFF")
    assert (decode(data, 4, Resize.CROP, limits) == RED).all()
    levels = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    assert (decode(saved(levels, "TIFF"), 4, Resize.CROP, limits) == 156).all()


@pytest.mark.parametrize("mode", ["I", "LAB", "YCbCr", "CMYK", "LA", "1"])
def test_what_is_accepted_in_one_place_is_accepted_in_all(mode: str) -> None:
    limits = ImageLimits(formats=("TIFF",))
    data = saved(Image.new(mode, (8, 8)), "TIFF")
    outcomes = set()
    for door in (
        lambda: inspect(data, limits),
        lambda: decode(data, 8, Resize.PAD, limits),
        lambda: thumbnail(data, 8, limits),
    ):
        try:
            outcomes.add(bool(door() is not None))
        except ImageRefused:
            outcomes.add(False)
    assert len(outcomes) == 1


@Doors
@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused(door: Door, format: str) -> None:
    data = saved(landscape(64, 48), format)
    for part in (0.3, 0.5, 0.9):
        with pytest.raises(ImageRefused, match=r"^The image is damaged: .+\.$|^Expected an image"):
            door(data[: int(len(data) * part)], LIMITS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 100}])
def test_a_jpeg_may_lack_its_end_but_no_pixels(options: dict[str, Any]) -> None:
    for image in (landscape(320, 240), landscape(50, 37).convert("L")):
        whole = saved(image, "JPEG", **options)
        for data in (whole[:-2], whole[:-1]):
            assert inspect(data, LIMITS) == inspect(whole, LIMITS)
            for size in (20, 300):
                assert np.array_equal(pixels(data, size), pixels(whole, size))
            assert thumbnail(data, 16, LIMITS) == thumbnail(whole, 16, LIMITS)
        scans = [match.start() for match in re.finditer(b"\xff\xda", whole)]
        for cut in scans[1:]:  # the image is coarse, or lacks colours
            with pytest.raises(ImageRefused, match="The image is damaged: "):
                pixels(whole[: whole.rindex(b"\xff\xc4", 0, cut)], 20)
        for lost in (4, 5, 10, 50, 200):
            with pytest.raises(ImageRefused, match="The image is damaged: "):
                inspect(whole[:-lost], LIMITS)
            with pytest.raises(ImageRefused, match="The image is damaged: "):
                pixels(whole[:-lost], 20)


@Doors
def test_a_preview_of_a_raw_file_is_not_taken_for_the_photograph(door: Door) -> None:
    for tags in ({254: 1}, {50706: b"\1\4\0\0"}):
        with pytest.raises(ImageRefused, match=r"Received a camera's raw file .* Export it"):
            door(saved(plain(RED), "TIFF", tiffinfo=tags), LIMITS)


@Doors
def test_a_tiff_whose_black_and_white_are_unknown_is_refused(door: Door) -> None:
    with pytest.raises(ImageRefused, match=r"floating-point values.* Scale the values"):
        door(saved(Image.new("F", (8, 8)), "TIFF"), LIMITS)


@Doors
def test_a_damaged_file_is_refused(door: Door) -> None:
    data = bytearray(png(1))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageRefused, match="The image is damaged"):
        door(bytes(data), LIMITS)


@Doors
def test_a_large_file_is_refused_before_it_is_read(door: Door) -> None:
    data = png(1)
    door(data, ImageLimits(size_bytes=len(data)))
    with pytest.raises(ImageRefused, match="The file has"):
        door(data, ImageLimits(size_bytes=len(data) - 1))
    with pytest.raises(ImageRefused, match=r"The file has 20\.5 MiB; the limit is 20 MiB"):
        door(data + bytes(20 * MIB + MIB // 2 - len(data)), LIMITS)


@Doors
@pytest.mark.parametrize("format", FORMATS)
def test_an_image_of_too_many_pixels_is_refused(door: Door, format: str) -> None:
    data = saved(plain(RED, size=(30, 20)), format)
    door(data, ImageLimits(pixels=600, side=30))
    for limits in (ImageLimits(pixels=599), ImageLimits(side=29)):
        with pytest.raises(ImageRefused, match=r"The image has 30 × 20 pixels; the limit is .* megapixels"):
            door(data, limits)


def scanned(scans: int, side: int = 64) -> bytes:
    """Return a progressive JPEG with this number of scans."""
    usual = slow_jpeg(0, side).count(b"\xff\xda")
    return slow_jpeg(scans - usual, side)


@Doors
def test_a_jpeg_of_too_many_scans_is_refused_without_decoding_any(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    door(scanned(100), LIMITS)
    door(scanned(101), ImageLimits(scans=101))
    refused = (scanned(101), scanned(10_000, side=4000))

    def decode(image: ImageFile.ImageFile) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(ImageRefused, match="it was decoded"):
        door(scanned(100), LIMITS)
    for data in refused:
        with pytest.raises(ImageRefused, match=r"more scans than the limit of 100\."):
            door(data, LIMITS)


@Doors
def test_what_only_looks_like_scans_does_not_count(door: Door) -> None:
    whole = saved(landscape(64, 48), "JPEG", progressive=True)
    many = b"\xff\xda" * 1000
    remark = b"\xff\xfe" + struct.pack(">H", len(many) + 2) + many
    for data in (whole + many, whole[:2] + remark + whole[2:], whole[:-2] + remark + whole[-2:]):
        door(data, LIMITS)


@Doors
@pytest.mark.parametrize(
    "filling", [b"\xff" * 9, b"\xff\x01", b"\xff\xd0", b"\xff\xfe\x00\x04\xff\xd9", b"\xff\x00\x7f"]
)
def test_scans_do_not_hide_behind_other_bytes(door: Door, filling: bytes) -> None:
    data = scanned(200)
    head, *scans = data.split(b"\xff\xda")
    with pytest.raises(ImageRefused):
        door(head + b"".join(filling + b"\xff\xda" + scan for scan in scans), LIMITS)


@Doors
@pytest.mark.parametrize(
    "filling",
    [b"\xff", b"\0", b"\xff\xd0", b"\xff\xc8\x01\x00" + bytes(254), b"\xff\xfe\x00\x02"],
    ids=["padding", "zeros", "restarts", "reserved", "empty-comments"],
)
def test_a_jpeg_whose_head_takes_long_to_read_is_refused(door: Door, filling: bytes) -> None:
    data = saved(landscape(64, 48), "JPEG")
    first = 2 + 2 + int.from_bytes(data[4:6])
    door(data[:first] + b"\xff" * 100 + data[first:], LIMITS)
    for end in (b"", b"\xff\0"):
        with pytest.raises(ImageRefused, match="between its start and its pixels"):
            door(data[:first] + filling * (MIB // len(filling)) + end + data[first:], LIMITS)


@Doors
def test_a_long_run_among_the_scans_of_a_jpeg_is_searched_only_once(door: Door) -> None:
    data = saved(landscape(64, 48), "JPEG")
    run = b"\xff" * MIB + b"\0" + b"\xff\xda" * 200
    door(data + run, LIMITS)
    with pytest.raises(ImageRefused):
        door(data[:-2] + run, LIMITS)


def png_of(width: int, height: int, rows: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    """Return a PNG whose header has these values."""

    head = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@Doors
def test_a_png_of_very_many_chunks_is_refused(door: Door) -> None:
    data = saved(landscape(64, 48), "PNG")
    for kind in (b"tEXt", b"IDAT"):
        door(data[:33] + chunk(kind, b"") * 1000 + data[33:], LIMITS)
        with pytest.raises(ImageRefused, match="too many chunks"):
            door(data[:33] + chunk(kind, b"") * 100_000 + data[33:], LIMITS)


def gif_frame(width: int, height: int) -> bytes:
    """Return a GIF of one pixel with a frame that claims to be larger, and to be cleared afterwards."""
    frame = b"!\xf9\x04\x08\0\0\0\0," + struct.pack("<4HB", 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<2H3B", 1, 1, 0, 0, 0) + frame + b"\x02\0;"


def claiming(format: str) -> bytes:
    """Return a small file whose header claims about as many pixels as the format allows."""
    data = bytearray(saved(plain(RED), format))
    if format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">2H", 65_500, 65_500)
    elif format == "GIF":
        data[6:10] = struct.pack("<2H", 65_500, 65_500)
    elif format == "BMP":
        data[18:26] = struct.pack("<2i", 60_000, -60_000)
    elif format == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<2H", 16_383, 16_383)
    else:
        return png_of(40_000, 40_000)
    return bytes(data)


FRUGAL = """
import resource, sys
from pathlib import Path
from artifacts.images import ImageLimits, decode, inspect, thumbnail
from recipes.recipe import Resize
from errors import ImageRefused

pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
limits = ImageLimits()
doors = [inspect, lambda data, limits: thumbnail(data, 64, limits)]
doors += [lambda data, limits, way=way: decode(data, 299, way, limits) for way in Resize]
for file in sys.argv[2:]:
    for door in doors:
        try:
            door(Path(file).read_bytes(), limits)
            print("taken")
        except ImageRefused as error:
            print(error.detail)
"""


def frugally(folder: Path, files: list[bytes], memory_mib: int) -> list[str]:
    """Return what each function answers for each file, in a process with little memory to spare."""
    paths = [folder / str(number) for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", FRUGAL, str(memory_mib), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_an_image_that_claims_to_be_huge_is_refused_without_taking_memory(tmp_path: Path) -> None:
    files = [claiming(kind) for kind in ("JPEG", "PNG", "BMP", "GIF")]
    files += [gif_frame(65_535, 65_535), png_of(20_000, 1), png_of(2**31 - 1, 2**31 - 1)]
    answers = frugally(tmp_path, files, 100)
    assert len(answers) == 7 * 5
    assert {answer.partition(" pixels; ")[2] for answer in answers} == {
        "the limit is 40 megapixels and 16,384 pixels per side."
    }


@Doors
def test_a_webp_that_claims_to_be_huge_is_refused(door: Door) -> None:
    with pytest.raises(ImageRefused):
        door(claiming("WEBP"), LIMITS)


def test_a_very_long_image_takes_no_more_memory_than_its_pixels(tmp_path: Path) -> None:
    files = [encode(plain(RED, size=size), "PNG") for size in ((16_384, 1), (1, 16_384), (16_384, 3))]
    assert frugally(tmp_path, files, 200) == ["taken"] * 15


MEASURED = """
import resource, sys
from contextlib import contextmanager
from pathlib import Path
from artifacts.images import ImageLimits, decode
from recipes.recipe import Resize

@contextmanager
def reserve(size_bytes):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

hard = resource.getrlimit(resource.RLIMIT_AS)[1]
decode(Path(sys.argv[1]).read_bytes(), 8, Resize.SQUASH, ImageLimits())  # what is loaded once
for file in sys.argv[1:]:
    decode(Path(file).read_bytes(), 600, Resize.PAD, ImageLimits(), reserve, 12)
"""


def test_no_image_takes_more_memory_than_it_reserves(tmp_path: Path) -> None:
    image = landscape(2400, 1600)
    clear, exif = image.copy(), Image.Exif()
    clear.putalpha(image.getchannel("R"))
    exif[ExifTags.Base.Orientation] = 6
    files = [saved(clear, "AVIF", speed=10, exif=exif), saved(clear, "WEBP", method=0, exif=exif)]
    files += [saved(clear, "PNG", compress_level=1), saved(image, "PNG", compress_level=1, exif=exif)]
    files += [saved(image.convert("CMYK"), "JPEG", progressive=True), saved(image, "JPEG")[:-2]]
    files += [saved(clear, "TIFF", compression="tiff_adobe_deflate", strip_size=2**30)]
    files += [saved(image.convert("L"), "BMP"), saved(image.quantize(9, Image.Quantize.FASTOCTREE), "GIF")]
    levels = np.arange(2400 * 1600 * 4, dtype=np.uint32).reshape(1600, 2400, 4).astype(np.uint16) & 4095
    files += [deep_png(levels[..., :channels]) for channels in KINDS]
    files += [deep_tiff(levels[..., :channels], 8, ">") for channels in (1, 3)]
    paths = [tmp_path / str(number) for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    subprocess.run([sys.executable, "-c", MEASURED, *map(str, paths)], cwd=ROOT, check=True)


def test_an_image_without_pixels_is_refused() -> None:
    for data in (png_of(0, 5), png_of(5, 0)):
        for door in (inspect, lambda data, limits: decode(data, 8, Resize.CROP, limits)):
            with pytest.raises(ImageRefused):
                door(data, LIMITS)


SEEDS = [
    shot(6, "JPEG"),
    shot(8, "PNG"),
    shot(5, "WEBP"),
    saved(picture(1), "JPEG", progressive=True),
    saved(picture(1).convert("CMYK"), "JPEG"),
    saved(picture(1).quantize(8), "PNG", transparency=1),
    saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "PNG"),
    saved(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
    saved(picture(1), "BMP"),
    saved(picture(1), "MPO", save_all=True, append_images=[picture(2)]),
    saved(picture(1), "AVIF", speed=10),
    saved(picture(1), "TIFF"),
    saved(picture(1), "TIFF", compression="tiff_lzw"),
    deep_png(deep(4095, 3)),
    deep_png(deep(4095, 2)),
    deep_tiff(deep(4095, 3), 8, ">"),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on damaged files
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
def test_a_damaged_image_is_refused_everywhere_or_nowhere(whole: bytes, seed: int) -> None:
    source = random.Random(seed)
    data = bytearray(whole)
    for _ in range(source.randint(1, 5)):
        position = source.randrange(source.choice([min(300, len(data)), len(data)]))
        change = source.choice(["set", "set", "set", "drop", "add"])
        if change == "set":
            data[position] = source.choice([0, 1, 2, 7, 127, 128, 255, source.randrange(256)])
        elif change == "drop":
            del data[position : position + source.randint(1, 8)]
        else:
            data[position:position] = source.randbytes(source.randint(1, 8))
    assume(data)
    outcomes = []
    for door in (
        lambda: inspect(bytes(data), LIMITS),
        lambda: decode(bytes(data), 24, Resize.CROP, LIMITS),
        lambda: decode(bytes(data), 24, Resize.PAD, LIMITS),
        lambda: thumbnail(bytes(data), 16, LIMITS),
    ):
        try:
            door()
            outcomes.append("taken")
        except ImageRefused:
            outcomes.append("refused")
    assert len(set(outcomes)) == 1
