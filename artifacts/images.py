"""Decodes and resizes images in the same way for training and prediction. Knows no archives.

How images are decoded is called the image rule. Its number is part of every cache key and every bundle. Rule 1 is:
A JPEG is decoded at the smallest DCT scale that is at least twice the target size. The orientation is applied once.
16-bit values are scaled to 8 bits from the bit depth of the data set (see `artifacts.bit_depths`), which is part of the
keys and bundles, too. Transparent pixels are blended with white. The RGB image is then resized bilinearly with
antialiasing. Any change to these steps needs a new rule number.

All functions decode images with `_decoded`, so that an image which one of them accepts can be read by the others.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from artifacts import avif_files, bit_depths, jpeg_files, png_files
from artifacts.bit_depths import FULL_DEPTH
from artifacts.decode_memory import Reserve, reserve_nothing
from artifacts.foreign_formats import advice
from errors import EspalierError, ImageRefused
from recipes.layers import Sides, sides
from recipes.recipe import Resize

IMAGE_RULE = 1

MIB = 1024 * 1024
Pixels = npt.NDArray[np.uint8]


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
        memory_bytes: the most memory that all images which a process decodes at the same time may take together.
    """

    size_bytes: int = 20 * MIB
    pixels: int = 40_000_000
    side: int = 16_384
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
    scans: int = 100
    memory_bytes: int = 1024 * MIB


