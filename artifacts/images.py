"""The only decode and resize in the program: what training saw is what prediction sees. Knows no archive.

Image rule 1, part of every cache key and bundle: a JPEG is decoded at the next DCT scale that is at least twice the
target; EXIF orientation is applied once; 16-bit greys are scaled, not clipped; transparency is laid on white; the rest
is an antialiased bilinear resize of RGB. Changing any of it means a new rule number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from errors import ImageRefused
from recipes.layers import Sides, sides
from recipes.recipe import Resize

IMAGE_RULE = 1

MIB = 1024 * 1024
Pixels = npt.NDArray[np.uint8]

# Pillow's own limit is one global number with a warning below it and an error above; `_open` checks ours, which an
# operator may raise, before a single pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class ImageLimits:
    """What one image may be at most, at both doors. `size_bytes` in bytes, `side` in pixels.

    `scans` are the passes over the whole picture that a JPEG asks for: 25 ms each at 40 megapixels, for a few hundred
    bytes. A progressive one has about ten.
    """

    size_bytes: int = 20 * MIB
    pixels: int = 40_000_000
    side: int = 16_384
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    scans: int = 100


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of an image besides its bytes: its upright size in pixels and its format's name."""

    width: int
    height: int
    format: str


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Decode the whole image once to see that it can be used. Raises ImageRefused."""
    with _open(data, limits) as image:
        # A JPEG with further pictures behind it, as phones write them, calls itself MPO.
        facts = ImageFacts(*_upright_size(image), "JPEG" if image.format == "MPO" else image.format or "")
        _to_rgb(_upright(image))
        return facts


def decode(data: bytes, size: Sides, resize: Resize, limits: ImageLimits) -> Pixels:
    """Decode an image by image rule 1.

    Args:
        data: the file's bytes.
        size: side of the result in pixels, or its height and width.
        resize: `squash` ignores the aspect ratio, `crop` keeps the centre square, `pad` adds black borders.
        limits: what the image may be at most.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageRefused: the bytes are no image that can be used.
    """
    with _open(data, limits) as image:
        down, across = sides(size)
        width, height = _fitted(_upright_size(image), (across, down), resize)
        image.draft(None, (2 * height, 2 * width) if _is_lying(image) else (2 * width, 2 * height))
        upright = _to_rgb(_upright(image))
        if resize is Resize.CROP:  # cut first: all of a 16,384 × 1 image at this height would take gigabytes
            box = _middle(upright, (width, height), (across, down))
            scaled = upright.resize((across, down), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        else:
            scaled = upright.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if scaled.size != (across, down):
        left, top = (width - across) // 2, (height - down) // 2
        scaled = scaled.crop((left, top, left + across, top + down))
    return np.asarray(scaled, dtype=np.uint8)


def thumbnail(data: bytes, side: int, limits: ImageLimits) -> bytes:
    """Return the image as a WEBP of at most `side` pixels, re-encoded and without metadata. Raises ImageRefused."""
    with _open(data, limits) as image:
        image.draft(None, (2 * side, 2 * side))
        upright = _to_rgb(_upright(image))
        upright.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return encode(upright, "WEBP")


def encode(image: Image.Image, format: str) -> bytes:
    """Return `image` as a file of `format` without metadata."""
    buffer = io.BytesIO()
    bare = image.copy()
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    bare.save(buffer, format)
    return buffer.getvalue()


@contextmanager
def _open(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """Open `data` under the limits; whatever a decoder raises inside the block becomes ImageRefused."""
    if len(data) > limits.size_bytes:
        raise ImageRefused(
            f"Expected a file of at most {limits.size_bytes / MIB:g} MiB. Received {len(data) / MIB:.1f} MiB."
        )
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            width, height = image.size
            if width * height > limits.pixels or max(width, height) > limits.side:
                raise ImageRefused(
                    f"Expected at most {limits.pixels / 1e6:g} megapixels and {limits.side:,} pixels a side. "
                    f"Received {width:,} × {height:,}."
                )
            if image.format in ("JPEG", "MPO") and _has_more_scans(data, limits.scans):
                raise ImageRefused(f"Expected a JPEG of at most {limits.scans} scans. Received more.")
            yield image
    except UnidentifiedImageError as error:
        raise ImageRefused(f"Expected an image ({', '.join(limits.formats)}). Received something else.") from error
    except ImageRefused:
        raise
    except Exception as error:  # decoders raise whatever they stumble over: TypeError, AssertionError, MemoryError
        raise ImageRefused(f"The image is damaged: {str(error) or type(error).__name__}.") from error


_SCAN = b"\xff\xda"
_END = b"\xd9"
# Not those without content: restarts, stuffed zeros and what the decoder skips.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xd9-\xfe])")


def _has_more_scans(data: bytes, most: int) -> bool:
    """Return whether a JPEG has more scans than `most`, as its decoder counts: none in thumbnails or after its end."""
    if data.count(_SCAN) <= most:
        return False
    scans, at = 0, 2
    while scans <= most and (segment := _SEGMENT.search(data, at)) is not None and segment[1] != _END:
        scans += segment[1] == _SCAN[1:]
        at = segment.end() + max(2, int.from_bytes(data[segment.end() : segment.end() + 2]))
    return scans > most


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return int(orientation) if orientation in _TURNS else 1


def _is_lying(image: Image.Image) -> bool:
    """Return whether EXIF asks for a quarter turn."""
    return _orientation(image) >= 5


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as EXIF asks. `ImageOps.exif_transpose` would write the other tags anew, and fail on odd ones."""
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _is_lying(image) else (width, height)


def _fitted(upright: tuple[int, int], target: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Return the width and height to scale to, before cropping or padding to those of the target."""
    width, height = upright
    if resize is Resize.SQUASH:
        return target
    scale = (max if resize is Resize.CROP else min)(target[0] / width, target[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _middle(image: Image.Image, scaled: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of the image that lies in the middle pixels, as many as the target has, once it is scaled."""
    (width, height), (left, top) = scaled, ((side - size) // 2 for side, size in zip(scaled, target, strict=True))
    return (
        left * image.width / width,
        top * image.height / height,
        (left + target[0]) * image.width / width,
        (top + target[1]) * image.height / height,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips everything above 255 to white
        grey = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray((grey // 257 + (grey % 257 > 128)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
