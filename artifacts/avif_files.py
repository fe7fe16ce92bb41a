"""Reads the boxes of AVIF files, for the sizes of the frames that a decoder will really make of them. Decodes nothing.

Pillow reports the size that the boxes of a file state, but a decoder takes memory for the sizes in the AV1 streams,
which may be any. The boxes are those of ISO/IEC 14496-12 and 23008-12.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from artifacts import av1_streams
from artifacts.av1_streams import DamagedStreamError, Fields, Frame
from errors import ImageRefused

# What a file may consist of: boxes, items, references, samples and units of streams. A photograph has less than 1,000,
# a grid of 1,000 tiles with transparency 90,000. Items weigh more: decoders search all of them at each mention of one.
_MOST_PARTS, _ITEM_PARTS = 100_000, 10
# Bytes by which all items together may exceed twice the file, because they share bytes. Decoders copy some of them.
_MOST_SHARED_BYTES = 2**20
# A tile in the only column or row of a grid may be larger than the image, but not larger than this.
_TILE_SIDE = 1024
# Bytes per pixel of the colours that are made of planes, in the decoder and in Pillow, and of a plane of transparency.
_COLOUR_BYTES, _ALPHA_BYTES = 8, 2


@dataclass(frozen=True)
class Coded:
    """The AV1 frames that all items and the first samples of an AVIF hold, and whether some may be tiles of a grid."""

    frames: tuple[Frame, ...]
    has_grid: bool

    @property
    def pixels(self) -> int:
        """Pixels of all frames together."""
        return sum(frame.width * frame.height for frame in self.frames)

    def larger_than(self, size: tuple[int, int]) -> Frame | None:
        """Return a frame that is larger than an image of this width and height can have, if there is any.

        A frame is at most as wide and as high as the image. Only tiles may be larger: they may overhang.
        """
        width, height = (max(side, _TILE_SIDE) for side in size) if self.has_grid else size
        return next((frame for frame in self.frames if frame.width > width or frame.height > height), None)

    def memory_bytes(self, size: tuple[int, int]) -> int:
        """Return the most bytes that decoding to an image of this width and height takes, without the RGB image."""
        pixels = size[0] * size[1]
        memory_bytes = sum(frame.memory_bytes for frame in self.frames) + _COLOUR_BYTES * pixels
        if any((frame.width, frame.height) != size for frame in self.frames):  # planes scaled or put together
            memory_bytes += math.ceil((max(frame.pixel_bytes for frame in self.frames) + _ALPHA_BYTES) * pixels)
        return memory_bytes


def is_avif(data: bytes) -> bool:
    """Return whether a file may be an AVIF: whether it starts with a box `ftyp` that names one of the AVIF brands."""
    end = int.from_bytes(data[:4])
    brands = data[8 : end if end > 8 else len(data)]
    return data[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


def coded(data: bytes) -> Coded:
    """Return the frames that an AVIF holds. Raises ImageRefused if it is damaged, or has too many parts."""
    try:
        return _File(data).coded()
    except DamagedStreamError as error:
        raise ImageRefused("The image is damaged: the structure of the AVIF cannot be read.") from error


class _File:
    """Follows the boxes of one file, collects the frames, and counts the parts."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._parts = 0
        self._item_bytes = 0
        self._has_grid = False
        self._frames: list[Frame] = []

    def coded(self) -> Coded:
        boxes = self._unique(self._data, (b"ftyp", b"meta", b"moov"), is_file=True)
        if b"meta" in boxes:
            self._read_items(boxes[b"meta"])
        for kind, track in self._boxes(boxes.get(b"moov", memoryview(b""))):
            if kind == b"trak":
                self._read_track(track)
        return Coded(tuple(self._frames), self._has_grid)

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > _MOST_PARTS:
            raise ImageRefused("The AVIF has too many parts. Export it again as a single image.")

    def _boxes(self, view: memoryview, is_file: bool = False) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the type and the content of each box. A file may end with bytes that are none."""
        while view:
            self._count(1)
            size, kind, head = int.from_bytes(view[:4]), bytes(view[4:8]), 8
            if size == 1:
                size, head = int.from_bytes(view[8:16]), 16
            elif size == 0 and is_file:
                size = len(view)
            if not head <= size <= len(view):
                if is_file:
                    return
                raise DamagedStreamError
            yield kind, view[head:size]
            view = view[size:]

    def _unique(self, view: memoryview, kinds: tuple[bytes, ...], is_file: bool = False) -> dict[bytes, memoryview]:
        """Return the content of the boxes of these types. None of them may occur twice."""
        found: dict[bytes, memoryview] = {}
        for kind, body in self._boxes(view, is_file):
            if kind in found:
                raise DamagedStreamError
            if kind in kinds:
                found[kind] = body
        return found

    def _read_stream(self, stream: memoryview) -> None:
        for frame in av1_streams.frames(stream):
            self._count(1)
            if frame is not None:
                self._frames.append(frame)

    def _read_items(self, meta: memoryview) -> None:
        kinds = (b"iinf", b"iloc", b"idat", b"iref", b"iprp", b"grpl")
        boxes = self._unique(meta[4:], kinds)
        none = memoryview(b"")
        self._count(len(boxes.get(b"grpl", none)) // 8)
        self._count_references(boxes.get(b"iref", none))
        self._count_properties(boxes.get(b"iprp", none))
        coded_items = self._coded_items(boxes.get(b"iinf", none))
        for item, is_in_idat, extents in self._locations(boxes.get(b"iloc", none)):
            if item in coded_items:
                source = boxes.get(b"idat", none) if is_in_idat else self._data
                parts = [Fields(source[start:]).take(size) for start, size in extents]
                self._read_stream(parts[0] if len(parts) == 1 else memoryview(b"".join(parts)))

    def _coded_items(self, box: memoryview) -> set[int]:
        """Return the numbers of the items that are AV1 streams."""
        if not box:
            return set()
        fields, items = Fields(box), set()
        version = fields.number(4) >> 24
        count = fields.number(4 if version else 2)
        for _, body in islice(self._boxes(fields.rest), count):
            self._count(_ITEM_PARTS)
            entry = Fields(body)
            item = entry.number(4 if entry.number(4) >> 24 == 3 else 2)
            entry.take(2)
            kind = bytes(entry.take(4))
            self._has_grid |= kind == b"grid"
            if kind == b"av01":
                items.add(item)
        return items

    def _locations(self, box: memoryview) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
        """Yield each item's number, whether it is inside the box `idat`, and where its pieces start and their sizes."""
        if not box:
            return
        fields = Fields(box)
        version = fields.number(4) >> 24
        packed = fields.number(2)
        offset_size, length_size, base_size, index_size = (packed >> shift & 15 for shift in (12, 8, 4, 0))
        id_size = 4 if version == 2 else 2
        for _ in range(fields.number(id_size)):
            self._count(_ITEM_PARTS)
            item = fields.number(id_size)
            method = fields.number(2) & 15 if version else 0
            if method > 1 or version > 2:
                raise DamagedStreamError
            fields.take(2)
            base, extents = fields.number(base_size), []
            for _ in range(fields.number(2)):
                self._count(1)
                fields.take(index_size if version else 0)
                extents.append((base + fields.number(offset_size), fields.number(length_size)))
                self._item_bytes += min(extents[-1][1], len(self._data))
            if self._item_bytes > 2 * len(self._data) + _MOST_SHARED_BYTES:
                raise ImageRefused("The AVIF uses the same bytes for too many items. Export it again.")
            yield item, method == 1, extents

    def _count_references(self, box: memoryview) -> None:
        id_size = 4 if bytes(box[:1]) == b"\1" else 2
        for _, body in self._boxes(box[4:]):
            fields = Fields(body)
            fields.take(id_size)
            self._count(_ITEM_PARTS * (1 + fields.number(2)))

    def _count_properties(self, box: memoryview) -> None:
        """Count the properties of items. Decoders copy those that they do not know to each item that has them."""
        sizes = [0]
        for kind, body in self._boxes(box):
            if kind == b"ipco":
                sizes += [0 if kind == b"colr" else len(content) for kind, content in self._boxes(body)]
            elif kind == b"ipma":
                fields = Fields(body)
                flags = fields.number(4)
                for _ in range(fields.number(4)):
                    self._count(_ITEM_PARTS)
                    fields.take(4 if flags >> 24 else 2)
                    for _ in range(fields.number(1)):
                        index = fields.number(2) & 0x7FFF if flags & 1 else fields.number(1) & 0x7F
                        if index >= len(sizes):
                            raise DamagedStreamError
                        self._count(1 + sizes[index] // 100)

    def _read_track(self, track: memoryview) -> None:
        """Read the first sample of a track of AV1 frames, which is all that is decoded."""
        boxes = self._unique(track, (b"mdia", b"meta"))
        if b"meta" in boxes:
            self._read_items(boxes[b"meta"])
        none = memoryview(b"")
        media = self._unique(boxes.get(b"mdia", none), (b"minf",))
        information = self._unique(media.get(b"minf", none), (b"stbl",))
        kinds = (b"stsd", b"stco", b"co64", b"stsc", b"stsz", b"stts", b"stss")
        tables = self._unique(information.get(b"stbl", none), kinds)
        self._count(sum(map(len, tables.values())) // 8)
        if all(kind != b"av01" for kind, _ in self._boxes(tables.get(b"stsd", none)[8:])):
            return
        if (b"stco" in tables) == (b"co64" in tables) or b"stsz" not in tables or b"stsc" not in tables:
            raise DamagedStreamError
        chunks, offset_size = (Fields(tables[b"stco"]), 4) if b"stco" in tables else (Fields(tables[b"co64"]), 8)
        chunks.take(4)
        chunk_count = chunks.number(4)
        self._count_samples(Fields(tables[b"stsc"]), chunk_count)
        if chunk_count:
            sizes = Fields(tables[b"stsz"])
            sizes.take(4)
            size, count = sizes.number(4), sizes.number(4)
            size = size or (sizes.number(4) if count else 0)
            self._read_stream(Fields(self._data[chunks.number(offset_size) :]).take(size))

    def _count_samples(self, fields: Fields, chunk_count: int) -> None:
        """Count the samples of a track. A few bytes can state billions."""
        fields.take(4)
        first, samples = 1, 0
        for _ in range(fields.number(4)):
            next_first = fields.number(4)
            if next_first < first:
                raise DamagedStreamError
            self._count(samples * (min(next_first, chunk_count + 1) - min(first, chunk_count + 1)))
            first, samples = next_first, fields.number(4)
            fields.take(4)
        self._count(samples * max(0, chunk_count + 1 - first))
