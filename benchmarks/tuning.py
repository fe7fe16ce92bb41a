"""Measures fine-tuning against a bare `keras.Model.fit`: the cost of a training step, and the gain of caching.

Two comparisons are made, both in alternating pairs:

- `step`: `training.fitting.fine_tuning.fine_tune` on the cached output of the frozen layers, against `fit` on the same
  array with the same layers, optimizer and loss.
- `cut`: `fine_tune` on the output of the frozen layers, which the engine computes once, against `fit` through the whole
  network with the same layers frozen. Each fold is a pair, with the same rows in the same order.

The first epoch of each run, in which Keras builds and traces, does not count. Neither does the export of the frozen
layers.

The largest possible gain of `cut` follows from the multiply-adds. Let f be those of the frozen layers for one image,
and r those of the trainable layers. In the trainable layers, a training image costs 3r, because the backward pass
computes the gradients of inputs and of weights; a validation image costs r. With E epochs, K folds, N images and, in
fold i, t_i training and v_i validation images, the limit is

    sum_i E (t_i (f + 3r) + v_i (f + r)) / (N f + sum_i E (t_i 3r + v_i r))

For many epochs without validation this is 1 + f / 3r: 4.3 for VGG16 from block5, 3.5 for Xception from block13, and 2.4
for ResNet50 from conv5. The formula assumes that all multiply-adds are equally fast, but those of OpenVINO are faster
than those of Keras.

Run as `python -m benchmarks.tuning [--images 160] [--pairs 10] [--folds 3] [--epochs 3] [--backbone vgg16]
[--size 96] [--data archive.zip]`.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from artifacts.features import FeatureSpace
from artifacts.images import IMAGE_RULE
from benchmarks.bench_data import BenchData, prepare_bench_data
from benchmarks.figures import processor, report, spread, table
from benchmarks.networks import NONE, fine_tuning_case, first_head, multiply_adds
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.recipe import Precision, Resize, Task
from training.data.arrays import Maps, load_maps, maps_bytes
from training.data.split import Fold, Indices, make_folds
from training.fitting import fine_tuning
from training.fitting.fine_tuning import FineTuningData
from training.fitting.fit_task import FitTask
from training.fitting.head_fit import FittedHead
from training.fitting.training_loop import FitHooks, Rows
from training.networks import backbones
from training.progress import Epoch

BATCH = 32
SEED = 0
# Relative difference allowed between validation losses that were computed in a different order.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A case to measure: a network, the first cut point whose layers are trained, and a small image size."""

    backbone: BackboneName
    unfreeze: str
    size: int


CASES = (
    Case(BackboneName.VGG16, "block5", 96),
    Case(BackboneName.XCEPTION, "block13", 128),
    Case(BackboneName.RESNET50, "conv5", 96),
)


@dataclass(frozen=True)
class EpochTimes:
    """The seconds of each epoch except the first, and the metrics of all epochs."""

    epochs_s: list[float]
    history: list[Epoch]


