"""Compares the predictions of a served model with those of the same network in Keras, on the same image files.

The network is trained, exported and bundled as in the service. Each file is then predicted twice: by the predictor of
the API (decoding, OpenVINO, the head in NumPy), and by Keras on pixels that were decoded in the same way. No predicted
label may differ. The benchmark reports the largest difference of a probability.

Run as `python -m benchmarks.served [--backbone vgg16] [--unfreeze block5] [--size 64] [--images 200] [--epochs 3]
[--data archive.zip]`. With `--from-scratch` the network is a CNN with random initial weights.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.bundle import Bundle, Dense, Float32
from artifacts.images import IMAGE_RULE
from benchmarks.bench_data import LIMITS, BenchData, prepare_bench_data
from benchmarks.figures import processor, report, table
from benchmarks.networks import NONE, fine_tuning_case, first_head
from inference import heads
from inference.engine import OpenVinoEngine
from inference.predictor import ClassPrediction
from inference.shelf import Shelf
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.filled import FromScratchRecipe
from recipes.recipe import Mode, Precision, Recipe, Resize, Task
from training.fitting.fine_tuning import FineTuningData, fine_tune
from training.fitting.fit_task import FitData, FitTask
from training.fitting.from_scratch import fit_from_scratch
from training.fitting.training_loop import FitHooks
from training.networks import backbones, scratch_networks
from training.networks.export import export

_BATCH = 16
_AT_ONCE = 32
_SHELF_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class FittedCase:
    """A trained network.

    Attributes:
        title: its name in the report.
        by_keras: float32 [N, classes], the probabilities that Keras predicts.
        network: the Keras model before the head.
        layers: the head.
        facts: further figures for the report.
    """

    title: str
    by_keras: Float32
    network: Any
    layers: tuple[Dense, ...]
    facts: dict[str, Any]


def fine_tuned_case(bench: BenchData, args: argparse.Namespace) -> FittedCase:
    """Fine-tune a backbone on the images and return it with its predictions."""
    cut = CATALOGUE[args.backbone].last_cut
    recipe = fine_tuning_case(args.backbone, args.unfreeze or cut, args.size, _BATCH, args.epochs)
    frozen = OpenVinoEngine(bench.store.path(bench.backbone), Precision.FLOAT32, bench.threads)
    features = frozen.features(bench.pixels)
    head = first_head(recipe, features, bench.truth)
    everything = np.arange(len(bench.truth))
    data = FineTuningData(Task.MULTICLASS, len(bench.labels), bench.pixels, bench.truth, are_maps=False)
    fit = FitTask(everything, NONE, args.epochs, 0, _QUIET)
    learned = fine_tune(recipe, data, bench.store.read(bench.weights), head, fit)
    by_keras = heads.probabilities(Task.MULTICLASS, learned.logits(everything)).astype(np.float32)
    before = heads.probabilities(Task.MULTICLASS, heads.logits(head.layers, features))
    facts = {
        "unfreeze": recipe.unfreeze,
        "largest_change_of_a_probability_by_fine_tuning": float(np.abs(by_keras - before).max()),
    }
    network = backbones.build_backbone(args.backbone, cut, args.size, learned.network())
    return FittedCase(CATALOGUE[args.backbone].title, by_keras, network, learned.layers, facts)


def scratch_case(bench: BenchData, args: argparse.Namespace) -> FittedCase:
    """Train the default CNN from scratch on the images and return it with its predictions."""
    counts = [ClassCount(label, 100, 100) for label in bench.labels]
    recipe = fill(Recipe(mode=Mode.FROM_SCRATCH, image_size=args.size), Task.MULTICLASS, counts)
    assert isinstance(recipe, FromScratchRecipe)
    everything = np.arange(len(bench.truth))
    data = FitData(Task.MULTICLASS, len(bench.labels), bench.pixels, bench.truth)
    learned = fit_from_scratch(recipe, data, FitTask(everything, NONE, args.epochs, 0, _QUIET))
    by_keras = heads.probabilities(Task.MULTICLASS, learned.logits(everything)).astype(np.float32)
    network = scratch_networks.build_feature_network(recipe.network, args.size, learned.network())
    return FittedCase(
        "CNN from scratch", by_keras, network, learned.layers, {"largest_probability": float(by_keras.max())}
    )


_QUIET = FitHooks(lambda number, metrics: None)


def as_served(bench: BenchData, size: int, case: FittedCase) -> Float32:
    """Return the probabilities [N, classes] that the API's predictor computes for the image files."""
    digest = bench.store.put(export(case.network, bench.threads, bench.pixels[:_BATCH]).onnx)
    engine = OpenVinoEngine(bench.store.path(digest), Precision.FLOAT32, bench.threads)
    golden = bench.pixels[:1]
    bundle = Bundle(
        task=Task.MULTICLASS,
        labels=tuple(bench.labels),
        backbone=digest,
        engine=engine.name,
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=size,
        resize=Resize.SQUASH,
        layers=case.layers,
        golden_input=golden,
        golden_output=heads.logits(case.layers, engine.features(golden)),
    )
    predictor = Shelf(bench.store, bench.threads, _SHELF_BYTES).predictor(bench.store.put(bundle.dump()))
    served = []
    for start in range(0, len(bench.rows), _AT_ONCE):
        files = [bench.store.read(row.sha256) for row in bench.rows[start : start + _AT_ONCE]]
        predictions = predictor.predict(files, LIMITS, deadline_s=600)
        served += [one.probabilities for one in predictions if isinstance(one, ClassPrediction)]
    return np.array([[probabilities[label] for label in bundle.labels] for probabilities in served], np.float32)


def main() -> None:
    """Compare the predictions of the service and of Keras, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=BackboneName, choices=list(BackboneName), default=BackboneName.VGG16)
    parser.add_argument("--unfreeze")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    cut = CATALOGUE[args.backbone].last_cut
    with prepare_bench_data(args.backbone, cut, args.size, args.images, args.data) as bench:
        case = scratch_case(bench, args) if args.from_scratch else fine_tuned_case(bench, args)
        by_service = as_served(bench, args.size, case)
    flips = int((by_service.argmax(axis=1) != case.by_keras.argmax(axis=1)).sum())
    difference = float(np.abs(by_service - case.by_keras).max())
    report(
        "served-from-scratch" if args.from_scratch else f"served-{args.backbone.value}",
        {
            "images": len(by_service),
            "size": args.size,
            "epochs": args.epochs,
            "labels_that_differ": flips,
            "largest_difference_of_a_probability": difference,
            **case.facts,
            "aim": "labels_that_differ = 0",
        },
    )
    what = f"labels that differ between the served {case.title} and Keras' on the same files"
    where = f"{len(os.sched_getaffinity(0))} processors ({processor()})"
    table([(what, f"{flips} of {len(by_service)}; probabilities by at most {difference:.1e}", "0")], where)


if __name__ == "__main__":
    main()
