"""A fine-tuned network as it is served against the Keras network that learned, on the same original files.

The network learns as the service does it, is exported and bundled; then each file goes once through the predictor
behind the endpoint (decoding, OpenVINO, the head in NumPy) and once through Keras, on pixels decoded by the same rule.
No label may differ; the largest difference of a probability is told.

Run as `python -m benchmarks.served [--backbone vgg16] [--unfreeze block5] [--size 64] [--images 200] [--epochs 3]
[--data archive.zip]`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from artifacts.bundle import Bundle
from artifacts.catalogue import CATALOGUE, BackboneName
from artifacts.images import IMAGE_RULE
from artifacts.recipe import Precision, Resize, Task
from benchmarks.figures import processor, report, table
from benchmarks.ground import LIMITS, ground
from benchmarks.networks import NONE, fine_tuning, first_head
from inference import heads
from inference.engine import OpenVinoEngine
from inference.predictor import ClassPrediction
from inference.shelf import Shelf
from training import backbones, finetune
from training.epochs import Passage
from training.export import export
from training.finetune import Material

_BATCH = 16
_AT_ONCE = 32
_SHELF_BYTES = 4 * 1024**3


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=BackboneName, choices=list(BackboneName), default=BackboneName.VGG16)
    parser.add_argument("--unfreeze")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data", type=Path)
    wanted = parser.parse_args()
    cut = CATALOGUE[wanted.backbone].last_cut
    recipe = fine_tuning(wanted.backbone, wanted.unfreeze or cut, wanted.size, _BATCH, wanted.epochs)
    with ground(wanted.backbone, cut, wanted.size, wanted.images, wanted.data) as given:
        weights = given.store.read(given.weights)
        frozen = OpenVinoEngine(given.store.path(given.backbone), Precision.FLOAT32, given.threads)
        head = first_head(recipe, frozen.features(given.pixels), given.truth)
        everything = np.arange(len(given.truth))
        tuned = finetune.tune(
            recipe,
            Task.MULTICLASS,
            weights,
            Material(given.pixels, are_maps=False),
            head,
            given.truth,
            everything,
            NONE,
            epochs=wanted.epochs,
            seed=0,
            passage=Passage(lambda number, metrics: None),
        )
        by_keras = heads.probabilities(Task.MULTICLASS, tuned.logits(everything))
        before = heads.probabilities(Task.MULTICLASS, heads.logits(head.layers, frozen.features(given.pixels)))
        moved = float(np.abs(by_keras - before).max())

        network = backbones.backbone(wanted.backbone, cut, wanted.size, tuned.network())
        digest = given.store.put(export(network, given.threads, given.pixels[:_BATCH]).onnx)
        engine = OpenVinoEngine(given.store.path(digest), Precision.FLOAT32, given.threads)
        golden = given.pixels[:1]
        bundle = Bundle(
            task=Task.MULTICLASS,
            labels=tuple(given.labels),
            backbone=digest,
            engine=engine.name,
            precision=Precision.FLOAT32,
            image_rule=IMAGE_RULE,
            size=wanted.size,
            resize=Resize.SQUASH,
            layers=tuned.layers,
            golden_input=golden,
            golden_output=heads.logits(tuned.layers, engine.features(golden)),
        )
        predictor = Shelf(given.store, given.threads, _SHELF_BYTES).predictor(given.store.put(bundle.dump()))
        served = []
        for start in range(0, len(given.rows), _AT_ONCE):
            files = [given.store.read(row.sha256) for row in given.rows[start : start + _AT_ONCE]]
            predictions = predictor.predict(files, LIMITS, deadline_s=600)
            served += [one.probabilities for one in predictions if isinstance(one, ClassPrediction)]
    by_service = np.array([[probabilities[label] for label in bundle.labels] for probabilities in served])
    flips = int((by_service.argmax(axis=1) != by_keras.argmax(axis=1)).sum())
    difference = float(np.abs(by_service - by_keras).max())
    report(
        f"served-{wanted.backbone.value}",
        {
            "images": len(by_keras),
            "unfreeze": recipe.unfreeze,
            "size": wanted.size,
            "epochs": wanted.epochs,
            "labels_that_differ": flips,
            "largest_difference_of_a_probability": difference,
            "largest_change_of_a_probability_by_fine_tuning": moved,
            "aim": "labels_that_differ = 0",
        },
    )
    what = f"labels that differ between the served {CATALOGUE[wanted.backbone].title} and Keras' on the same files"
    where = f"{len(os.sched_getaffinity(0))} processors ({processor()})"
    table([(what, f"{flips} of {len(by_keras)}; probabilities by at most {difference:.1e}", "0")], where)


if __name__ == "__main__":
    main()