class FineTuning:
    """One case with its images, the frozen layers of its network, and a head that was fitted on frozen features."""

    def __init__(self, case: Case, bench: BenchData, epochs: int) -> None:
        self.bench = bench
        self.recipe = fine_tuning_case(case.backbone, case.unfreeze, case.size, BATCH, epochs)
        self.weights = bench.store.read(bench.weights)
        self.engine = OpenVinoEngine(bench.store.path(bench.backbone), Precision.FLOAT32, bench.threads)
        whole = backbones.build_backbone(case.backbone, CATALOGUE[case.backbone].last_cut, case.size, self.weights)
        features = whole.predict(bench.pixels, batch_size=BATCH, verbose=0)["features"]
        self.head: FittedHead = first_head(self.recipe, features, bench.truth)

    @contextmanager
    def maps(self) -> Iterator[Maps]:
        """Compute the output of the frozen layers, cache it in a temporary folder, and yield it."""
        bench = self.bench
        size = bench.pixels.shape[1]
        space = FeatureSpace(IMAGE_RULE, size, Resize.SQUASH, bench.backbone, Precision.FLOAT32)
        digests = [row.sha256 for row in bench.rows]
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            size_bytes = maps_bytes(bench.pixels, self.engine)
            maps = load_maps(digests, bench.pixels, self.engine, space, Path(folder), size_bytes, lambda *done: None)
            assert maps is not None, "The disk has no room for the maps."
            yield maps

    def data(self, inputs: Any, are_maps: bool) -> FineTuningData:
        """Return inputs (pixels or, with `are_maps`, the output of the frozen layers) with the targets of the case."""
        bench = self.bench
        return FineTuningData(Task.MULTICLASS, len(bench.labels), inputs, bench.truth, are_maps)

    def ours(self, data: FineTuningData, train: Indices, validation: Indices) -> EpochTimes:
        """Fine-tune as the service does."""
        _drop_networks()
        ends: list[float] = []
        hooks = FitHooks(lambda number, metrics: ends.append(time.perf_counter()))
        fit = FitTask(train, validation, self._epochs, SEED, hooks)
        tuned = fine_tuning.fine_tune(self.recipe, data, self.weights, self.head, fit)
        return EpochTimes(np.diff(ends).tolist(), tuned.trained.history)

    def bare(self, data: FineTuningData, steps: int, **arguments: Any) -> EpochTimes:
        """Fine-tune the same layers with `keras.Model.fit` alone. `arguments` pass the data to `fit`."""
        _drop_networks()
        keras.utils.set_random_seed(SEED)
        _, model, _ = fine_tuning.build_model(self.recipe, data, self.weights, self.head, SEED)
        schedule = fine_tuning.learning_rate_schedule(self.recipe.fine_tune, steps)
        model.compile(
            keras.optimizers.Adam(schedule, global_clipnorm=fine_tuning.CLIP_NORM),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        ends: list[float] = []
        clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()))
        history = model.fit(**arguments, epochs=self._epochs, callbacks=[clock], verbose=0).history
        epochs = [{name: values[epoch] for name, values in history.items()} for epoch in range(self._epochs)]
        return EpochTimes(np.diff(ends).tolist(), epochs)

    @property
    def _epochs(self) -> int:
        return self.recipe.fine_tune.epochs


