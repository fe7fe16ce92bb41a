"""The cache of features: one float32 row for each image, so that no image goes through the same backbone twice.

Rows are stored in append-only files of at most 64 MiB, the segments. Each segment has an index with the digest of the
image and a checksum for each row. Only one process writes to a segment, so workers never wait for each other. A row is
used only if its index entry is complete and its checksum is right. The cache may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from artifacts.bit_depths import FULL_DEPTH
from artifacts.store import Digest, disk_errors
from recipes.layers import Sides
from recipes.recipe import Precision, Resize

Features = npt.NDArray[np.float32]

SEGMENT_BYTES = 64 * 1024 * 1024
_ENTRY = struct.Struct("<32sI")


@dataclass(frozen=True)
class FeatureSpace:
    """Everything but the image that determines its features. Features of different spaces cannot be compared."""

    image_rule: int
    size: Sides
    resize: Resize
    backbone: Digest
    precision: Precision
    bit_depth: int = FULL_DEPTH

    @property
    def name(self) -> str:
        """The name of the folder for features of this space: a hash of the space's fields.

        The full bit depth is left out, so that features of earlier versions of Espalier are found.
        """
        *parts, bit_depth = (str(part) for part in astuple(self))
        named = parts if self.bit_depth == FULL_DEPTH else [*parts, bit_depth]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:32]


class FeatureCache:
    """The cached features of one feature space. The row of an image is float32 [width]."""

    def __init__(self, root: Path, space: FeatureSpace, width: int) -> None:
        self._folder = root / space.name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._width = width
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._segment: _Segment | None = None
        for index in sorted(self._folder.glob("*.index")):
            self._load(index)

    def missing(self, images: Sequence[Digest]) -> list[Digest]:
        """Return the images that have no row in the cache, each once, in the given order."""
        return [image for image in dict.fromkeys(images) if bytes.fromhex(image) not in self._places]

    def add(self, images: Sequence[Digest], rows: Features) -> None:
        """Add the features of images. Raises DiskFull.

        Args:
            images: digests of the images.
            rows: their features, float32 [len(images), width].
        """
        if rows.shape != (len(images), self._width):
            raise ValueError(f"Expected features [{len(images)}, {self._width}]. Received {rows.shape}. This is a bug.")
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        for start in range(0, len(images), self._rows_per_segment):
            chunk = slice(start, start + self._rows_per_segment)
            self._append(images[chunk], rows[chunk])

    def rows(self, images: Sequence[Digest]) -> Features:
        """Return the features of images, float32 [len(images), width]; row i belongs to image i.

        Raises KeyError if an image is not in the cache.
        """
        result = np.empty((len(images), self._width), dtype=np.float32)
        by_segment: dict[Path, tuple[list[int], list[int]]] = {}
        for position, image in enumerate(images):
            data, row = self._places[bytes.fromhex(image)]
            positions, rows = by_segment.setdefault(data, ([], []))
            positions.append(position)
            rows.append(row)
        for data, (positions, rows) in by_segment.items():
            whole = data.stat().st_size // (4 * self._width)  # an interrupted write may leave part of a row
            result[positions] = np.memmap(data, dtype=np.float32, mode="r", shape=(whole, self._width))[rows]
        return result

    @property
    def _rows_per_segment(self) -> int:
        return max(1, SEGMENT_BYTES // (4 * self._width))

    def _append(self, images: Sequence[Digest], rows: Features) -> None:
        if self._segment is None or self._segment.rows + len(images) > self._rows_per_segment:
            if self._segment is not None:
                self._segment.close()
            self._segment = _Segment(self._folder / secrets.token_hex(8))
        try:
            first = self._segment.append(images, rows)
        except BaseException:
            self.close()  # after a partly written row, all later rows of the segment would be at a wrong position
            raise
        for offset, image in enumerate(images):
            self._places[bytes.fromhex(image)] = (self._segment.data, first + offset)

    def _load(self, index: Path) -> None:
        """Find the rows of a segment that have a complete index entry and the right checksum."""
        data = index.with_suffix(".f32")
        if not data.exists():
            return
        entries = index.read_bytes()
        row_bytes = 4 * self._width
        with data.open("rb") as file:
            for row in range(len(entries) // _ENTRY.size):
                image, checksum = _ENTRY.unpack_from(entries, row * _ENTRY.size)
                found = file.read(row_bytes)
                if len(found) == row_bytes and zlib.crc32(found) == checksum:
                    self._places[image] = (data, row)

    def close(self) -> None:
        """Close the segment that is being written, if there is one."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None


class _Segment:
    """A segment that is being written: a file of rows and its index. Rows are written before their index entries."""

    def __init__(self, stem: Path) -> None:
        self.data = stem.with_suffix(".f32")
        self.rows = 0
        self._data = self.data.open("xb")
        self._index = stem.with_suffix(".index").open("xb")

    def append(self, images: Sequence[Digest], rows: Features) -> int:
        """Append rows and sync both files; return the number of the first row."""
        first = self.rows
        entries = b"".join(
            _ENTRY.pack(bytes.fromhex(image), zlib.crc32(row.tobytes()))
            for image, row in zip(images, rows, strict=True)
        )
        with disk_errors():
            for file, content in ((self._data, rows.tobytes()), (self._index, entries)):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.rows += len(images)
        return first

    def close(self) -> None:
        for file in (self._data, self._index):
            with contextlib.suppress(OSError):  # on a full disk, the last flush fails; rows without index do not count
                file.close()
