"""Decodes and resizes images, the same way for training and prediction. Knows no archives.

Image rule 1 is part of every cache key and bundle. A JPEG is decoded at the smallest DCT scale that is at least twice
the target size; EXIF orientation is applied once; 16-bit grey values are scaled, not clipped; transparent pixels are
blended with white; then RGB is resized bilinearly with antialiasing. Any change to this needs a new rule number.
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

# Pillow's own limit is global and warns before it raises. `_open` checks ours, which an operator may raise, before any
# pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class ImageLimits:
    """Upper limits for one image, in data sets and in predictions. `side` is in pixels.

    `scans` counts the passes of a JPEG over the whole image: each takes 25 ms at 40 megapixels but only a few hundred
    bytes of the file. A progressive JPEG has about ten.
    """

    size_bytes: int = 20 * MIB
    pixels: int = 40_000_000
    side: int = 16_384
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    scans: int = 100


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels after EXIF rotation, and the name of the format."""

    width: int
    height: int
    format: str


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Decode the whole image once and return its facts. Raises ImageRefused if it cannot be used."""
    with _open(data, limits) as image:
        # Pillow reports a JPEG with further pictures in the file, as phones write them, as MPO.
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
        ImageRefused: the bytes are not a valid image within the limits.
    """
    with _open(data, limits) as image:
        down, across = sides(size)
        width, height = _fitted(_upright_size(image), (across, down), resize)
        image.draft(None, (2 * height, 2 * width) if _is_lying(image) else (2 * width, 2 * height))
        upright = _to_rgb(_upright(image))
        if resize is Resize.CROP:  # crop first: a whole 16,384 × 1 image at this height would take gigabytes
            box = _middle(upright, (width, height), (across, down))
            scaled = upright.resize((across, down), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        else:
            scaled = upright.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if scaled.size != (across, down):
        left, top = (width - across) // 2, (height - down) // 2
        scaled = scaled.crop((left, top, left + across, top + down))
    return np.asarray(scaled, dtype=np.uint8)


def thumbnail(data: bytes, side: int, limits: ImageLimits) -> bytes:
    """Return the image as a WEBP without metadata, at most `side` pixels wide and high. Raises ImageRefused."""
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
    """Open `data` and check the limits; any error of a decoder inside the block becomes ImageRefused."""
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
    except Exception as error:  # decoders raise anything: TypeError, AssertionError, MemoryError
        raise ImageRefused(f"The image is damaged: {str(error) or type(error).__name__}.") from error


_SCAN = b"\xff\xda"
_END = b"\xd9"
# Segments with content: not restarts, stuffed zeros or bytes that the decoder skips.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xd9-\xfe])")


def _has_more_scans(data: bytes, most: int) -> bool:
    """Return whether a JPEG has more than `most` scans as the decoder counts: not in thumbnails or after the end."""
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
    """Return whether EXIF rotates the image by 90 degrees, which swaps width and height."""
    return _orientation(image) >= 5


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. `ImageOps.exif_transpose` would rewrite the other tags and fail on invalid ones."""
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _is_lying(image) else (width, height)


def _fitted(upright: tuple[int, int], target: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Return the width and height to scale to, before cropping or padding to the target."""
    width, height = upright
    if resize is Resize.SQUASH:
        return target
    scale = (max if resize is Resize.CROP else min)(target[0] / width, target[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _middle(image: Image.Image, scaled: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the box of the image that becomes the central `target` pixels when it is resized to `scaled`."""
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
