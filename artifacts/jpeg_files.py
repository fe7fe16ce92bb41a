"""Reads the segments of JPEG files, for facts that Pillow tells only while it decodes, or never. Decodes only ends."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

_START, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# The start of a segment with content. Restart markers, zeros after 0xFF, and bytes that decoders skip are none.
# An `\xff+` would take quadratic time for a long run of \xff.
_SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
# Segments that Pillow skips as a whole. It reads all other bytes before the first scan one by one, in Python.
_SKIPPED = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xda-\xef\xfe])")
_STRAY_BYTES = 64 * 1024
_HEAD_SEGMENTS = 10_000
# Of the segments 0xC0 to 0xCF, all but these are frame headers, which say how the image is coded.
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)

# Arbitrary bytes to put where the end of a file is missing: pixels that change with them depend on what is missing.
_FILLER = bytes(byte % 255 for byte in random.Random(0).randbytes(4096))  # noqa: S311
# The rows that the last blocks cover: 8, and up to four times as many for colours of lower resolution.
_LAST_ROWS = 32


@dataclass(frozen=True)
class _Frame:
    """The frame header of a JPEG.

    Attributes:
        kind: marker of the segment, which says how the image is coded.
        components: number of colour components: 1 for grey, 3 for colours.
        position: index of the first byte after the segment.
    """

    kind: int
    width: int
    height: int
    components: int
    position: int


def _segments(data: bytes, position: int) -> Iterator[tuple[int, int]]:
    """Yield the marker and the position of the length of each segment from `position` to the end of the image.

    The segments are found as a decoder finds them.
    """
    while (segment := _SEGMENT.search(data, position)) is not None:
        kind, start = segment[1][0], segment.end()
        yield kind, start
        if kind == _END[1]:
            return
        position = start + max(2, int.from_bytes(data[start : start + 2]))


def _frame(data: bytes) -> _Frame | None:
    if not data.startswith(_START):
        return None
    for kind, start in _segments(data, len(_START)):
        if 0xC0 <= kind <= 0xCF and kind not in _NO_FRAMES:
            head = data[start : start + 8]
            if len(head) < 8:
                return None
            end = start + int.from_bytes(head[:2])
            return _Frame(kind, int.from_bytes(head[5:7]), int.from_bytes(head[3:5]), head[7], end)
        if kind == _SCAN[1]:
            return None
    return None


def size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height that a JPEG claims, or None if it is no JPEG."""
    frame = _frame(data)
    return (frame.width, frame.height) if frame else None


def is_lossless(data: bytes) -> bool:
    """Return whether a JPEG is lossless, as some scanners write it. It cannot be decoded at a smaller scale."""
    frame = _frame(data)
    return frame is not None and frame.kind in _LOSSLESS


def is_kept_whole(data: bytes) -> bool:
    """Return whether a decoder must keep the coefficients of the whole image, because each scan holds only some."""
    frame = _frame(data)
    if frame is None or frame.kind in _PROGRESSIVE:
        return frame is not None
    scan = next((start for kind, start in _segments(data, frame.position) if kind == _SCAN[1]), None)
    return scan is not None and data[scan + 2 : scan + 3] < bytes([frame.components])


def has_long_head(data: bytes) -> bool:
    """Return whether so much stands before the first scan of a JPEG that Pillow would take seconds to find the scan.

    That is many bytes between its segments, or many segments.
    """
    if not data.startswith(_START):
        return False
    position, stray = len(_START), 0
    for _ in range(_HEAD_SEGMENTS):
        segment = _SKIPPED.search(data, position)
        stray += (len(data) if segment is None else segment.start()) - position
        if stray > _STRAY_BYTES:
            return True
        if segment is None or segment[1] == _SCAN[1:]:
            return False
        position = segment.end() + max(2, int.from_bytes(data[segment.end() : segment.end() + 2]))
    return True


def has_more_scans(data: bytes, most: int) -> bool:
    """Return whether a JPEG has more than `most` scans. Those in thumbnails and after the end do not count."""
    if data.count(_SCAN) <= most:
        return False
    scans = 0
    for kind, _ in _segments(data, len(_START)):
        scans += kind == _SCAN[1]
        if scans > most:
            return True
    return False


def lacks_scans(data: bytes) -> bool:
    """Return whether a JPEG was cut off between its scans, so that it is coarse or lacks colours.

    A scan holds some of the 64 coefficients of each block, for some of the colours. A progressive JPEG sends the lower
    bits of a coefficient in later scans.
    """
    frame = _frame(data)
    if frame is None:
        return False
    complete: dict[int, int] = {}  # bits of the coefficients that were sent to their lowest bit, by colour
    for kind, start in _segments(data, frame.position):
        if kind != _SCAN[1] or start + 2 >= len(data):
            continue
        colours = data[start + 2]
        first, last, bits_left = (*data[start + 3 + 2 * colours :][:3], 0, 0, 0)[:3]
        sent = 0
        if frame.kind in _LOSSLESS:
            sent = _ALL_COEFFICIENTS
        elif bits_left & 15 == 0:
            sent = _ALL_COEFFICIENTS >> first << first & ~(_ALL_COEFFICIENTS << (last + 1))
        for colour in data[start + 3 : start + 3 + 2 * colours : 2]:
            complete[colour] = complete.get(colour, 0) | sent
    return list(complete.values()) != [_ALL_COEFFICIENTS] * frame.components


_ALL_COEFFICIENTS = 2**64 - 1


def lacks_end(data: bytes) -> bool:
    """Return whether the marker of the end is missing after the last scan of a JPEG."""
    return data.startswith(_START) and data.find(_SCAN, max(0, data.rfind(_END))) >= 0


def with_end(data: bytes) -> bytes:
    """Return a JPEG that lacks its end with an end marker, if none of its pixels depends on the missing bytes.

    Decodes the image twice. A JPEG of which scans or pixels are missing is returned as it is.
    """
    if lacks_scans(data):
        return data
    bare = data.rstrip(b"\xff")
    last_rows = _last_rows(bare + _END)
    return bare + _END if last_rows is not None and last_rows == _last_rows(bare + _FILLER + _END) else data


def _last_rows(data: bytes) -> bytes | None:
    """Return the pixels of the last rows of a JPEG, or None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.crop((0, max(0, image.height - _LAST_ROWS), image.width, image.height)).tobytes()
    except Exception:  # decoders raise anything
        return None
