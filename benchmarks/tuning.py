"""Fine-tuning against the bare `keras.Model.fit`: what our step costs, and what computing the frozen part once saves.

The step: `training.fitting.fine_tuning.fine_tune` on maps at the cut, against `fit` on the same array with the same
layers, optimizer and loss, in interleaved pairs. The cut: `fine_tune` on maps that the engine computes in one pass,
against `fit` through the whole network with the layers before the cut frozen. Each fold is a pair, with the same rows
in the same order. Neither side counts the first epoch of each run, in which Keras builds and traces, nor the export of
the frozen part.

What the cut can save at most follows from multiply-adds. Let one image cost f forward through the frozen part and r
through the part that learns. A training image costs the learning part 3r, since the backward pass needs the gradients
of its inputs and of its weights; a validation image costs it r. With E epochs, K folds, N images and, in fold i, t_i
images to train on and v_i to validate on, the limit is

    sum_i E (t_i (f + 3r) + v_i (f + r)) / (N f + sum_i E (t_i 3r + v_i r))

For many epochs without validation this is 1 + f / 3r: VGG16 from block5 4.3, Xception's exit flow (from block13) 3.5,
ResNet50 from conv5 2.4. It takes every multiply-add to be equally fast; OpenVINO's are faster than Keras'.

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
from benchmarks.figures import processor, report, spread, table
from benchmarks.ground import Ground, ground
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
from training.fitting.training_loop import Passage, Rows
from training.networks import backbones
from training.progress import Epoch

BATCH = 32
SEED = 0
# Validation losses of two paths that compute the same in another order, relative.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A network, the first cut that learns, and a size that is quick."""

    backbone: BackboneName
    unfreeze: str
    size: int


CASES = (
    Case(BackboneName.VGG16, "block5", 96),
    Case(BackboneName.XCEPTION, "block13", 128),
    Case(BackboneName.RESNET50, "conv5", 96),
)


@dataclass(frozen=True)
class Timed:
    """Seconds of each epoch but the first, and metrics of all."""

    epochs_s: list[float]
    history: list[Epoch]


class Trial:
    """One case on its images: a frozen part to go through once, and a head that has learned on frozen features."""

    def __init__(self, case: Case, given: Ground, epochs: int) -> None:
        self.given = given
        self.recipe = fine_tuning_case(case.backbone, case.unfreeze, case.size, BATCH, epochs)
        self.weights = given.store.read(given.weights)
        self.engine = OpenVinoEngine(given.store.path(given.backbone), Precision.FLOAT32, given.threads)
        whole = backbones.build_backbone(case.backbone, CATALOGUE[case.backbone].last_cut, case.size, self.weights)
        features = whole.predict(given.pixels, batch_size=BATCH, verbose=0)["features"]
        self.head: FittedHead = first_head(self.recipe, features, given.truth)

    @contextmanager
    def maps(self) -> Iterator[Maps]:
        """Yield the maps at the cut, computed now."""
        given = self.given
        size = given.pixels.shape[1]
        space = FeatureSpace(IMAGE_RULE, size, Resize.SQUASH, given.backbone, Precision.FLOAT32)
        digests = [row.sha256 for row in given.rows]
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            size_bytes = maps_bytes(given.pixels, self.engine)
            maps = load_maps(digests, given.pixels, self.engine, space, Path(folder), size_bytes, lambda *done: None)
            assert maps is not None, "The disk has no room for the maps."
            yield maps

    def data(self, inputs: Any, are_maps: bool) -> FineTuningData:
        """Return the images of the case as pixels, or as maps at the cut."""
        given = self.given
        return FineTuningData(Task.MULTICLASS, len(given.labels), inputs, given.truth, are_maps)

    def ours(self, data: FineTuningData, train: Indices, validation: Indices) -> Timed:
        """Fine-tune as the service does."""
        _drop_networks()
        ends: list[float] = []
        passage = Passage(lambda number, metrics: ends.append(time.perf_counter()))
        fit = FitTask(train, validation, self._epochs, SEED, passage)
        tuned = fine_tuning.fine_tune(self.recipe, data, self.weights, self.head, fit)
        return Timed(np.diff(ends).tolist(), tuned.trained.history)

    def bare(self, data: FineTuningData, steps: int, **arguments: Any) -> Timed:
        """Fine-tune the same layers by `keras.Model.fit` alone; `arguments` are those of `fit` that have the data."""
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
        return Timed(np.diff(ends).tolist(), epochs)

    @property
    def _epochs(self) -> int:
        return self.recipe.fine_tune.epochs


