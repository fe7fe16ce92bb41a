"""Measures how much faster two workers train the folds of a run than one worker.

The benchmark starts the whole service with two workers, each pinned to its own processor. It fine-tunes the same recipe
several times, alternately with both workers and with the second one suspended. It measures the seconds from the state
`running` to the end of the run. The speed-up is below 2, because preparation and final fit cannot be shared. Every fold
must have been trained exactly once.

Run as `python -m benchmarks.fan_out [--images 120] [--folds 5] [--epochs 6] [--pairs 3]`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks.figures import processor, report, spread, table
from ops import demo, up
from settings import Settings
from startup import load_settings

PORT = 18_100


def workers_of(settings: Settings) -> list[psutil.Process]:
    """Find the two worker processes, pin each to its own processor, and return them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ESPALIER_VAR") == str(settings.var) and "--queues cpu" in " ".join(
                process.cmdline()
            ):
                found.append(process)
        except psutil.Error:
            continue
    processors = sorted(os.sched_getaffinity(0))
    for worker, number in zip(found, processors, strict=False):
        worker.cpu_affinity([number])
        for thread in worker.threads():
            os.sched_setaffinity(thread.id, [number])
    return found


def train(api: httpx2.Client, dataset: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Request a run, wait for its end, and return it as the API shows it."""
    recipe = {
        "mode": "fine-tuning",
        "backbone": "vgg16",
        "weights": "random",
        "features_from": "block3",
        "image_size": 32,
        "epochs": 5,
        "early_stopping": None,
        "folds": {"k": args.folds},
        "fine_tune": {"learning_rate": 1e-5, "epochs": args.epochs},
    }
    run: dict[str, Any] = api.post("/api/v1/runs", json={"dataset": dataset, "name": name, "recipe": recipe}).json()
    while run["state"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.3)
        run = api.get(f"/api/v1/runs/{run['id']}").json()
    if run["state"] != "succeeded":
        raise RuntimeError(run["error"])
    return run


def seconds_of(run: dict[str, Any]) -> float:
    """Return the seconds between the start and the end of a run."""
    began, ended = (datetime.fromisoformat(run[at]) for at in ("started_at", "finished_at"))
    return (ended - began).total_seconds()


def main() -> None:
    """Measure in pairs and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "ESPALIER_VAR": str(Path(folder) / "var"),
            "ESPALIER_WORKERS": "2",
            "ESPALIER_THREADS": "1",
            "ESPALIER_API_PORT": str(PORT),
            "ESPALIER_MLFLOW_PORT": str(PORT + 1),
        }
        settings = load_settings()
        with up.running(settings), up.client(settings) as api:
            workers = workers_of(settings)
            contents = demo.digits().contents
            chosen = {path: contents[path] for path in list(contents)[:: len(contents) // args.images]}
            body = demo.zipped(demo.Files("digits", chosen))
            dataset = api.post("/api/v1/datasets", params={"name": "digits"}, content=body).json()["id"]
            while api.get(f"/api/v1/datasets/{dataset}").json()["state"] != "ready":
                time.sleep(0.2)
            train(api, dataset, "warm-up", args)
            one, two, parts = [], [], []
            for number in range(args.pairs):
                workers[1].suspend()
                one.append(train(api, dataset, "one", args))
                workers[1].resume()
                two.append(train(api, dataset, "two", args))
                parts += [sorted(fold["fold"] for fold in run["folds"]) for run in (one[-1], two[-1])]
                print(
                    f"pair {number + 1}: {seconds_of(one[-1]):.0f} s, {seconds_of(two[-1]):.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    speed_up = spread([seconds_of(a) / seconds_of(b) for a, b in zip(one, two, strict=True)])
    shares = [sum(fold["seconds"] for fold in run["folds"]) / seconds_of(run) for run in one]
    figures = {
        "folds": args.folds,
        "seconds_one_worker": spread([seconds_of(run) for run in one]),
        "seconds_two_workers": spread([seconds_of(run) for run in two]),
        "speed_up": speed_up,
        "share_of_folds_in_one": spread(shares),
        "every_fold_once": all(found == list(range(args.folds)) for found in parts),
        "same_metrics": len({str(run["metrics"]["confusion"]) for run in one + two}) == 1,
    }
    report("fan_out", figures)
    what = f"a fine-tuning run of {args.folds} folds on two workers of a processor each against one"
    measured = (
        f"{speed_up['median']:.2f} ({speed_up['min']:.2f} to {speed_up['max']:.2f} in {args.pairs} pairs); folds are "
        f"{spread(shares)['median']:.0%} of the time of one"
    )
    table([(what, measured, "–")], f"{len(os.sched_getaffinity(0))} processors ({processor()})")


if __name__ == "__main__":
    main()
