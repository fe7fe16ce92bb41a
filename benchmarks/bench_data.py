"""Shared set-up of the benchmarks: images in a store, an exported backbone, a data set and a free port."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sqlalchemy.orm import Session

from artifacts import manifest
from artifacts.archive import ArchiveLimits, open_archive
from artifacts.images import ImageLimits, Pixels, decode, encode
from artifacts.layout import Split, from_folders
from artifacts.manifest import Row
from artifacts.store import Digest, Store
from benchmarks.networks import calibrated
from errors import Refused
from models import dataset as datasets
from models.dataset import DatasetVersion
from models.project import Principal
from recipes.catalogue import BackboneName
from recipes.defaults import ClassCount
from recipes.recipe import Resize, Task
from training.data.split import Indices
from training.networks import backbones
from training.networks.export import export

LIMITS = ImageLimits()
_CALIBRATED = 32


@dataclass(frozen=True)
class BenchData:
    """A store with images and one exported backbone.

    Attributes:
        store: the store.
        folder: the temporary folder of the benchmark.
        rows: the images with their labels.
        pixels: uint8 [N, H, W, 3], in the order of `rows`.
        truth: int [N], the index of each image's label in `labels`.
        labels: the labels.
        weights: digest of the backbone's weights.
        backbone: digest of the exported backbone.
        threads: number of processors that this process may use.
    """

    store: Store
    folder: Path
    rows: Sequence[Row]
    pixels: Pixels
    truth: Indices
    labels: Sequence[str]
    weights: Digest
    backbone: Digest
    threads: int


@contextmanager
def prepare_bench_data(name: BackboneName, cut: str, size: int, images: int, data: Path | None) -> Iterator[BenchData]:
    """Yield images and an exported backbone with random weights, in a temporary store.

    Args:
        name: the backbone.
        cut: the cut point at which the backbone ends.
        size: side of the images in pixels.
        images: number of images.
        data: an archive with a folder for each class; without it, random images are generated.
    """
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        files = sorted(_read(data, images) if data else _draw(images))
        rows = [Row(path, store.put(file), (label,), None, None, Split.TRAIN) for path, label, file in files]
        pixels = np.stack([decode(file, size, Resize.SQUASH, LIMITS) for _, _, file in files])
        labels = sorted({row.labels[0] for row in rows})
        truth = np.array([labels.index(row.labels[0]) for row in rows])
        weights = store.put(calibrated(name, pixels[:_CALIBRATED]))
        model = backbones.build_backbone(name, cut, size, store.read(weights))
        backbone = store.put(export(model, threads).onnx)
        yield BenchData(store, Path(folder), rows, pixels, truth, labels, weights, backbone, threads)


def add_dataset(session: Session, bench: BenchData) -> DatasetVersion:
    """Add a data set of the images; return its version, which is ready to be trained on."""
    dataset = datasets.create_dataset(session, Principal(), "bench")
    version = datasets.add_version(session, dataset, bench.weights)
    datasets.start_ingest(session, version.id)
    datasets.mark_ready(
        session,
        version.id,
        manifest=bench.store.put(manifest.dump(bench.rows)),
        task=Task.MULTICLASS,
        images=len(bench.rows),
        duplicates=0,
        ignored=0,
        classes=[ClassCount(label, 100, 100) for label in bench.labels],
        target=None,
        refused=[],
    )
    return version


def free_port() -> int:
    """Return a TCP port on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(data: Path, images: int) -> list[tuple[str, str, bytes]]:
    """Return evenly spaced images of an archive, as path, label and file. So every class is among them."""
    archive = open_archive(data, ArchiveLimits())
    samples = from_folders([entry.path for entry in archive.entries]).samples
    chosen = {samples[int(i)].path: samples[int(i)].labels[0] for i in np.linspace(0, len(samples) - 1, images)}
    return [(path, chosen[path], file) for path, file in archive.read(chosen) if not isinstance(file, Refused)]


def _draw(images: int, classes: int = 10, side: int = 100) -> list[tuple[str, str, bytes]]:
    """Return smooth 100 x 100 colour pictures as JPEG, which take about as long to decode as photographs."""
    random = np.random.default_rng(0)
    files = []
    for number in range(images):
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        files.append((f"{number % classes}/{number:05d}.jpg", str(number % classes), encode(picture, "JPEG")))
    return files
