"""Measures the cost of durable jobs: the folds of a run trained by a worker, compared with a bare loop.

With a worker, a lease is renewed, the child sends epochs, progress and checkpoints, rows are written to a database on
disk, and MLflow receives the metrics. The bare loop calls `Experiment.learn_fold` in another process, without reports
and checkpoints. Each measurement starts a new process with all caches filled. Only the seconds of the folds count, not
start-up and preparation. The two take turns.

Run as `python -m benchmarks.leases [--images 240] [--size 64] [--epochs 8] [--pairs 10] [--mode fine-tuning]
[--data archive.zip]`. Aim: at most 1.03.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifacts.store import Store
from benchmarks.bench_data import LIMITS, BenchData, add_dataset, free_port, prepare_bench_data
from benchmarks.figures import processor, report, spread, table
from models import registry, run_jobs
from models import run as runs
from models.dataset import DatasetVersion
from models.job import JobKind, Queue
from models.project import Principal
from models.registry import Weights
from models.session import Database
from ops.migrate import upgrade
from ops.up import command_line, mlflow_answers, mlflow_server
from recipes.catalogue import BackboneName
from recipes.defaults import ClassCount, fill
from recipes.filled import parse_filled
from recipes.recipe import FineTune, Folds, Mode, Recipe, Task
from settings import Settings
from worker.child_process import computing_threads
from worker.handlers.tracking import Publish, TrackingSettings
from worker.handlers.train import Train, TrainingSettings
from worker.lease import Handler, Timings
from worker.local_worker import LocalWorker
from worker.messages import WeightsSource
from worker.sweeper import Sweeper

NETWORK = BackboneName.VGG16
CUT = "block5"
NAME = "calibrated"
FOLDS = 2


def recipe_of(wanted: argparse.Namespace, labels: Sequence[str]) -> Recipe:
    """Return a recipe without early stopping, so that every fold trains all epochs."""
    mode = Mode(wanted.mode)
    recipe = Recipe(
        mode=mode,
        backbone=NETWORK,
        weights=NAME,
        features_from=CUT,
        image_size=wanted.size,
        epochs=2 if mode is Mode.FINE_TUNING else wanted.epochs,
        early_stopping=None,
        folds=Folds(k=FOLDS),
        **({"fine_tune": FineTune(learning_rate=1e-6, epochs=wanted.epochs)} if mode is Mode.FINE_TUNING else {}),
    )
    return fill(recipe, Task.MULTICLASS, [ClassCount(label, 100, 100) for label in labels])


# --- the bare loop ----------------------------------------------------------------------------------------------------


def bare(order: dict[str, Any]) -> None:
    """Train the folds in the bare loop and print their seconds. This is the main function of another process."""
    os.environ |= computing_threads(order["threads"])
    from benchmarks.folds import Known, Silent
    from training.experiment import Experiment
    from training.networks.network_files import Workspace
    from training.setup import TrainingRequest

    place = Workspace(
        store=Store(Path(order["store"])),
        features=Path(order["features"]),
        pixels=Path(order["pixels"]),
        pixels_bytes=2**40,
        image_limits=LIMITS,
        threads=order["threads"],
    )
    wanted = TrainingRequest(parse_filled(order["recipe"]), order["manifest"], order["labels"], order["weights"])
    experiment = Experiment(wanted, place, Known(order["backbone"]), Silent())
    print(sum(experiment.learn_fold(number).result.seconds for number in range(FOLDS)))


def bare_folds(order: dict[str, Any]) -> float:
    """Start a process that trains the folds in the bare loop; return the seconds of the folds."""
    command = [sys.executable, "-m", "benchmarks.leases", "--bare", json.dumps(order)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


# --- the worker -------------------------------------------------------------------------------------------------------


class Service:
    """A worker with its sweeper, on a new database with a data set."""

    def __init__(self, given: BenchData, place: TrainingSettings, mlflow_url: str) -> None:
        self.database = Database(f"sqlite:///{given.folder / 'espalier.db'}")
        upgrade(self.database)
        train = Train(given.store, place)
        publish = Publish(given.store, TrackingSettings(mlflow_url, 5.0, "http://127.0.0.1:9"))
        handlers: dict[JobKind, Handler] = {
            JobKind.TRAIN: train,
            JobKind.FOLD: train,
            JobKind.FINAL: train,
            JobKind.PUBLISH: publish,
        }
        queues = [Queue.CPU, Queue.TRACKING]
        self._loops = [LocalWorker(self.database, queue, handlers, "bench", Timings()) for queue in queues]
        self._sweeper = Sweeper(self.database, queues, handlers, "bench", Timings())
        self.version_id = self._add_dataset(given)
        for loop in self._loops:
            loop.start()
        self._sweeper.start()

    def _add_dataset(self, given: BenchData) -> str:
        with self.database.writing() as session:
            registry.set_weights(session, Weights(network=NETWORK, name=NAME, sha256=given.weights, source={}))
            return add_dataset(session, given).id

    def folds(self, recipe: Recipe) -> float:
        """Train a run; return the seconds of its folds."""
        with self.database.writing() as session:
            run = runs.create_run(session, Principal(), self.version_id, "bench", recipe)
            run_jobs.queue_training(session, run)
        for loop in self._loops:
            loop.wake()
        while True:
            with self.database.reading() as session:
                found = runs.get_run(session, Principal(), run.id)
                seconds = [fold.seconds or 0.0 for fold in runs.get_folds(session, run.id)]
            if found.state.is_final:
                if found.error:
                    raise RuntimeError(found.error["detail"])
                return sum(seconds)
            time.sleep(0.2)

    def close(self) -> None:
        """Stop the worker and its sweeper, and close the database."""
        for loop in self._loops:
            loop.drain()
        for loop in self._loops:
            loop.join(30)
        self._sweeper.stop()
        self.database.close()


@contextmanager
def mlflow(folder: Path) -> Iterator[str]:
    """Yield the address of a real MLflow server."""
    port = free_port()
    command = command_line(mlflow_server(port, folder / "mlflow"), folder)
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        while not mlflow_answers(url):
            time.sleep(0.3)
        yield url
        server.terminate()


def main() -> None:
    """Measure in pairs and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], default=Mode.FINE_TUNING.value)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bare", type=json.loads, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.bare:
        bare(wanted.bare)
        return
    with (
        prepare_bench_data(NETWORK, CUT, wanted.size, wanted.images, wanted.data) as given,
        mlflow(given.folder) as url,
    ):
        recipe = recipe_of(wanted, given.labels)
        place = TrainingSettings(
            features=str(given.folder / "features"),
            pixels=str(given.folder / "pixels"),
            pixels_bytes=2**40,
            image_limits=LIMITS,
            threads=given.threads,
            source=WeightsSource("http://127.0.0.1:9", "", 1.0, 1.0),
            checkpoint_share=Settings().checkpoint_share,
        )
        service = Service(given, place, url)
        with service.database.reading() as session:
            version_manifest = session.get_one(DatasetVersion, service.version_id).manifest_sha256
        order = {
            "store": str(given.store.root),
            "features": place.features,
            "pixels": place.pixels,
            "threads": given.threads,
            "recipe": recipe.model_dump(mode="json"),
            "manifest": version_manifest,
            "labels": list(given.labels),
            "weights": given.weights,
            "backbone": given.backbone,
        }
        service.folds(recipe)  # fills the caches
        ours, bares = [], []
        for number in range(wanted.pairs):
            bares.append(bare_folds(order))
            ours.append(service.folds(recipe))
            print(f"pair {number + 1}: {ours[-1]:.2f} s against {bares[-1]:.2f} s", file=sys.stderr, flush=True)
        service.close()
    ratio = spread([one / other for one, other in zip(ours, bares, strict=True)])
    figures = {
        "mode": wanted.mode,
        "images": wanted.images,
        "size": wanted.size,
        "epochs": wanted.epochs,
        "seconds_worker": spread(ours),
        "seconds_bare": spread(bares),
        "ratio": ratio,
        "aim": "<= 1.03",
    }
    report(f"leases-{wanted.mode}", figures)
    what = (
        f"{wanted.mode} by a worker (lease, checkpoints, events, MLflow) against the bare folds, {wanted.images} images"
    )
    measured = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f} in {wanted.pairs} pairs)"
    table([(what, measured, "at most 1.03")], f"{given.threads} processors ({processor()})")


if __name__ == "__main__":
    main()
