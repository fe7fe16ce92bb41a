"""Decodes and resizes images in the same way for training and prediction. Knows no archives.

How images are decoded is called the image rule. Its number is part of every cache key and every bundle. Rule 1 is:
A JPEG is decoded at the smallest DCT scale that is at least twice the target size. The EXIF orientation is applied.
16-bit grey values are scaled, not clipped. Transparent pixels are blended with white. The RGB image is then resized
bilinearly with antialiasing. Any change to these steps needs a new rule number.
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

# Pillow's own limit is global, and Pillow warns before it raises. It is switched off, because `_open` checks the limits
# in `ImageLimits` before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class ImageLimits:
    """Upper limits for one image of a data set or a prediction.

    Attributes:
        size_bytes: size of the file.
        pixels: width × height.
        side: width or height in pixels, whichever is larger.
        formats: names of the accepted formats, as Pillow writes them.
        scans: number of passes of a JPEG over the whole image. Each pass takes 25 ms at 40 megapixels, but only a few
            hundred bytes of the file. A normal progressive JPEG has about ten.
    """

    size_bytes: int = 20 * MIB
    pixels: int = 40_000_000
    side: int = 16_384
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    scans: int = 100


@dataclass(frozen=True)
class ImageFacts:
    """Width and height of an image in pixels after EXIF rotation, and the name of its format."""

    width: int
    height: int
    format: str


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Decode a whole image, and return its size and format. Raises ImageRefused if the image cannot be used."""
    with _open(data, limits) as image:
        # A JPEG file may contain further pictures, as phones write them. Pillow calls this format MPO.
        facts = ImageFacts(*_upright_size(image), "JPEG" if image.format == "MPO" else image.format or "")
        _to_rgb(_upright(image))
        return facts


def decode(data: bytes, size: Sides, resize: Resize, limits: ImageLimits) -> Pixels:
    """Decode and resize an image by image rule 1.

    Args:
        data: the file's bytes.
        size: side of the result in pixels, or its height and width.
        resize: `squash` changes the aspect ratio, `crop` keeps only the centre, `pad` adds black borders.
        limits: upper limits for the image.

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
        if resize is Resize.CROP:  # crop while resizing: a whole 16,384 × 1 image of this height would take gigabytes
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
    """Return an image as the bytes of a file in this format, without metadata."""
    buffer = io.BytesIO()
    bare = image.copy()
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    bare.save(buffer, format)
    return buffer.getvalue()


@contextmanager
def _open(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """Open an image and check its limits. Any error of a decoder in the block becomes ImageRefused."""
    if len(data) > limits.size_bytes:
        raise ImageRefused(f"The file has {len(data) / MIB:.1f} MiB; the limit is {limits.size_bytes / MIB:g} MiB.")
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            width, height = image.size
            if width * height > limits.pixels or max(width, height) > limits.side:
                raise ImageRefused(
                    f"The image has {width:,} × {height:,} pixels; the limit is {limits.pixels / 1e6:g} megapixels and "
                    f"{limits.side:,} pixels per side."
                )
            if image.format in ("JPEG", "MPO") and _has_more_scans(data, limits.scans):
                raise ImageRefused(f"The JPEG has more scans than the limit of {limits.scans}.")
            yield image
    except UnidentifiedImageError as error:
        raise ImageRefused(f"Expected an image ({', '.join(limits.formats)}). Received something else.") from error
    except ImageRefused:
        raise
    except Exception as error:  # decoders raise any type of error, such as TypeError, AssertionError or MemoryError
        raise ImageRefused(f"The image is damaged: {str(error) or type(error).__name__}.") from error


_SCAN = b"\xff\xda"
_END = b"\xd9"
# Markers of segments with content. Restart markers, stuffed zeros and bytes that the decoder skips do not match.
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xd9-\xfe])")


def _has_more_scans(data: bytes, most: int) -> bool:
    """Return whether a JPEG has more than `most` scans.

    As in the decoder, scans of embedded thumbnails or after the end of the image do not count.
    """
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
    """Return whether EXIF rotates the image by 90 degrees to either side, which swaps width and height."""
    return _orientation(image) >= 5


def _upright(image: Image.Image) -> Image.Image:
    """Return an image rotated as its EXIF orientation says.

    `ImageOps.exif_transpose` would also rewrite all other tags, and fail if one of them is invalid.
    """
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _is_lying(image) else (width, height)


def _fitted(upright: tuple[int, int], target: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Return the width and height to which an image is scaled before it is cropped or padded to the target size."""
    width, height = upright
    if resize is Resize.SQUASH:
        return target
    scale = (max if resize is Resize.CROP else min)(target[0] / width, target[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _middle(image: Image.Image, scaled: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of an image that becomes the central `target` pixels if the image is resized to `scaled`.

    The part is (left, top, right, bottom) in pixels of the image.
    """
    (width, height), (left, top) = scaled, ((side - size) // 2 for side, size in zip(scaled, target, strict=True))
    return (
        left * image.width / width,
        top * image.height / height,
        (left + target[0]) * image.width / width,
        (top + target[1]) * image.height / height,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would make all values above 255 white
        grey = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray((grey // 257 + (grey % 257 > 128)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
