"""Measures the ingest of many small images: images per second, and processor time per image at the start and the end.

A zip of random PNGs, not compressed, is taken in by a worker with an SQLite database on disk, as after an upload. The
processor time is that of the worker and its child; it is compared between the first and the last tenth of the reading,
and of the storing. A difference means that something grows with the number of images.

Run as `nice python -m benchmarks.ingest [--images 100000] [--side 32] [--folder DIR]`. Aim: a few minutes, and no more
time per image at the end than at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from artifacts.store import Store
from benchmarks.figures import processor, report, table
from models import dataset as datasets
from models import job as jobs
from models.dataset import DatasetState, DatasetVersion
from models.job import JobKind, Queue
from models.project import Principal
from models.session import Database
from ops.migrate import upgrade
from settings import Settings
from worker.app import make_handlers
from worker.lease import Timings
from worker.local_worker import LocalWorker

CLASSES = 10
_LOOK_EVERY_S = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Moment:
    """A look at the ingest: its stage, the fraction of it that is done, and processor seconds until then."""

    stage: str
    fraction: float
    cpu_s: float


def make_archive(place: Path, images: int, side: int) -> None:
    """Write a zip of random PNGs in one folder per class."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        for number in range(images):
            buffer = io.BytesIO()
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            archive.writestr(f"class-{number % CLASSES}/{number:06}.png", buffer.getvalue())


def cpu_s() -> float:
    """Return the processor seconds of this process, and of its children whether they have ended or not."""
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in ended) + sum(map(_cpu_s_of, _children()))


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            yield from map(int, (task / "children").read_text().split())


def _cpu_s_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def watch(database: Database, version_id: str, seen: list[Moment], is_over: threading.Event) -> None:
    """Note how far the ingest is until it ends."""
    while not is_over.wait(_LOOK_EVERY_S):
        with database.reading() as session:
            progress = session.get_one(DatasetVersion, version_id).progress
        moment = progress and Moment(progress["stage"], progress["fraction"], cpu_s())
        if moment and (not seen or (seen[-1].stage, seen[-1].fraction) != (moment.stage, moment.fraction)):
            seen.append(moment)


def cpu_ms_per_image(seen: list[Moment], stage: str, images: int) -> tuple[float, float] | None:
    """Return processor milliseconds per image in the first and the last tenth that were seen; None if too short."""
    moments = [moment for moment in seen if moment.stage == stage]
    if len(moments) < 4:
        return None
    tenth = (moments[-1].fraction - moments[0].fraction) / 10
    first = next(moment for moment in moments[1:] if moment.fraction >= moments[0].fraction + tenth)
    last = next(moment for moment in reversed(moments[:-1]) if moment.fraction <= moments[-1].fraction - tenth)

    def cost(begin: Moment, end: Moment) -> float:
        return 1000 * (end.cpu_s - begin.cpu_s) / (images * (end.fraction - begin.fraction))

    return cost(moments[0], first), cost(last, moments[-1])


def main() -> None:
    """Make the archive, take it in, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the store is; by default a temporary folder")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        measure(Path(folder), wanted.images, wanted.side)


def measure(folder: Path, images: int, side: int) -> None:
    """Take the archive in and print the figures."""
    settings = Settings(var=folder)
    store = Store(Path(settings.store.folder))
    database = Database(settings.database)
    upgrade(database)
    make_archive(folder / "archive.zip", images, side)
    with (folder / "archive.zip").open("rb") as file:
        archive = store.put(iter(lambda: file.read(2**20), b""))
    with database.writing() as session:
        dataset = datasets.create_dataset(session, Principal(), "many")
        version_id = datasets.add_version(session, dataset, archive).id
        jobs.add_job(session, dataset.project_id, JobKind.INGEST, Queue.INGEST, version_id)
    worker = LocalWorker(database, Queue.INGEST, make_handlers(settings, store), "benchmark", Timings())
    seen: list[Moment] = []
    is_over = threading.Event()
    watcher = threading.Thread(target=watch, args=(database, version_id, seen, is_over))
    began_s, spent_s = time.monotonic(), cpu_s()
    watcher.start()
    worker.work()
    took_s, spent_s = time.monotonic() - began_s, cpu_s() - spent_s
    is_over.set()
    watcher.join()
    worker.runner.close()
    with database.reading() as session:
        version = session.get_one(DatasetVersion, version_id)
    assert version.state is DatasetState.READY and version.images == images, version.error
    costs = {stage: cpu_ms_per_image(seen, stage, images) for stage in ("reading", "storing")}
    report(
        "ingest",
        {
            "images": images,
            "side": side,
            "seconds": took_s,
            "images_per_s": images / took_s,
            "cpu_ms_per_image": 1000 * spent_s / images,
            "cpu_ms_per_image_first_and_last_tenth": costs,
        },
    )
    parts = "; ".join(
        f"{stage} {first:.2f} → {last:.2f}" for stage, cost in costs.items() if cost for first, last in [cost]
    )
    measured = (
        f"{took_s:.0f} s, {images / took_s:.0f} images/s, {1000 * spent_s / images:.2f} ms of processor time per image "
        f"(first → last tenth: {parts})"
    )
    table([(f"ingest of {images:,} images of {side} px (`python -m benchmarks.ingest`)", measured, "")], processor())


if __name__ == "__main__":
    main()
