"""A network that has learned as it is served against the one in Keras, on the same original files.

The network learns as the service does it, is exported and bundled; then each file goes once through the predictor
behind the endpoint (decoding, OpenVINO, the head in NumPy) and once through Keras, on pixels decoded by the same rule.
No label may differ; the largest difference of a probability is told.

Run as `python -m benchmarks.served [--backbone vgg16] [--unfreeze block5] [--size 64] [--images 200] [--epochs 3]
[--data archive.zip]`; with `--from-scratch` it is a CNN that begins at random.
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
from benchmarks.figures import processor, report, table
from benchmarks.ground import LIMITS, Ground, ground
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
from training.fitting.training_loop import Passage
from training.networks import backbones, scratch_networks
from training.networks.export import export

_BATCH = 16
_AT_ONCE = 32
_SHELF_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Subject:
    """What has learned: by Keras its probabilities [N, classes] and its network, and the head on it."""

    title: str
    by_keras: Float32
    network: Any
    layers: tuple[Dense, ...]
    facts: dict[str, Any]


def tuned(given: Ground, wanted: argparse.Namespace) -> Subject:
    """Fine-tune a backbone."""
    cut = CATALOGUE[wanted.backbone].last_cut
    recipe = fine_tuning_case(wanted.backbone, wanted.unfreeze or cut, wanted.size, _BATCH, wanted.epochs)
    frozen = OpenVinoEngine(given.store.path(given.backbone), Precision.FLOAT32, given.threads)
    features = frozen.features(given.pixels)
    head = first_head(recipe, features, given.truth)
    everything = np.arange(len(given.truth))
    data = FineTuningData(Task.MULTICLASS, len(given.labels), given.pixels, given.truth, are_maps=False)
    fit = FitTask(everything, NONE, wanted.epochs, 0, _NOBODY)
    learned = fine_tune(recipe, data, given.store.read(given.weights), head, fit)
    by_keras = heads.probabilities(Task.MULTICLASS, learned.logits(everything)).astype(np.float32)
    before = heads.probabilities(Task.MULTICLASS, heads.logits(head.layers, features))
    facts = {
        "unfreeze": recipe.unfreeze,
        "largest_change_of_a_probability_by_fine_tuning": float(np.abs(by_keras - before).max()),
    }
    network = backbones.build_backbone(wanted.backbone, cut, wanted.size, learned.network())
    return Subject(CATALOGUE[wanted.backbone].title, by_keras, network, learned.layers, facts)


def grown(given: Ground, wanted: argparse.Namespace) -> Subject:
    """Let the CNN learn that a recipe has by default."""
    counts = [ClassCount(label, 100, 100) for label in given.labels]
    recipe = fill(Recipe(mode=Mode.FROM_SCRATCH, image_size=wanted.size), Task.MULTICLASS, counts)
    assert isinstance(recipe, FromScratchRecipe)
    everything = np.arange(len(given.truth))
    data = FitData(Task.MULTICLASS, len(given.labels), given.pixels, given.truth)
    learned = fit_from_scratch(recipe, data, FitTask(everything, NONE, wanted.epochs, 0, _NOBODY))
    by_keras = heads.probabilities(Task.MULTICLASS, learned.logits(everything)).astype(np.float32)
    network = scratch_networks.build_feature_network(recipe.network, wanted.size, learned.network())
    return Subject(
        "CNN from scratch", by_keras, network, learned.layers, {"largest_probability": float(by_keras.max())}
    )


_NOBODY = Passage(lambda number, metrics: None)


def as_served(given: Ground, size: int, subject: Subject) -> Float32:
    """Return the probabilities [N, classes] that the predictor behind the endpoint gives for the original files."""
    digest = given.store.put(export(subject.network, given.threads, given.pixels[:_BATCH]).onnx)
    engine = OpenVinoEngine(given.store.path(digest), Precision.FLOAT32, given.threads)
    golden = given.pixels[:1]
    bundle = Bundle(
        task=Task.MULTICLASS,
        labels=tuple(given.labels),
        backbone=digest,
        engine=engine.name,
        precision=Precision.FLOAT32,
        image_rule=IMAGE_RULE,
        size=size,
        resize=Resize.SQUASH,
        layers=subject.layers,
        golden_input=golden,
        golden_output=heads.logits(subject.layers, engine.features(golden)),
    )
    predictor = Shelf(given.store, given.threads, _SHELF_BYTES).predictor(given.store.put(bundle.dump()))
    served = []
    for start in range(0, len(given.rows), _AT_ONCE):
        files = [given.store.read(row.sha256) for row in given.rows[start : start + _AT_ONCE]]
        predictions = predictor.predict(files, LIMITS, deadline_s=600)
        served += [one.probabilities for one in predictions if isinstance(one, ClassPrediction)]
    return np.array([[probabilities[label] for label in bundle.labels] for probabilities in served], np.float32)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=BackboneName, choices=list(BackboneName), default=BackboneName.VGG16)
    parser.add_argument("--unfreeze")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data", type=Path)
    wanted = parser.parse_args()
    cut = CATALOGUE[wanted.backbone].last_cut
    with ground(wanted.backbone, cut, wanted.size, wanted.images, wanted.data) as given:
        subject = grown(given, wanted) if wanted.from_scratch else tuned(given, wanted)
        by_service = as_served(given, wanted.size, subject)
    flips = int((by_service.argmax(axis=1) != subject.by_keras.argmax(axis=1)).sum())
    difference = float(np.abs(by_service - subject.by_keras).max())
    report(
        "served-from-scratch" if wanted.from_scratch else f"served-{wanted.backbone.value}",
        {
            "images": len(by_service),
            "size": wanted.size,
            "epochs": wanted.epochs,
            "labels_that_differ": flips,
            "largest_difference_of_a_probability": difference,
            **subject.facts,
            "aim": "labels_that_differ = 0",
        },
    )
    what = f"labels that differ between the served {subject.title} and Keras' on the same files"
    where = f"{len(os.sched_getaffinity(0))} processors ({processor()})"
    table([(what, f"{flips} of {len(by_service)}; probabilities by at most {difference:.1e}", "0")], where)


if __name__ == "__main__":
    main()
