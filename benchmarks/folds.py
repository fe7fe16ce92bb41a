"""Measures a k-fold run of Espalier against the loop that tutorials show: Keras `fit` for each fold.

The loop runs the frozen backbone on 80 % of the images in every epoch of every fold, and tests each fold once. Two
epochs of each fold are measured and scaled to all epochs; tracing, compiling and decoding do not count. Espalier's time
includes decoding, extraction, all folds and the final head. The loop needs 0.8 · k · epochs + 1 forward passes per
image and Espalier one, so that this is the largest possible ratio.

Run as `python -m benchmarks.folds [--images 1024] [--size 96] [--data archive.zip]`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from artifacts import manifest
from artifacts.run_files import RunFile
from artifacts.store import Digest
from benchmarks.bench_data import LIMITS, BenchData, prepare_bench_data
from benchmarks.figures import report
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.recipe import Recipe, Task
from training import experiment
from training.data.split import make_folds
from training.fitting.fold_outcome import FoldOutcome
from training.fitting.learners import Plan
from training.networks import backbones
from training.networks.network_files import BackboneKey, Workspace
from training.progress import Extraction, SilentFit
from training.setup import TrainingRequest

K = 5
TIMED_EPOCHS = 2


class Known:
    """A registry of networks in which the backbone is already exported, so that its export is not measured."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest

    def find_backbone(self, key: BackboneKey) -> Digest:
        return self._digest

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        raise AssertionError("The backbone was exported before. This is a bug.")

    def find_quantised(self, backbone: Digest) -> Digest | None:
        return None

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        return digest

    def find_bake_off_result(self) -> dict[str, Any] | None:
        return None

    def set_bake_off_result(self, facts: dict[str, Any]) -> None: ...

    def find_precision_decision(self) -> dict[str, Any] | None:
        return None

    def set_precision_decision(self, facts: dict[str, Any]) -> None: ...


class Silent:
    """A progress listener that only notes the seconds of the extraction."""

    extraction_s = 0.0

    def stage(self, name: str) -> None: ...

    def images(self, done: int, total: int) -> None: ...

    def extracted(self, extraction: Extraction) -> None:
        self.extraction_s = extraction.seconds

    def begin_fit(self, fold: int | None, plan: Plan) -> SilentFit:
        return SilentFit()

    def fold_ended(self, outcome: FoldOutcome) -> None: ...

    def file(self, name: RunFile, data: bytes, media_type: str) -> None: ...


def ours(given: BenchData, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a whole run of Espalier, and the seconds of its extraction alone."""
    recipe = fill(
        Recipe(backbone=args.backbone, image_size=args.size, epochs=args.epochs, early_stopping=None),
        Task.MULTICLASS,
        [ClassCount(label, 100, 100) for label in given.labels],
    )
    version = given.store.put(manifest.dump(given.rows))
    workspace = Workspace(
        store=given.store,
        features=given.folder / "features",
        pixels=given.folder / "pixels",
        pixels_bytes=2**40,
        image_limits=LIMITS,
        threads=given.threads,
    )
    started = time.perf_counter()
    silent = Silent()
    request = TrainingRequest(recipe, version, given.labels, given.weights)
    experiment.run(request, workspace, Known(given.backbone), silent)
    return time.perf_counter() - started, silent.extraction_s


def tutorial(given: BenchData, args: argparse.Namespace) -> float:
    """Return the seconds that the tutorial's loop would take for all epochs of all folds."""
    cut = CATALOGUE[args.backbone].last_cut
    frozen = backbones.build_backbone(args.backbone, cut, args.size, given.store.read(given.weights))
    pixels, truth = given.pixels, given.truth
    everything = np.arange(len(truth))
    folds = make_folds(
        everything,
        truth,
        np.eye(len(given.labels), dtype=bool)[truth],
        everything,
        everything[:0],
        k=K,
        repeats=1,
        validation_fraction=0.15,
        seed=0,
    )
    total = 0.0
    for fold in folds:
        train = np.setdiff1d(everything, fold.test)
        model = keras.Sequential([frozen.input, frozen, _Features(), keras.layers.Dense(len(given.labels))])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        model.fit(pixels[:32], truth[:32], epochs=1, verbose=0)  # traces and compiles, not timed
        model.evaluate(pixels[:32], truth[:32], verbose=0)
        started = time.perf_counter()
        model.fit(pixels[train], truth[train], epochs=TIMED_EPOCHS, batch_size=32, verbose=0)
        total += (time.perf_counter() - started) * args.epochs / TIMED_EPOCHS
        started = time.perf_counter()
        model.evaluate(pixels[fold.test], truth[fold.test], verbose=0)
        total += time.perf_counter() - started
    return total


class _Features(keras.layers.Layer):  # type: ignore[misc]
    """Selects the features from the two outputs of the frozen backbone."""

    def call(self, outputs: dict[str, Any]) -> Any:
        return outputs["features"]


def main() -> None:
    """Measure Espalier and the loop once, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=BackboneName, default=BackboneName.VGG16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    cut = CATALOGUE[args.backbone].last_cut
    with prepare_bench_data(args.backbone, cut, args.size, args.images, args.data) as given:
        whole, extraction = ours(given, args)
        loop = tutorial(given, args)
        report(
            "folds",
            {
                "network": f"{args.backbone.value} at {args.size} px, float32",
                "images": len(given.rows),
                "folds": K,
                "epochs": args.epochs,
                "seconds_whole_run": round(whole, 2),
                "seconds_of_it_extraction": round(extraction, 2),
                "seconds_tutorial_loop_scaled": round(loop, 1),
                "ratio": round(loop / whole, 1),
                "limit": 0.8 * K * args.epochs + 1,
                "aim": ">= 30",
            },
        )


if __name__ == "__main__":
    main()
