"""What benchmarks stand on: real images in a store, an exported backbone, and a line about the machine."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from artifacts.archive import ArchiveLimits, open_archive
from artifacts.catalogue import BackboneName
from artifacts.images import ImageLimits, encode
from artifacts.layout import Split, from_folders
from artifacts.manifest import Row
from artifacts.store import Digest, Store
from errors import Refused
from training import backbones
from training.export import export

RESULTS = Path(__file__).parent / "results"
LIMITS = ImageLimits()


@dataclass(frozen=True)
class Ground:
    """A store with images and one backbone."""

    store: Store
    folder: Path
    rows: Sequence[Row]
    labels: Sequence[str]
    weights: Digest
    backbone: Digest
    threads: int


@contextmanager
def ground(name: BackboneName, cut: str, size: int, images: int, data: Path | None) -> Iterator[Ground]:
    """Prepare images (from an archive with a folder per class, or drawn) and export a backbone with random weights."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        files = _read(data, images) if data else _draw(images)
        rows = [Row(path, store.put(file), (label,), None, None, Split.TRAIN) for path, label, file in files]
        weights = store.put(backbones.random_weights(name))
        model = backbones.backbone(name, cut, size, store.read(weights))
        backbone = store.put(export(model, threads).onnx)
        labels = sorted({row.labels[0] for row in rows})
        yield Ground(store, Path(folder), sorted(rows, key=lambda row: row.path), labels, weights, backbone, threads)


def _read(data: Path, images: int) -> list[tuple[str, str, bytes]]:
    """Take images evenly from an archive, so that every class is there."""
    archive = open_archive(data, ArchiveLimits())
    samples = from_folders([entry.path for entry in archive.entries]).samples
    chosen = {samples[int(i)].path: samples[int(i)].labels[0] for i in np.linspace(0, len(samples) - 1, images)}
    return [(path, chosen[path], file) for path, file in archive.read(chosen) if not isinstance(file, Refused)]


def _draw(images: int, classes: int = 10, side: int = 100) -> list[tuple[str, str, bytes]]:
    """Draw smooth 100 x 100 colour pictures as JPEG, about as heavy to decode as photographs of that size."""
    random = np.random.default_rng(0)
    files = []
    for number in range(images):
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        files.append((f"{number % classes}/{number:05d}.jpg", str(number % classes), encode(picture, "JPEG")))
    return files


def report(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them as JSON, with the machine they were measured on."""
    machine = {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, **figures, "machine": machine}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}
