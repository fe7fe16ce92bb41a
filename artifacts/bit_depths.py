"""Finds how many bits of 16-bit images are in use, and scales their values to 8 bits. Opens no files.

The cameras of microscopes measure 10, 12 or 14 bits, which are saved as 16-bit numbers. Divided by 257, as full 16-bit
values are, they would be nearly black. The bit depth of an image is the smallest of 10, 12, 14 and 16 bits that holds
its largest value. The images of one data set are scaled from one bit depth, so that equal values stay equal.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from PIL import Image

BIT_DEPTHS = (10, 12, 14, 16)
FULL_DEPTH = 16

# Pillow decodes 16-bit colours to 8 bits, by leaving out the lower byte of each value. These are the names of such file
# contents, with the byte order of the file at the end (N: the order of this machine). Read in the other order, an image
# has the lower bytes.
_COLOURS = ("RGB;16", "RGBX;16", "RGBA;16")
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
# Grey with transparency, which Pillow reads in one byte order only.
_GREY_WITH_ALPHA = "LA;16B"


def smallest(value: int) -> int:
    """Return the smallest bit depth that holds a value; 16 if none does."""
    return next((bits for bits in BIT_DEPTHS if value < 2**bits), FULL_DEPTH)


def has_grey_values(image: Image.Image) -> bool:
    """Return whether Pillow decodes an image to grey values of more than 8 bits."""
    return image.mode.startswith("I")


def has_cut_values(image: Image.Image) -> bool:
    """Return whether Pillow will decode an image, not yet decoded, to the higher bytes of its 16-bit values."""
    contents = {_content(tile.args) for tile in getattr(image, "tile", ())}
    return bool(contents) and all(
        content == _GREY_WITH_ALPHA or (content[:-1] in _COLOURS and content[-1] in _OTHER_ORDER)
        for content in contents
    )


def is_grey_with_alpha(image: Image.Image) -> bool:
    """Return whether an image, not yet decoded, has 16-bit grey values with transparency."""
    return any(_content(tile.args) == _GREY_WITH_ALPHA for tile in getattr(image, "tile", ()))


def read_lower_bytes(image: Image.Image) -> None:
    """Change an image with 16-bit colours, not yet decoded, so that Pillow decodes it to the lower bytes."""
    swapped = []
    for tile in image.tile:  # type: ignore[attr-defined]  # every opened image has it
        content = _content(tile.args)
        other = content[:-1] + _OTHER_ORDER[content[-1]]
        swapped.append(tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])))
    image.tile = swapped  # type: ignore[attr-defined]


def _content(args: object) -> str:
    """Return the name of the content of a part of a file, from the arguments of its decoder."""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def to_8_bits(values: npt.NDArray[np.int32], bit_depth: int) -> npt.NDArray[np.uint8]:
    """Scale values from 0 to 2^bit_depth - 1 to values from 0 to 255, rounded. Larger values become 255."""
    most = 2**bit_depth - 1
    shades: npt.NDArray[np.uint8] = ((np.clip(values, 0, most) * 510 + most) // (2 * most)).astype(np.uint8)
    return shades
