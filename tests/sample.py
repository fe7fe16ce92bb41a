"""Small real things for tests: images, archives, labels. Everything is drawn from a seed."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from artifacts.images import encode

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40), "yellow": (220, 210, 50)}


def picture(seed: int, colour: tuple[int, int, int] = (128, 128, 128), side: int = 40) -> Image.Image:
    """Return a noisy square of one colour, different for every seed."""
    noise = np.random.default_rng(seed).normal(0, 25, (side, side, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def png(seed: int, colour: tuple[int, int, int] = (128, 128, 128), side: int = 40) -> bytes:
    """Return a picture as a PNG file."""
    return encode(picture(seed, colour, side), "PNG")


def jpeg(seed: int, colour: tuple[int, int, int] = (128, 128, 128), side: int = 40) -> bytes:
    """Return a picture as a JPEG file."""
    return encode(picture(seed, colour, side), "JPEG")


def coloured(per_class: int, classes: int = 3, seed: int = 0) -> dict[str, bytes]:
    """Return images in one folder per colour, by path; easy to tell apart."""
    return {
        f"{name}/{number}.png": png(seed + 1000 * index + number, colour)
        for index, (name, colour) in enumerate(list(COLOURS.items())[:classes])
        for number in range(per_class)
    }


def labelled(header: str, labels: Sequence[str]) -> dict[str, bytes]:
    """Return pictures with a labels.csv: the greyer, the further on."""
    lines = [f"path,{header}", *(f"{number}.png,{label}" for number, label in enumerate(labels))]
    contents = {f"{n}.png": png(n, (40 + 6 * n, 90, 220 - 6 * n)) for n in range(len(labels))}
    return {"labels.csv": "\n".join(lines).encode(), **contents}


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of files by path."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    """Return a tar of files by path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
