"""A cache of large arrays with one row per image: computed once, then read from a memory-mapped file.

There are two kinds of arrays: pixels that were decoded and resized, and maps, the output of the frozen part of a
network. The files may be deleted at any time; a process that has mapped a file can still read it.
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

from artifacts.bit_depths import FULL_DEPTH
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
# If an unfinished file was not written to for so many seconds, the process that wrote it is assumed dead.
_UNFINISHED_S = 3600.0


def load_pixels(digests: Sequence[Digest], decoder: ImageDecoder, folder: Path, report: ReportProgress) -> Pixels:
    """Return the pixels of images, from the cache or decoded now.

    Args:
        digests: the image of each row; the same image may occur several times.
        decoder: decodes and resizes the images.
        folder: the folder of the cache.
        report: called with (done, total) after each batch.

    Returns:
        uint8 [N, H, W, 3], read-only and mapped into memory.

    Raises:
        Corrupt: a stored image cannot be decoded.
        DiskFull: the disk has no room for the file.
    """
    depth = () if decoder.bit_depth == FULL_DEPTH else (f"{decoder.bit_depth} bits",)
    key = ("pixels", IMAGE_RULE, decoder.size, decoder.resize.value, *depth, *digests)
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
    """Return the output of the frozen part of a network for images, from the cache or computed now.

    Args:
        digests: the image of each row.
        pixels: uint8 [N, H, W, 3], the pixels of these images.
        engine: runs the frozen part of the network.
        space: the values that the maps depend on besides the image, such as the network and its precision.
        folder: the folder of the cache.
        room_bytes: the largest file that is allowed.
        report: called with (done, total) after each batch.

    Returns:
        float32 [N, h, w, C], read-only and mapped into memory. None if the file would be larger than `room_bytes`.
        None also if the file does not exist yet and would take more than half of the free disk space.

    Raises:
        DiskFull: the disk has no room for the file.
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
    """Return the size in bytes of the array that `load_maps` returns for these pixels, uint8 [N, H, W, 3]."""
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
    """Return the array of a cached file, mapped into memory. If there is no such file, write it from the batches."""
    path = _file(key, folder)
    cached = _mapped(path, dtype, shape)
    if cached is not None:
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with disk_errors(), unfinished.open("x+b") as file:
            done = 0
            for batch in batches:
                file.write(batch.tobytes())
                done += len(batch)
                report(done, shape[0])
            file.flush()
            os.fsync(file.fileno())  # without it, a power cut may leave the name and the size without the rows
            unfinished.replace(path)
            return np.memmap(file, dtype=dtype, mode="r", shape=shape)
    finally:
        unfinished.unlink(missing_ok=True)


def _file(key: Sequence[Any], folder: Path) -> Path:
    return folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + _SUFFIX)


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    """Return the array of a complete file, and mark the file as used now. Return None if there is no such file."""
    with contextlib.suppress(FileNotFoundError):  # the file was never written, or another process removed it
        os.utime(path)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == int(np.prod(shape)) * dtype.itemsize:
                return np.memmap(file, dtype=dtype, mode="r", shape=shape)
    return None


def drop_unused(folder: Path, budget_bytes: int) -> None:
    """Remove unfinished files of dead processes. Then remove the least recently used files until the budget is met."""
    for file in folder.glob(f"*{_SUFFIX}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _UNFINISHED_S:
                file.unlink()
    found = []
    for file in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process may drop files at the same time
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    used = 0
    for _, size_bytes, file in sorted(found, reverse=True):
        used += size_bytes
        if used > budget_bytes:
            file.unlink(missing_ok=True)
