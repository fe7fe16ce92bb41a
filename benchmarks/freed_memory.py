"""Measures what `inference.freed_memory.keep_freed` saves: epochs of fine-tuning without it and with it.

TensorFlow sets glibc's M_TRIM_THRESHOLD to 128 KiB when it first reads from a generator, as Keras does for a
`PyDataset`. `keep_freed` undoes that after the first batch. Both are measured in pairs, each in a fresh process: VGG16
from block3 at 32 px, batch 16, on maps computed once. The first epoch, in which Keras traces, does not count.

Run as `python -m benchmarks.freed_memory [--images 160] [--pairs 3] [--epochs 3]`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.figures import processor, report, spread, table

SIZE, BATCH = 32, 16


@dataclass(frozen=True)
class EpochCost:
    """The cost of an epoch: its seconds, its page faults, and the peak memory of the process in bytes."""

    seconds: float
    pages: float
    greatest_bytes: int


def measure(is_kept: bool, images: int, epochs: int) -> EpochCost:
    """Measure epochs with or without `keep_freed`, in a new process, and return the cost of one."""
    from benchmarks.networks import NONE, fine_tuning_case, first_head
    from inference import freed_memory
    from recipes.catalogue import BackboneName
    from recipes.recipe import Task
    from training.fitting.fine_tuning import FineTuningData, fine_tune
    from training.fitting.fit_task import FitTask
    from training.fitting.training_loop import FitHooks
    from training.networks import backbones

    if not is_kept:
        freed_memory.keep_freed = lambda: None
    recipe = fine_tuning_case(BackboneName.VGG16, "block3", SIZE, BATCH, 1 + epochs)
    weights = backbones.random_weights(BackboneName.VGG16)
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)
    rows = np.arange(images)
    whole, cut = (backbones.build_backbone(BackboneName.VGG16, name, SIZE, weights) for name in ("block5", "block2"))
    head = first_head(recipe, whole.predict(pixels, verbose=0)["features"], rows % 10)
    maps = cut.predict(pixels, verbose=0)["maps"]
    data = FineTuningData(Task.MULTICLASS, 10, maps, rows % 10, are_maps=True)
    seen: list[tuple[float, int]] = []

    def look(number: int, metrics: dict[str, float]) -> None:
        seen.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))

    fine_tune(recipe, data, weights, head, FitTask(rows, NONE, 1 + epochs, 0, FitHooks(look)))
    (began, pages_before), (ended, pages) = seen[0], seen[-1]
    greatest_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return EpochCost((ended - began) / epochs, (pages - pages_before) / epochs, greatest_bytes)


def main() -> None:
    """Measure in pairs and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are timed, after the first")
    args = parser.parse_args()
    sides: dict[bool, list[EpochCost]] = {False: [], True: []}
    for number in range(args.pairs):
        for is_kept in (False, True) if number % 2 == 0 else (True, False):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                sides[is_kept].append(fresh.apply(measure, (is_kept, args.images, args.epochs)))
    ratios = spread([without.seconds / kept.seconds for without, kept in zip(sides[False], sides[True], strict=True)])
    report(
        "freed_memory",
        {
            "images": args.images,
            "batch": BATCH,
            "without": [asdict(one) for one in sides[False]],
            "with": [asdict(one) for one in sides[True]],
            "ratio": ratios,
        },
    )
    what = f"{ratios['median']:.2f} ({ratios['min']:.2f} to {ratios['max']:.2f} in {args.pairs} pairs)"
    table([("an epoch of fine-tuning without keeping freed memory against with it", what, "-")], processor())


if __name__ == "__main__":
    main()