def step(trial: Trial, pairs: int) -> dict[str, Any]:
    """Measure our training step against the bare one."""
    truth = trial.given.truth
    ours, bare = [], []
    with trial.maps() as mapped:
        maps = np.array(mapped)
        data = trial.data(maps, are_maps=True)
        for _ in range(pairs):
            ours.append(trial.ours(data, np.arange(len(maps)), NONE))
            bare.append(trial.bare(data, -(-len(maps) // BATCH), x=maps, y=truth, batch_size=BATCH))
    return {
        "pairs": pairs,
        "seconds_epoch_ours": spread([float(np.median(timed.epochs_s)) for timed in ours]),
        "seconds_epoch_bare": spread([float(np.median(timed.epochs_s)) for timed in bare]),
        "ratio_to_bare_fit": spread(
            [float(np.median(one.epochs_s) / np.median(other.epochs_s)) for one, other in zip(ours, bare, strict=True)]
        ),
        "aim": "<= 1.05",
    }


def cut(trial: Trial, folds: Sequence[Fold]) -> dict[str, Any]:
    """Measure the frozen part gone through once against gone through in every epoch."""
    given = trial.given
    cached, plain = [], []
    trial.engine.maps(given.pixels[:BATCH])
    started = time.perf_counter()
    with trial.maps() as maps:
        once_s = time.perf_counter() - started
        pixels = trial.data(given.pixels, are_maps=False)
        for fold in folds:
            cached.append(trial.ours(trial.data(maps, are_maps=True), fold.train, fold.test))
            rows = Rows(given.pixels, given.truth, fold.train, BATCH, SEED)
            watched = (given.pixels[fold.test], given.truth[fold.test])
            plain.append(trial.bare(pixels, len(rows), x=rows, validation_data=watched, shuffle=False))
    ratios = [
        sum(other.epochs_s) / (once_s / len(folds) + sum(one.epochs_s))
        for one, other in zip(cached, plain, strict=True)
    ]
    limit = _limit(trial, folds, len(cached[0].epochs_s))
    loss_difference, accuracy_difference = (_difference(cached, plain, name) for name in ("val_loss", "val_accuracy"))
    return {
        "seconds_once": round(once_s, 2),
        "seconds_cached": round(once_s + sum(sum(timed.epochs_s) for timed in cached), 2),
        "seconds_plain": round(sum(sum(timed.epochs_s) for timed in plain), 2),
        "ratio": spread(ratios),
        "limit": round(limit, 2),
        "share_of_limit": spread([ratio / limit for ratio in ratios]),
        "largest_relative_difference_val_loss": loss_difference,
        "largest_difference_val_accuracy": accuracy_difference,
        "metrics_are_equal": loss_difference <= TOLERANCE and accuracy_difference == 0,
        "aim": "share_of_limit >= 0.85, metrics_are_equal",
    }


def _drop_networks() -> None:
    """Drop the networks of earlier runs: they hold themselves in cycles."""
    keras.utils.clear_session()
    gc.collect()


def _limit(trial: Trial, folds: Sequence[Fold], epochs: int) -> float:
    """Return what the cut saves at most, by the formula above."""
    recipe = trial.recipe
    whole = backbones.build_network(recipe.backbone, recipe.image_size)
    boundary = CATALOGUE[recipe.backbone].cut_before(recipe.unfreeze)
    assert boundary is not None
    front = keras.Model(whole.input, backbones.cut_layer(whole, recipe.backbone, boundary).output)
    frozen = multiply_adds(front)
    learning = multiply_adds(whole) - frozen
    learned = sum(epochs * (3 * len(fold.train) + len(fold.test)) for fold in folds) * learning
    again = sum(epochs * (len(fold.train) + len(fold.test)) for fold in folds) * frozen
    return (again + learned) / (len(trial.given.truth) * frozen + learned)


def _difference(cached: Sequence[Timed], plain: Sequence[Timed], name: str) -> float:
    """Return how far a metric of any fold and epoch differs at most; a loss relative to its value."""
    ours, theirs = (np.array([[epoch[name] for epoch in timed.history] for timed in side]) for side in (cached, plain))
    return float(np.max(np.abs(ours - theirs) / (theirs if name == "val_loss" else 1.0)))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are timed, after the first")
    parser.add_argument("--backbone", type=BackboneName, choices=[case.backbone for case in CASES])
    parser.add_argument("--size", type=int)
    parser.add_argument("--data", type=Path)
    wanted = parser.parse_args()
    figures: dict[str, Any] = {
        "images": wanted.images,
        "batch": BATCH,
        "folds": wanted.folds,
        "epochs": wanted.epochs,
    }
    rows = []
    for case in CASES:
        if wanted.backbone not in (None, case.backbone):
            continue
        case = Case(case.backbone, case.unfreeze, wanted.size or case.size)
        boundary = CATALOGUE[case.backbone].cut_before(case.unfreeze)
        assert boundary is not None
        what = f"{CATALOGUE[case.backbone].title} from {case.unfreeze} at {case.size} px, {wanted.images} images"
        with ground(case.backbone, boundary, case.size, wanted.images, wanted.data) as given:
            trial = Trial(case, given, 1 + wanted.epochs)
            everything = np.arange(len(given.truth))
            one_hot = np.eye(len(given.labels), dtype=bool)[given.truth]
            options = {"k": wanted.folds, "repeats": 1, "validation_fraction": 0.0, "seed": SEED}
            folds = make_folds(everything, given.truth, one_hot, everything, NONE, **options)
            measured = {"step": step(trial, wanted.pairs), "cut": cut(trial, folds)}
        figures[what] = measured
        rows += _rows(what, measured, wanted)
    report("tuning", figures)
    table(rows, f"{len(os.sched_getaffinity(0))} processors ({processor()})")


def _rows(what: str, measured: dict[str, dict[str, Any]], wanted: argparse.Namespace) -> list[tuple[str, str, str]]:
    ratio = measured["step"]["ratio_to_bare_fit"]
    saved = measured["cut"]
    least, most = (saved["share_of_limit"][name] for name in ("min", "max"))
    return [
        (
            f"a training step against a bare `keras.Model.fit` on the same arrays, {what}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f} in {wanted.pairs} pairs)",
            "at most 1.05",
        ),
        (
            f"the frozen part once against in each of {wanted.folds} folds × {wanted.epochs} epochs, {what}",
            f"{saved['ratio']['median']:.2f}; its limit is {saved['limit']}, of which it reaches "
            f"{saved['share_of_limit']['median']:.2f} ({least:.2f} to {most:.2f}); metrics "
            f"{'equal' if saved['metrics_are_equal'] else 'DIFFER'}",
            "at least 0.85 of the limit, same metrics",
        ),
    ]


if __name__ == "__main__":
    main()
