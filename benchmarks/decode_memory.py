"""Measures the memory of the API while clients send small files that become large images, and a minute afterwards.

Each case meets an API of its own, which has answered one prediction before. Its resident memory is read then, at its
peak while several requests are under way, and after they were answered: at once, and after `--settle` seconds. The
limit is ESPALIER_DECODE_BYTES plus 300 MB for everything else, and 200 MB above the start in the end.

Run as `python -m benchmarks.decode_memory [--settle 60] [--at-once 6] [--checkout FOLDER]`; with `--checkout` the API
is that of another checkout, for the same database schema.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from artifacts import manifest
from artifacts.images import ImageFacts
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.store import digest_of
from benchmarks.bench_data import BenchData, free_port, prepare_bench_data
from benchmarks.figures import processor, report, table
from benchmarks.load import load, post
from benchmarks.serving import Server, add_models, name, running
from models import dataset as datasets
from models.dataset import IngestedImage
from models.project import Principal
from models.session import Database
from recipes.catalogue import BackboneName
from recipes.defaults import ClassCount
from recipes.recipe import Task
from settings import Settings

_WIDTH, _HEIGHT = 8000, 5000
_SIZE = 32
_REST_BYTES, _SETTLED_BYTES = 300_000_000, 200_000_000
_MB = 10**6


def gif_with_a_huge_frame() -> bytes:
    """Return 37 bytes: a frame of 65,535 × 65,535 pixels that is to be cleared afterwards."""
    screen = b"GIF89a" + struct.pack("<2H3B", 1, 1, 0, 0, 0)
    disposal = b"!\xf9\x04" + bytes([2 << 2]) + bytes(4)
    return screen + disposal + b"," + struct.pack("<4HB", 0, 0, 65_535, 65_535, 0) + b"\x02\x00;"


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _slopes() -> Image.Image:
    across = np.linspace(0, 255, _WIDTH, dtype=np.uint8)[None]
    down = np.linspace(0, 255, _HEIGHT, dtype=np.uint8)[:, None]
    both = across // 2 + down // 2
    bands = [np.broadcast_to(across, both.shape), np.broadcast_to(down, both.shape), both]
    return Image.fromarray(np.stack(bands, axis=-1))


def large_files() -> dict[str, bytes]:
    """Return files of 40 megapixels, by what they are."""
    image = _slopes()
    clear = Image.new("RGBA", image.size, (255, 0, 0, 0))
    transparent = image.copy()
    transparent.putalpha(image.getchannel("R"))
    next_frame = Image.new("RGBA", image.size, (0, 255, 0, 128))
    return {
        "a PNG with transparency": _saved(transparent, "PNG", compress_level=6),
        "an animated WEBP": _saved(
            clear, "WEBP", save_all=True, append_images=[next_frame], lossless=True, method=0, quality=0
        ),
        "a progressive JPEG": _saved(image, "JPEG", quality=50, progressive=True, subsampling=0),
        "an AVIF with transparency": _saved(transparent, "AVIF", quality=30, speed=10),
    }


@dataclass(frozen=True)
class MemoryUse:
    """Resident bytes of the API before a case, at its peak, at its end and after a while; the answers by status."""

    before: int
    peak: int
    end: int
    settled: int
    seconds: float
    statuses: dict[str, int]


def measure(server: Server, port: int, requests: Sequence[bytes], at_once: int, settle_s: float) -> MemoryUse:
    """Send each request once, `at_once` at a time, to a fresh API."""
    with running(server, port) as process:
        before = process.memory_info().rss
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from now
        found = load(port, requests, at_once, 600.0, most=len(requests), patience_s=600.0)
        end, peak = process.memory_info().rss, _peak(process)
        time.sleep(settle_s)
        statuses = {str(status): count for status, count in found.statuses.items()}
        return MemoryUse(before, peak, end, process.memory_info().rss, round(found.seconds, 1), statuses)


def _peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def add_large_images(bench: BenchData, files: Sequence[bytes]) -> list[str]:
    """Add a data set of these files; return the path of the thumbnail of each."""
    database = Database(f"sqlite:///{bench.folder / 'espalier.db'}")
    rows = [
        Row(f"a/{number}.png", bench.store.put(file), ("a",), None, None, Split.TRAIN)
        for number, file in enumerate(files)
    ]
    facts = ImageFacts(_WIDTH, _HEIGHT, "PNG")
    accepted = [IngestedImage(row, facts, len(file)) for row, file in zip(rows, files, strict=True)]
    with database.writing() as session:
        dataset = datasets.create_dataset(session, Principal(), "large")
        version = datasets.add_version(session, dataset, bench.weights)
        datasets.start_ingest(session, version.id)
        datasets.add_images(session, dataset.project_id, version.id, accepted)
        datasets.mark_ready(
            session,
            version.id,
            manifest=bench.store.put(manifest.dump(rows)),
            task=Task.MULTICLASS,
            images=len(rows),
            duplicates=0,
            ignored=0,
            classes=[ClassCount("a", len(rows), len(rows))],
            target=None,
            refused=[],
        )
        path = f"/api/v1/datasets/{dataset.id}/images/"
    database.close()
    return [f"{path}{digest_of(file)}/thumbnail" for file in files]


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def main() -> None:
    """Measure all cases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settle", type=float, default=60.0)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    args = parser.parse_args()
    limit = Settings().decode_bytes
    files = large_files()
    small = _saved(Image.new("RGB", (64, 48)), "JPEG")
    path = f"/api/v1/models/{name(0)}/predict"
    with prepare_bench_data(BackboneName.VGG16, "block1", _SIZE, 16, None) as bench:
        add_models(bench, 1, _SIZE, None)
        # Files that differ by what follows their end, so that each is stored by itself.
        pages = add_large_images(bench, [files["a PNG with transparency"] + bytes([number]) for number in range(8)])
        cases = {"predict: a GIF with a huge frame": [post(path, gif_with_a_huge_frame())] * args.at_once}
        cases |= {f"predict: {what}": [post(path, file)] * args.at_once for what, file in files.items()}
        cases["thumbnails: PNGs with transparency"] = [_get(page) for page in pages]
        port = free_port()
        server = Server(
            "Espalier",
            "/readyz",
            [sys.executable, "-m", "api.app"],
            args.checkout,
            {
                "ESPALIER_VAR": str(bench.folder),
                "ESPALIER_API_PORT": str(port),
                "ESPALIER_PREDICT_DEADLINE_S": "30",
                "ESPALIER_IMAGE_FORMATS": "JPEG,PNG,WEBP,BMP,GIF,TIFF",
            },
            [post(path, small)],
        )
        if (args.checkout / "api" / "thumbnails.py").exists():
            server.environment["ESPALIER_IMAGE_FORMATS"] += ",AVIF"
        found = {}
        for what, requests in cases.items():
            at_once = max(args.at_once, len(requests))
            found[what] = measure(server, port, requests, at_once, args.settle)
            print(what, found[what], flush=True)
    report("decode_memory", {"limit_bytes": limit, "cases": {what: vars(one) for what, one in found.items()}})
    where = f"{len(os.sched_getaffinity(0))} processors ({processor()})"
    table(
        [
            (
                f"memory of the API, {what}, {len(cases[what])} at once",
                f"{one.before // _MB} MB before, {one.peak // _MB} MB at the peak, {one.settled // _MB} MB after "
                f"{args.settle:g} s",
                f"peak ≤ {(limit + _REST_BYTES) // _MB} MB, then ≤ {(one.before + _SETTLED_BYTES) // _MB} MB",
            )
            for what, one in found.items()
        ],
        where,
    )


if __name__ == "__main__":
    main()