def step(tuning: FineTuning, pairs: int) -> dict[str, Any]:
    """Compare the training step of the service with the bare one, and return the figures."""
    truth = tuning.bench.truth
    ours, bare = [], []
    with tuning.maps() as mapped:
        maps = np.array(mapped)
        data = tuning.data(maps, are_maps=True)
        for _ in range(pairs):
            ours.append(tuning.ours(data, np.arange(len(maps)), NONE))
            bare.append(tuning.bare(data, -(-len(maps) // BATCH), x=maps, y=truth, batch_size=BATCH))
    return {
        "pairs": pairs,
        "seconds_epoch_ours": spread([float(np.median(times.epochs_s)) for times in ours]),
        "seconds_epoch_bare": spread([float(np.median(times.epochs_s)) for times in bare]),
        "ratio_to_bare_fit": spread(
            [float(np.median(one.epochs_s) / np.median(other.epochs_s)) for one, other in zip(ours, bare, strict=True)]
        ),
        "aim": "<= 1.05",
    }


def cut(tuning: FineTuning, folds: Sequence[Fold]) -> dict[str, Any]:
    """Compare running the frozen layers once with running them in every epoch, and return the figures."""
    bench = tuning.bench
    cached, plain = [], []
    tuning.engine.maps(bench.pixels[:BATCH])
    started = time.perf_counter()
    with tuning.maps() as maps:
        once_s = time.perf_counter() - started
        pixels = tuning.data(bench.pixels, are_maps=False)
        for fold in folds:
            cached.append(tuning.ours(tuning.data(maps, are_maps=True), fold.train, fold.test))
            rows = Rows(bench.pixels, bench.truth, fold.train, BATCH, SEED)
            watched = (bench.pixels[fold.test], bench.truth[fold.test])
            plain.append(tuning.bare(pixels, len(rows), x=rows, validation_data=watched, shuffle=False))
    ratios = [
        sum(other.epochs_s) / (once_s / len(folds) + sum(one.epochs_s))
        for one, other in zip(cached, plain, strict=True)
    ]
    limit = _limit(tuning, folds, len(cached[0].epochs_s))
    loss_difference, accuracy_difference = (_difference(cached, plain, name) for name in ("val_loss", "val_accuracy"))
    return {
        "seconds_once": round(once_s, 2),
        "seconds_cached": round(once_s + sum(sum(times.epochs_s) for times in cached), 2),
        "seconds_plain": round(sum(sum(times.epochs_s) for times in plain), 2),
        "ratio": spread(ratios),
        "limit": round(limit, 2),
        "share_of_limit": spread([ratio / limit for ratio in ratios]),
        "largest_relative_difference_val_loss": loss_difference,
        "largest_difference_val_accuracy": accuracy_difference,
        "metrics_are_equal": loss_difference <= TOLERANCE and accuracy_difference == 0,
        "aim": "share_of_limit >= 0.85, metrics_are_equal",
    }


def _drop_networks() -> None:
    """Free the networks of earlier runs, which are in reference cycles."""
    keras.utils.clear_session()
    gc.collect()


def _limit(tuning: FineTuning, folds: Sequence[Fold], epochs: int) -> float:
    """Return the largest ratio that caching the frozen part can reach, by the formula of this module."""
    recipe = tuning.recipe
    whole = backbones.build_network(recipe.backbone, recipe.image_size)
    boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze)
    assert boundary is not None
    front = keras.Model(whole.input, backbones.cut_layer(whole, recipe.backbone, boundary).output)
    frozen = multiply_adds(front)
    learning = multiply_adds(whole) - frozen
    learned = sum(epochs * (3 * len(fold.train) + len(fold.test)) for fold in folds) * learning
    again = sum(epochs * (len(fold.train) + len(fold.test)) for fold in folds) * frozen
    return (again + learned) / (len(tuning.bench.truth) * frozen + learned)


def _difference(cached: Sequence[EpochTimes], plain: Sequence[EpochTimes], name: str) -> float:
    """Return the largest difference of a metric over all folds and epochs; for a loss relative to its value."""
    ours, theirs = (np.array([[epoch[name] for epoch in times.history] for times in side]) for side in (cached, plain))
    return float(np.max(np.abs(ours - theirs) / (theirs if name == "val_loss" else 1.0)))


def main() -> None:
    """Measure the chosen cases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are timed, after the first")
    parser.add_argument("--backbone", type=BackboneName, choices=[case.backbone for case in CASES])
    parser.add_argument("--size", type=int)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "images": args.images,
        "batch": BATCH,
        "folds": args.folds,
        "epochs": args.epochs,
    }
    rows = []
    for case in CASES:
        if args.backbone not in (None, case.backbone):
            continue
        case = Case(case.backbone, case.unfreeze, args.size or case.size)
        boundary = CATALOGUE[case.backbone].cut_before(case.unfreeze)
        assert boundary is not None
        what = f"{CATALOGUE[case.backbone].title} from {case.unfreeze} at {case.size} px, {args.images} images"
        with prepare_bench_data(case.backbone, boundary, case.size, args.images, args.data) as bench:
            tuning = FineTuning(case, bench, 1 + args.epochs)
            everything = np.arange(len(bench.truth))
            one_hot = np.eye(len(bench.labels), dtype=bool)[bench.truth]
            options = {"k": args.folds, "repeats": 1, "validation_fraction": 0.0, "seed": SEED}
            folds = make_folds(everything, bench.truth, one_hot, everything, NONE, **options)
            measured = {"step": step(tuning, args.pairs), "cut": cut(tuning, folds)}
        figures[what] = measured
        rows += _rows(what, measured, args)
    report("tuning", figures)
    table(rows, f"{len(os.sched_getaffinity(0))} processors ({processor()})")


def _rows(what: str, measured: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[tuple[str, str, str]]:
    ratio = measured["step"]["ratio_to_bare_fit"]
    saved = measured["cut"]
    least, most = (saved["share_of_limit"][name] for name in ("min", "max"))
    return [
        (
            f"a training step against a bare `keras.Model.fit` on the same arrays, {what}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f} in {args.pairs} pairs)",
            "at most 1.05",
        ),
        (
            f"the frozen part once against in each of {args.folds} folds × {args.epochs} epochs, {what}",
            f"{saved['ratio']['median']:.2f}; its limit is {saved['limit']}, of which it reaches "
            f"{saved['share_of_limit']['median']:.2f} ({least:.2f} to {most:.2f}); metrics "
            f"{'equal' if saved['metrics_are_equal'] else 'DIFFER'}",
            "at least 0.85 of the limit, same metrics",
        ),
    ]


if __name__ == "__main__":
    main()