# Pillow checks sizes before it allocates memory, also where `_open` cannot, such as those of frames in a GIF. Its limit
# is one for the process: `_open` raises it if the operator allows more. Up to twice the limit, Pillow only warns. Here,
# the warning is an error, too.
Image.MAX_IMAGE_PIXELS = ImageLimits.pixels
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Several images are decoded at the same time already. More threads for one image would only take more memory.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# Memory in bytes per pixel that a decoder takes besides the decoded image, as `benchmarks.decode_memory` measured: for
# canvases of a WEBP, planes and rows of an AVIF, the strip of a TIFF that has only one, the area that a GIF restores.
_DECODER_BYTES = {"WEBP": 14, "AVIF": 18, "TIFF": 8, "GIF": 2, "BMP": 2}
# The most bytes per pixel of any format, the decoded image and its RGB copy included.
MOST_BYTES_PER_PIXEL = 26
# Bytes per pixel of decoded images, by mode; 4 for all other modes.
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# Memory that a decoder takes for any image, however small.
_LEAST_BYTES = 4 * MIB
# Transparent and 16-bit pixels become RGB in strips of this size, which need no second copy of the whole image.
_STRIP_PIXELS = 100_000


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image after it was decoded.

    Attributes:
        width: width in pixels, after the rotation that the file asks for.
        height: height in pixels, after this rotation.
        format: name of the format.
        bit_depth: the smallest of 10, 12, 14 and 16 bits that holds all values of a 16-bit image; None for others.
        has_more: whether further pictures follow the first, such as pages of a TIFF or frames of an animation.
    """

    width: int
    height: int
    format: str
    bit_depth: int | None = None
    has_more: bool = False


def inspect(data: bytes, limits: ImageLimits) -> ImageFacts:
    """Decode a whole image, and return what is known of it. Raises ImageRefused if the image cannot be used."""
    with _decoded(data, limits, reserve_nothing, lambda upright: (1, 1), None) as (facts, _):
        return replace(facts, has_more=_has_more(data, limits))


def decode(
    data: bytes,
    size: Sides,
    resize: Resize,
    limits: ImageLimits,
    reserve: Reserve = reserve_nothing,
    bit_depth: int = FULL_DEPTH,
) -> Pixels:
    """Decode and resize an image by image rule 1.

    Args:
        data: the file's bytes.
        size: side of the result in pixels, or its height and width.
        resize: `squash` changes the aspect ratio, `crop` keeps only the centre, `pad` adds black borders.
        limits: upper limits for the image.
        reserve: waits for the memory that decoding takes.
        bit_depth: number of bits that 16-bit images use; larger values become white.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageRefused: the bytes are not a valid image within the limits.
    """
    down, across = sides(size)

    def scaled_size(upright: tuple[int, int]) -> tuple[int, int]:
        return _fitted(upright, (across, down), resize)

    with _decoded(data, limits, reserve, scaled_size, bit_depth) as (facts, upright):
        width, height = scaled_size((facts.width, facts.height))
        if resize is Resize.CROP:  # crop while resizing: a whole 16,384 × 1 image of this height would take gigabytes
            box = _middle(upright, (width, height), (across, down))
            scaled = upright.resize((across, down), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        else:
            scaled = upright.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if scaled.size != (across, down):
        left, top = (width - across) // 2, (height - down) // 2
        scaled = scaled.crop((left, top, left + across, top + down))
    return np.asarray(scaled, dtype=np.uint8)


def thumbnail(data: bytes, side: int, limits: ImageLimits, reserve: Reserve = reserve_nothing) -> bytes:
    """Return the image as a WEBP without metadata, at most `side` pixels wide and high. Raises ImageRefused.

    A 16-bit image is scaled from its own bit depth.
    """
    with _decoded(data, limits, reserve, lambda upright: (side, side), None) as (_, upright):
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
def _decoded(
    data: bytes,
    limits: ImageLimits,
    reserve: Reserve,
    scaled_size: Callable[[tuple[int, int]], tuple[int, int]],
    bit_depth: int | None,
) -> Iterator[tuple[ImageFacts, Image.Image]]:
    """Yield the facts of an image, and the image itself: upright, RGB, decoded no larger than it needs to be.

    Args:
        data: the file's bytes.
        limits: what the image may be at most.
        reserve: waits for the memory that decoding takes; it is held inside the block.
        scaled_size: returns the width and height that an upright image of a width and height will be scaled to.
        bit_depth: number of bits that 16-bit images use; None for those that this image uses.
    """
    with _open(data, limits) as image:
        # Pillow reports a JPEG with further pictures in the file, as phones write them, as MPO.
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        orientation = _orientation(image)
        stored = image.size
        width, height = stored if orientation < 5 else (stored[1], stored[0])
        facts = ImageFacts(width, height, kind)
        target = scaled_size((width, height))
        least = (2 * target[0], 2 * target[1]) if orientation < 5 else (2 * target[1], 2 * target[0])
        lacks_end = kind == "JPEG" and jpeg_files.lacks_end(data)
        has_scales = kind == "JPEG" and not jpeg_files.is_lossless(data)
        has_cut_values = bit_depths.has_cut_values(image)
        if has_scales and not lacks_end:
            image.draft(None, least)
        with reserve(_most_bytes(image, stored, target, orientation, data)):
            if lacks_end:
                image = Image.open(io.BytesIO(jpeg_files.with_end(data)), formats=("JPEG",))
                if has_scales:
                    image.draft(None, least)
            image.load()
            if has_cut_values or bit_depths.has_grey_values(image):
                facts = replace(facts, bit_depth=_bit_depth(image))
                bit_depth = bit_depth or facts.bit_depth
            with _lower_bytes(data, limits, bit_depth if has_cut_values else FULL_DEPTH) as lower:
                upright = _to_rgb(image, lower, bit_depth or FULL_DEPTH)
            if upright is not image:
                image.close()
            if orientation != 1:
                upright = upright.transpose(_TURNS[orientation])
            if kind == "TIFF":  # Pillow has turned it while it was decoded
                facts = replace(facts, width=upright.width, height=upright.height)
            yield facts, upright


def _has_more(data: bytes, limits: ImageLimits) -> bool:
    """Return whether a file with a usable first picture has further ones of their own, which are not read.

    Those of a JPEG are views of the same moment, and smaller ones of a TIFF are copies of the first.
    """
    try:
        with _open_file(data, limits) as image:
            if image.format in ("JPEG", "MPO"):
                return False
            if not isinstance(image, TiffImagePlugin.TiffImageFile):
                return bool(getattr(image, "is_animated", False))
            size = image.size
            image.seek(1)
            return image.size == size and not int(image.tag_v2.get(ExifTags.Base.NewSubfileType) or 0) & 5
    except Exception:  # there are none, or they are damaged, which does not matter
        return False


@contextmanager
def _open(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """Open an image and check its limits. Any error of a decoder inside the block is raised as ImageRefused."""
    if len(data) > limits.size_bytes:
        raise ImageRefused(f"The file has {len(data) / MIB:.1f} MiB; the limit is {limits.size_bytes / MIB:g} MiB.")
    if jpeg_files.has_long_head(data):
        raise ImageRefused(
            "The JPEG has too much between its start and its pixels. Save it again with an image program."
        )
    if png_files.has_too_many_chunks(data):
        raise ImageRefused("The PNG has too many chunks. Save it again with an image program.")
    limit = f"the limit is {limits.pixels / 1e6:g} megapixels and {limits.side:,} pixels per side."
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.pixels)
    try:
        with _open_file(data, limits) as image:
            width, height = image.size
            if width * height > limits.pixels or max(width, height) > limits.side:
                raise ImageRefused(f"The image has {width:,} × {height:,} pixels; {limit}")
            _check_format(image, data, limits)
            yield image
    except UnidentifiedImageError as error:
        expected = f"Expected an image ({', '.join(limits.formats)})."
        raise ImageRefused(f"{expected} Received {advice(data)}") from error
    except EspalierError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = jpeg_files.size(data) or png_files.size(data)
        shown = f"{size[0]:,} × {size[1]:,}" if size else "too many"
        raise ImageRefused(f"The image has {shown} pixels; {limit}") from error
    except Exception as error:  # decoders raise any type of error, such as TypeError, AssertionError or MemoryError
        raise ImageRefused(f"The image is damaged: {str(error) or type(error).__name__}.") from error


def _open_file(data: bytes, limits: ImageLimits) -> Image.Image:
    """Return the first image of a file, not yet decoded. Parts without effect on the pixels may be broken."""
    if data.startswith(png_files.SIGNATURE):
        data = png_files.reduced(data)
    if "AVIF" not in limits.formats or not avif_files.is_avif(data):
        return Image.open(io.BytesIO(data), formats=limits.formats)
    coded = avif_files.coded(data)  # first: Pillow takes minutes or gigabytes to open some files that this refuses
    try:
        return Image.open(io.BytesIO(data), formats=limits.formats)
    except Exception:
        # Pillow reads the EXIF of an AVIF while it opens it, and raises various errors if it is broken. The first
        # `Exif` in the file is the type of the item that holds it. With another type, the item is not read.
        changed = data.replace(b"Exif", b"none", 1)
        if changed == data or avif_files.coded(changed) != coded:  # it was not this type that was changed
            raise
        return Image.open(io.BytesIO(changed), formats=limits.formats)


def _check_format(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Check for contents that a format allows but Espalier does not read. Raises ImageRefused."""
    if image.format in ("JPEG", "MPO") and jpeg_files.has_more_scans(data, limits.scans):
        raise ImageRefused(f"The JPEG has more scans than the limit of {limits.scans}.")
    if image.format == "AVIF":
        _check_frames(avif_files.coded(data), image.size, limits)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    if tags.get(_TIFF_DNG_VERSION) or int(tags.get(ExifTags.Base.NewSubfileType) or 0) & 1:
        raise ImageRefused(
            "Expected a photograph. Received a camera's raw file (such as DNG or NEF), whose first picture is only a "
            "preview. Export it as JPEG, PNG or TIFF."
        )
    if image.mode == "F":
        raise ImageRefused(
            "Expected a TIFF of integers. Received one of 32-bit floating-point values, whose black and white are not "
            "known. Scale the values and save them with 8 or 16 bits."
        )
    if int(tags.get(ExifTags.Base.TileWidth) or 0) * int(tags.get(ExifTags.Base.TileLength) or 0) > limits.pixels:
        raise ImageRefused(f"Expected a TIFF with tiles of at most {limits.pixels / 1e6:g} megapixels. Received more.")


