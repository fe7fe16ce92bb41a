"""Measures how long a small run takes in the whole service, from its request to its first epoch and to its end.

Starts the whole service (`python -m ops.up`), uploads 40 images of four classes and requests one run after another:
VGG16 at 32 pixels with five folds and two epochs, so that nearly all of the time is start-up. A client notes when the
first `epoch` event and the last `state` event of a run arrive. With `--beside`, the service of another checkout runs at
the same time, and the runs alternate between the two services. So other load on the machine affects both equally. The
result is then the ratio of their medians.

Run as `python -m benchmarks.start_up [--extraction 40] [--tuning 10] [--beside CHECKOUT]`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from artifacts.images import encode
from benchmarks.bench_data import free_port
from benchmarks.figures import processor, report, spread, table

ROOT = Path(__file__).parent.parent
_RECIPE: dict[str, Any] = {
    "backbone": "vgg16",
    "weights": "random",
    "features_from": "block1",
    "image_size": 32,
    "epochs": 2,
    "folds": {"k": 5},
}
_RECIPES: dict[str, dict[str, Any]] = {
    "extraction": _RECIPE,
    "tuning": _RECIPE
    | {
        "mode": "fine-tuning",
        "unfreeze": "block1",
        "fine_tune": {"epochs": 2, "warmup_epochs": 0},
        "augmentation": None,
    },
}


@dataclass
class RunTimes:
    """The times of the runs of one service and one mode, in seconds from the request of each."""

    to_first_epoch: list[float] = field(default_factory=list)
    to_end: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunningService:
    """A service that was started from a checkout, with a data set to train on."""

    http: httpx2.Client
    dataset: str

    def time_run(self, mode: str, times: RunTimes) -> None:
        """Train once and append how long it took."""
        body = {"dataset": self.dataset, "name": mode, "recipe": _RECIPES[mode]}
        start = time.perf_counter()
        answer = self.http.post("/api/v1/runs", json=body)
        answer.raise_for_status()
        first_epoch = None
        with self.http.stream("GET", f"/api/v1/runs/{answer.json()['id']}/events") as events:
            for line in events.iter_lines():
                if first_epoch is None and line == "event: epoch":
                    first_epoch = time.perf_counter() - start
        end = time.perf_counter() - start
        run = self.http.get(f"/api/v1/runs/{answer.json()['id']}").json()
        if run["state"] != "succeeded" or first_epoch is None:
            raise RuntimeError(f"The run ended as {run['state']}: {run['error']}")
        times.to_first_epoch.append(first_epoch)
        times.to_end.append(end)


@contextmanager
def running_service(checkout: Path) -> Iterator[RunningService]:
    """Start the service of a checkout with an empty data folder and default settings; stop it at the end."""
    port = free_port()
    with tempfile.TemporaryDirectory() as var:
        environment = os.environ | {
            "ESPALIER_VAR": var,
            "ESPALIER_API_PORT": str(port),
            "ESPALIER_MLFLOW_PORT": str(free_port()),
            "ESPALIER_FREE_DISK_BYTES": "1000000",
        }
        command = [sys.executable, "-m", "ops.up"]
        with (
            open(Path(var) / "log", "w") as log,
            subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=log) as process,
            httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http,
        ):
            try:
                assert process.stdout is not None
                if b"Espalier is ready" not in process.stdout.readline():
                    raise RuntimeError(f"The service of {checkout} did not start: {(Path(var) / 'log').read_text()}")
                yield RunningService(http, _upload(http))
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def _upload(http: httpx2.Client) -> str:
    """Upload 40 noisy pictures of four colours and return the id of the data set once it is ready."""
    random = np.random.default_rng(0)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(40):
            colour = np.eye(4, 3)[number % 4] * 160 + 40
            pixels = np.clip(colour + random.normal(0, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
            file.writestr(f"{number % 4}/{number}.png", encode(Image.fromarray(pixels), "PNG"))
    answer = http.post("/api/v1/datasets", params={"name": "start-up"}, content=archive.getvalue())
    answer.raise_for_status()
    identifier = str(answer.json()["id"])
    while (state := http.get(f"/api/v1/datasets/{identifier}").json()["state"]) in ("uploaded", "ingesting"):
        time.sleep(0.2)
    if state != "ready":
        raise RuntimeError(f"The data set ended as {state}")
    return identifier


def main() -> None:
    """Time the runs of both modes and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extraction", type=int, default=40, help="feature-extraction runs of each service")
    parser.add_argument("--tuning", type=int, default=10, help="fine-tuning runs of each service")
    parser.add_argument("--beside", type=Path, help="another checkout to compare with")
    args = parser.parse_args()
    asked = {"extraction": args.extraction, "tuning": args.tuning}
    counts = {mode: count for mode, count in asked.items() if count}
    checkouts = {"this": ROOT} | ({"other": args.beside} if args.beside else {})
    times = {(name, mode): RunTimes() for name in checkouts for mode in counts}
    with ExitStack() as stack:
        services = {name: stack.enter_context(running_service(path)) for name, path in checkouts.items()}
        for mode, count in counts.items():
            for service in services.values():
                service.time_run(mode, RunTimes())  # makes the backbone and fills caches
            for _ in range(count):
                for name, service in services.items():
                    service.time_run(mode, times[name, mode])
    figures = {
        f"{mode}_{name}": {
            "to_first_epoch_s": spread(times[name, mode].to_first_epoch),
            "to_end_s": spread(times[name, mode].to_end),
        }
        for name, mode in times
    }
    where = f"{len(os.sched_getaffinity(0))} processors ({processor()})"
    rows = []
    for mode, count in counts.items():
        for part, title in (("to_first_epoch_s", "the first epoch"), ("to_end_s", "the end")):
            medians = [figures[f"{mode}_{name}"][part]["median"] for name in checkouts]
            beside = f", {medians[0] / medians[1]:.2f} of the other checkout's" if args.beside else ""
            rows.append((f"{mode}: request to {title}", f"{medians[0]:.2f} s, median of {count}{beside}", "≤ 1.05"))
    report("start-up", figures)
    table(rows, where)


if __name__ == "__main__":
    main()
