"""Reads the chunks of PNG files, and leaves out or changes some before Pillow reads the file. Decodes no pixels."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Optional chunks that change what is shown: transparency and animation.
_NEEDED = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
_ORIENTED = b"eXIf"
# Kinds of text chunks, and the keywords of texts that may hold the orientation.
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Pillow refuses an image with a longer text.
_LONGEST_TEXT = 2**20
# Chunks of a file of 20 MiB, if each of them has at least 200 bytes. Encoders write thousands.
_MOST_CHUNKS = 100_000


def size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height that a PNG claims, or None if it is no PNG."""
    if not data.startswith(SIGNATURE) or len(data) < 24:
        return None
    width, height = struct.unpack(">2I", data[16:24])
    return width, height


def has_too_many_chunks(data: bytes) -> bool:
    """Return whether a PNG has so many chunks that Pillow, which reads each in Python, would take seconds."""
    if not data.startswith(SIGNATURE):
        return False
    position = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        if position + 12 > len(data):
            return False
        position += 12 + int.from_bytes(data[position : position + 4])
    return True


def with_bytes_as_colours(data: bytes) -> bytes:
    """Return a PNG of 16-bit grey values with transparency as one of 8-bit colours with transparency.

    Both have four bytes per pixel: the two bytes of the grey value become red and green, those of the transparency blue
    and alpha.
    """
    start = data.index(b"IHDR")
    head = data[start : start + 12] + b"\x08\x06" + data[start + 14 : start + 17]
    return data[:start] + head + struct.pack(">I", zlib.crc32(head)) + data[start + 21 :]


def reduced(data: bytes) -> bytes:
    """Return a PNG without the optional chunks on which neither its pixels nor its orientation depend.

    Such texts and profiles may be of any size, and broken. Chunks with the orientation are moved before the pixels,
    where Pillow reads them without decoding. If a chunk is not complete, everything from there on is kept.
    """
    view = memoryview(data)
    kept: list[memoryview] = []
    oriented: list[memoryview] = []
    head = start = position = len(SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(view[position : position + 4])
        if end > len(data):
            break
        kind = data[position + 4 : position + 8]
        if kind == b"IHDR":
            head = end
        if kind[:1].islower() and kind not in _NEEDED:
            kept.append(view[start:position])
            start = end
            if _tells_orientation(kind, view[position:end]):
                oriented.append(view[position:end])
        position = end
        if kind == b"IEND":
            break
    if not kept or head > len(SIGNATURE) + 25:  # nothing to leave out, or no PNG
        return data
    first = kept[0][: head - len(SIGNATURE)]
    rest = [kept[0][head - len(SIGNATURE) :], *kept[1:], view[start:]]
    return b"".join([SIGNATURE, first, *oriented, *rest])


def _tells_orientation(kind: bytes, chunk: memoryview) -> bool:
    if kind != _ORIENTED and kind not in _TEXTS:
        return False
    body = bytes(chunk[8:-4])
    if kind != _ORIENTED and not body.startswith(_ORIENTED_TEXTS):
        return False
    return zlib.crc32(kind + body) == int.from_bytes(chunk[-4:]) and not _is_too_long(kind, body)


def _is_too_long(kind: bytes, body: bytes) -> bool:
    """Return whether the text of a chunk is longer than Pillow accepts, or cannot be decompressed."""
    if len(body) > _LONGEST_TEXT:
        return True
    _, _, text = body.partition(b"\0")
    if kind == b"iTXt" and text[:1] == b"\1":  # compressed: a flag, the method, a language, the keyword in it
        packed = text[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        packed = text[1:]
    else:
        return False
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _LONGEST_TEXT)
    except zlib.error:
        return True
    return bool(unpacker.unconsumed_tail)