_TIFF_DNG_VERSION = 0xC612


def _check_frames(coded: avif_files.Coded, size: tuple[int, int], limits: ImageLimits) -> None:
    """Check that an AVIF of this width and height holds no more than the size allows. Raises ImageRefused."""
    larger = coded.larger_than(size)
    if larger is not None:
        raise ImageRefused(
            f"The AVIF says that it has {size[0]:,} × {size[1]:,} pixels, but holds a picture of up to "
            f"{larger.width:,} × {larger.height:,}. Export it again."
        )
    if coded.pixels > _AVIF_FRAMES * limits.pixels:
        raise ImageRefused(
            f"The AVIF holds {coded.pixels / 1e6:,.1f} megapixels in all its pictures; the limit is "
            f"{_AVIF_FRAMES * limits.pixels / 1e6:g}. Export it as a single picture."
        )
    if coded.memory_bytes(size) > (MOST_BYTES_PER_PIXEL - 8) * max(limits.pixels, 1_000_000):
        raise ImageRefused(
            "Decoding the pictures in the AVIF would take too much memory. Export a single, smaller one."
        )


# Pictures of the largest allowed size that an AVIF may hold: the image, its transparency, and together smaller ones.
_AVIF_FRAMES = 3


def _most_bytes(
    image: Image.Image, stored: tuple[int, int], target: tuple[int, int], orientation: int, data: bytes
) -> int:
    """Return the bytes of memory that decoding an image and scaling it takes at most, without the file itself.

    Args:
        image: the image, not yet decoded, in the scale that it will be decoded in.
        stored: its width and height in the file.
        target: the width and height that it will be scaled to.
        orientation: the EXIF orientation that is left to be applied.
        data: the file's bytes.
    """
    pixels = image.width * image.height
    loaded = pixels * _BYTES.get(image.mode, 4)
    becomes_rgb = 0 if image.mode == "RGB" and not image.has_transparency_data else 4 * pixels
    if bit_depths.has_cut_values(image):
        becomes_rgb = 4 * pixels + 9 * pixels  # the lower bytes, decoded by themselves
    decoder = pixels * _DECODER_BYTES.get(image.format or "", 0) + 2 * len(data)
    if image.format == "AVIF":
        decoder = max(decoder, avif_files.coded(data).memory_bytes(image.size) + 2 * len(data))
    if image.format in ("JPEG", "MPO") and jpeg_files.is_kept_whole(data):
        decoder += 2 * stored[0] * stored[1] * len(image.getbands())  # coefficients of the whole image
    turned = 4 * pixels if orientation != 1 else 0
    across, down = target
    # Pillow scales first to a size between three and six times the target, then to its width, then to its height.
    scaling = 4 * (min(pixels // 4, 36 * across * down) + across * (image.height + down))
    return _LEAST_BYTES + max(decoder + loaded + becomes_rgb, 4 * pixels + max(turned, scaling))


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
    """Return the EXIF orientation that is left to be applied: 1 if there is none, or if it cannot be read."""
    if image.format == "TIFF":  # Pillow turns it
        return 1
    try:
        # That of a PNG would decode the image first, to read what follows the pixels; `png_files` has moved it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF says nothing about the pixels; what Pillow raises depends on where it is broken
        return 1
    return int(orientation) if orientation in _TURNS else 1


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


def _bit_depth(image: Image.Image) -> int:
    """Return the bit depth that holds all values of a decoded 16-bit image. Transparency is no value."""
    if bit_depths.has_grey_values(image):
        return bit_depths.smallest(max(int(np.asarray(strip).max()) for _, strip in _strips(image)))
    higher = max(int(np.asarray(strip)[..., :3].max()) for _, strip in _strips(image))
    return bit_depths.smallest(256 * higher + 255)


@contextmanager
def _lower_bytes(data: bytes, limits: ImageLimits, bit_depth: int | None) -> Iterator[Image.Image | None]:
    """Yield an image of the lower bytes of 16-bit values, decoded; None if the full 16 bits are in use.

    Pillow decodes 16-bit colours to the higher bytes. With 16 bits in use, these are the 8-bit values.
    """
    if bit_depth == FULL_DEPTH:
        yield None
        return
    with _open_file(data, limits) as image:
        if not bit_depths.is_grey_with_alpha(image):
            bit_depths.read_lower_bytes(image)
            image.load()
            yield image
            return
    with _open_file(png_files.with_bytes_as_colours(data), limits) as image:
        yield Image.merge("RGB", [image.getchannel("G")] * 3)


def _to_rgb(image: Image.Image, lower: Image.Image | None, bit_depth: int) -> Image.Image:
    """Return a decoded image in RGB, itself if it is so already.

    Args:
        image: the image.
        lower: the lower bytes of its 16-bit values, of which `image` has the higher ones; None if there are none.
        bit_depth: number of bits that 16-bit values use.
    """
    if image.mode == "RGB" and not image.has_transparency_data and lower is None:
        return image
    rgb = Image.new("RGB", image.size)
    for box, strip in _strips(image):
        rgb.paste(_strip_to_rgb(strip, lower and lower.crop(box), bit_depth), box[:2])
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Yield the parts of an image, with their edges: left, top, right, bottom."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _strip_to_rgb(strip: Image.Image, lower: Image.Image | None, bit_depth: int) -> Image.Image:
    if bit_depths.has_grey_values(strip):  # Pillow's own conversion would make all values above 255 white
        grey = np.asarray(strip).astype(np.int32)
        shades = bit_depths.to_8_bits(grey, bit_depth)
        if "transparency" in strip.info:
            shades[grey == strip.info["transparency"]] = 255
        return Image.fromarray(shades).convert("RGB")
    if lower is not None:
        strip = _merged(strip, lower, bit_depth)
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        return Image.alpha_composite(white, strip).convert("RGB")
    return strip.convert("RGB")


def _merged(higher: Image.Image, lower: Image.Image, bit_depth: int) -> Image.Image:
    """Return the 8-bit image of 16-bit colours, which are given as two images of their higher and lower bytes."""
    first, second = np.asarray(higher), np.asarray(lower)
    values = 256 * first[..., :3].astype(np.int32) + second[..., :3]
    shades = bit_depths.to_8_bits(values, bit_depth)
    if "transparency" in higher.info:  # one colour of 16 bits
        is_clear = (values == higher.info["transparency"]).all(axis=2, keepdims=True)
        return Image.fromarray(np.concatenate([shades, np.where(is_clear, 0, 255).astype(np.uint8)], axis=2))
    if higher.mode == "RGBA":
        shades = np.concatenate([shades, first[..., 3:]], axis=2)
    return Image.fromarray(shades)
