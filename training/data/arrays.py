"""Arrays with a row for each image of a data set version, computed once and then read from a file mapped into memory.

Pixels, decoded and resized; and maps at a cut, the output of a network's frozen part. The files are a cache: they may
be deleted at any time, and whoever has one mapped goes on reading it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from artifacts.features import FeatureSpace
from artifacts.images import IMAGE_RULE, Pixels
from artifacts.store import Digest, disk_errors
from recipes.layers import sides
from training.data.pixels import ImageDecoder

if TYPE_CHECKING:
    from inference.engine import OpenVinoEngine  # a GPU may have no OpenVINO beside it

Maps = npt.NDArray[np.float32]
ReportProgress = Callable[[int, int], None]

_SUFFIX = ".rows"
_MAPS_BATCH = 64
# A file that nobody has written to for so long belongs to a process that was killed.
_UNFINISHED_S = 3600.0


def load_pixels(digests: Sequence[Digest], decoder: ImageDecoder, folder: Path, report: ReportProgress) -> Pixels:
    """Return the pixels of images.

    Args:
        digests: the images in the store, row by row; some may be equal.
        decoder: how they are decoded.
        folder: where such files are kept.
        report: called with (done, total) after each batch.

    Returns:
        uint8 [N, H, W, 3], read-only and mapped into memory.

    Raises:
        Corrupt: an image of the store cannot be decoded any more.
        DiskFull: the file does not fit.
    """
    key = ("pixels", IMAGE_RULE, decoder.size, decoder.resize.value, *digests)
    shape = (len(digests), *sides(decoder.size), 3)
    batches = (pixels for _, pixels in decoder.batches(digests))
    return _load(key, folder, np.dtype(np.uint8), shape, batches, report)


def load_maps(
    digests: Sequence[Digest],
    pixels: Pixels,
    engine: OpenVinoEngine,
    space: FeatureSpace,
    folder: Path,
    room_bytes: int,
    report: ReportProgress,
) -> Maps | None:
    """Return the maps of images at an engine's cut.

    Args:
        digests: the images, row by row.
        pixels: uint8 [N, H, W, 3], theirs.
        engine: the frozen part of a network.
        space: what its maps depend on besides the image.
        folder: where such files are kept.
        room_bytes: how large their file may be.
        report: called with (done, total) after each batch.

    Returns:
        float32 [N, h, w, C], read-only and mapped into memory; None if there is no room for them, or if they are not
        there and would take more than half of what the disk has left.

    Raises:
        DiskFull: the file does not fit.
    """
    shape = _maps_shape(pixels, engine)
    size_bytes = _maps_bytes(shape)
    key = ("maps", space.name, *digests)
    folder.mkdir(parents=True, exist_ok=True)
    left_bytes = size_bytes if _file(key, folder).exists() else shutil.disk_usage(folder).free // 2
    if size_bytes > min(room_bytes, left_bytes):
        return None
    batches = (engine.maps(pixels[start : start + _MAPS_BATCH]) for start in range(0, len(pixels), _MAPS_BATCH))
    return _load(key, folder, np.dtype(np.float32), shape, batches, report)


def maps_bytes(pixels: Pixels, engine: OpenVinoEngine) -> int:
    """Return how many bytes the maps of images uint8 [N, H, W, 3] take."""
    return _maps_bytes(_maps_shape(pixels, engine))


def _maps_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(np.float32).itemsize


def _maps_shape(pixels: Pixels, engine: OpenVinoEngine) -> tuple[int, ...]:
    return (len(pixels), *engine.maps(pixels[:1]).shape[1:])


def _load(
    key: Sequence[Any],
    folder: Path,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    batches: Iterable[npt.NDArray[Any]],
    report: ReportProgress,
) -> npt.NDArray[Any]:
    """Return the rows of a file that an earlier call left, or of one that is written from batches now."""
    place = _file(key, folder)
    kept = _mapped(place, dtype, shape)
    if kept is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{place.name}.{secrets.token_hex(4)}")
    try:
        with disk_errors(), unfinished.open("x+b") as file:
            done = 0
            for batch in batches:
                file.write(batch.tobytes())
                done += len(batch)
                report(done, shape[0])
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name and the size without the rows
            unfinished.replace(place)
            return np.memmap(file, dtype=dtype, mode="r", shape=shape)
    finally:
        unfinished.unlink(missing_ok=True)


def _file(key: Sequence[Any], folder: Path) -> Path:
    return folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + _SUFFIX)


def _mapped(place: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Return the rows of a whole file, which then counts as used now; None if there is none."""
    with contextlib.suppress(FileNotFoundError):  # never made, or dropped at this moment by another process
        os.utime(place)
        with place.open("rb") as file:
            if os.fstat(file.fileno()).st_size == int(np.prod(shape)) * dtype.itemsize:
                return np.memmap(file, dtype=dtype, mode="r", shape=shape)
    return None


def drop_unused(folder: Path, budget_bytes: int) -> None:
    """Remove the files that were not used for longest until the rest fits the budget, and what was never finished."""
    for file in folder.glob(f"*{_SUFFIX}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _UNFINISHED_S:
                file.unlink()
    found = []
    for file in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process drops files, too
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    used = 0
    for _, size_bytes, file in sorted(found, reverse=True):
        used += size_bytes
        if used > budget_bytes:
            file.unlink(missing_ok=True)
