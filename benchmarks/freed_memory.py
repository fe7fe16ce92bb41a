"""What it costs that TensorFlow has glibc give freed memory back at once: fine-tuning with and without our cure.

TensorFlow sets glibc's M_TRIM_THRESHOLD to 128 KiB when it first reads from a generator, as Keras does for a
`PyDataset`; `training.memory.keep_freed` undoes it after the first batch. In pairs, in one process: VGG16 from block3
at 32 px, batch 16, on maps computed once. Each side's first epoch, in which Keras traces, does not count.

Run as `python -m benchmarks.freed_memory [--images 160] [--pairs 3] [--epochs 3]`.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import time
from typing import Any

import numpy as np

from artifacts.catalogue import BackboneName
from artifacts.recipe import Task
from benchmarks.figures import processor, report, spread, table
from benchmarks.networks import NONE, fine_tuning, first_head
from training import backbones, finetune, memory
from training.epochs import Passage
from training.finetune import Material

SIZE, BATCH = 32, 16
# Of malloc.h, and what TensorFlow sets; glibc's other threshold stays where it was once one of them is set.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, TENSORFLOWS = -1, -3, 128 * 1024


def give_back_at_once() -> None:
    """Set what TensorFlow sets."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, TENSORFLOWS)
    libc.mallopt(M_TRIM_THRESHOLD, TENSORFLOWS)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that are timed, after the first")
    wanted = parser.parse_args()
    recipe = fine_tuning(BackboneName.VGG16, "block3", SIZE, BATCH, 1 + wanted.epochs)
    weights = backbones.random_weights(BackboneName.VGG16)
    pixels = np.random.default_rng(0).integers(0, 256, (wanted.images, SIZE, SIZE, 3), dtype=np.uint8)
    rows = np.arange(wanted.images)
    truth = rows % 10
    whole, cut = (backbones.backbone(BackboneName.VGG16, name, SIZE, weights) for name in ("block5", "block2"))
    head = first_head(recipe, whole.predict(pixels, verbose=0)["features"], truth)
    material = Material(cut.predict(pixels, verbose=0)["maps"], are_maps=True)
    keep_freed = memory.keep_freed

    def epochs(cure: Any) -> tuple[float, float]:
        """Return the seconds of an epoch and the pages that it took from the system."""
        memory.keep_freed = cure
        seen: list[tuple[float, int]] = []

        def look(number: int, metrics: dict[str, float]) -> None:
            seen.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))

        options = {"epochs": 1 + wanted.epochs, "seed": 0, "passage": Passage(look)}
        finetune.tune(recipe, Task.MULTICLASS, weights, material, head, truth, rows, NONE, **options)
        (began, faults_before), (ended, faults) = seen[0], seen[-1]
        return (ended - began) / wanted.epochs, (faults - faults_before) / wanted.epochs

    pairs = [(epochs(give_back_at_once), epochs(keep_freed)) for _ in range(wanted.pairs)]
    ratios = spread([without[0] / cured[0] for without, cured in pairs])
    faults = [float(np.median([pair[side][1] for pair in pairs])) for side in (0, 1)]
    figures = {
        "images": wanted.images,
        "batch": BATCH,
        "seconds_epoch_without": spread([without[0] for without, _ in pairs]),
        "seconds_epoch": spread([cured[0] for _, cured in pairs]),
        "ratio": ratios,
        "pages_epoch_without": faults[0],
        "pages_epoch": faults[1],
    }
    report("freed_memory", figures)
    what = f"{ratios['median']:.2f} ({ratios['min']:.2f} to {ratios['max']:.2f} in {wanted.pairs} pairs)"
    table([("an epoch of fine-tuning without keeping freed memory against with it", what, "-")], processor())


if __name__ == "__main__":
    main()
