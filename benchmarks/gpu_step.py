"""Measures fine-tuning of each backbone on a GPU, with Keras on JAX: images per second and share of the peak rate.

All layers are trained at the default image size, compiled, and in bfloat16 on a GPU. The images are in memory, so that
nothing is decoded. The batch size is doubled until memory runs out or the speed stops growing. The first epoch, in
which JAX compiles, does not count. A training step takes 3 · 2 floating-point operations for each multiply-add of the
forward pass, because the backward pass computes the gradients of the inputs and of the weights.

Run as `KERAS_BACKEND=jax python -m benchmarks.gpu_step [--backbone vgg16] [--batch 64] [--steps 20] [--peak 989e12]
[--size 96]`. It needs no TensorFlow and no OpenVINO.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any

import numpy as np

try:
    import jax
    import keras

    from benchmarks.figures import report, spread, table
    from benchmarks.networks import NONE, calibrated, fine_tuning_case, first_head, multiply_adds
    from recipes.catalogue import ALL, CATALOGUE, BackboneName
    from recipes.recipe import Task
    from training.fitting.fine_tuning import FineTuningData, fine_tune
    from training.fitting.fit_task import FitTask
    from training.fitting.training_loop import FitHooks
    from training.networks import backbones
except ImportError as error:
    sys.exit(
        f"{error}. Install jax (for the GPU: jax[cuda13]), keras, h5py, pillow, pydantic and safetensors, and run this "
        "with KERAS_BACKEND=jax."
    )

CLASSES = 10
IMAGES = 256
LARGEST_BATCH = 4096
# The search ends when a larger batch is not faster by at least this factor.
LEAST_GAIN = 1.03
FLOP_PER_MULTIPLY_ADD = 2 * 3


def measure(name: BackboneName, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one backbone at its best batch."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    weights = calibrated(name, pixels[:16])
    forward = multiply_adds(backbones.build_network(name, size))
    best: dict[str, Any] = {}
    batch = args.batch
    while batch <= LARGEST_BATCH:
        try:
            rates = images_per_s(name, weights, pixels, batch, args.steps, args.epochs)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        rate = float(np.median(rates))
        print(f"{name.value} at {size} px, batch {batch}: {rate:.1f} images/s", file=sys.stderr, flush=True)
        gain = rate / best["images_per_s"]["median"] if best else np.inf
        if gain > 1:
            best = {
                "size": size,
                "batch": batch,
                "images_per_s": spread(rates),
                "giga_multiply_adds_forward": round(forward / 1e9, 3),
                "share_of_peak": rate * forward * FLOP_PER_MULTIPLY_ADD / args.peak,
            }
        if gain < LEAST_GAIN:
            break
        batch *= 2
    return best


def images_per_s(
    name: BackboneName, weights: bytes, pixels: np.ndarray, batch: int, steps: int, epochs: int
) -> list[float]:
    """Fine-tune as the service does, and return the images per second of each epoch except the first."""
    keras.utils.clear_session()
    gc.collect()
    recipe = fine_tuning_case(name, ALL, pixels.shape[1], batch, 1 + epochs)
    targets = np.arange(len(pixels)) % CLASSES
    width = CATALOGUE[name].cuts[CATALOGUE[name].last_cut]
    features = np.random.default_rng(0).normal(size=(len(pixels), width)).astype(np.float32)
    ends: list[float] = []
    data = FineTuningData(Task.MULTICLASS, CLASSES, pixels, targets, are_maps=False)
    hooks = FitHooks(lambda number, metrics: ends.append(time.perf_counter()))
    fit = FitTask(np.resize(np.arange(len(pixels)), batch * steps), NONE, 1 + epochs, 0, hooks)
    fine_tune(recipe, data, weights, first_head(recipe, features, targets), fit)
    return [batch * steps / float(seconds) for seconds in np.diff(ends)]


def main() -> None:
    """Measure the chosen backbones and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=BackboneName, choices=list(BackboneName), help="by default all")
    parser.add_argument("--size", type=int, help="by default each backbone's own")
    parser.add_argument("--batch", type=int, default=64, help="the first that is tried")
    parser.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="epochs that are timed, after the first")
    parser.add_argument("--peak", type=float, default=989e12, help="dense bfloat16 FLOP/s; by default an H200's")
    args = parser.parse_args()
    if keras.backend.backend() != "jax":
        sys.exit(f"Keras runs on {keras.backend.backend()}. This benchmark needs JAX: set KERAS_BACKEND=jax.")
    chip = jax.devices()[0].device_kind
    figures: dict[str, Any] = {"chip": chip, "peak_flop_per_s": args.peak}
    rows = []
    for name in [args.backbone] if args.backbone else BackboneName:
        size = args.size or CATALOGUE[name].size
        found = measure(name, size, args)
        if not found:
            sys.exit(f"The GPU has too little memory for batches of {args.batch}. Give a smaller --batch.")
        figures[name.value] = found
        rows.append(
            (
                f"a fine-tuning step of all of {CATALOGUE[name].title} at {size} px, batch {found['batch']}, Keras on "
                "JAX",
                f"{found['images_per_s']['median']:.0f} images/s, {found['share_of_peak']:.2f} of the chip's rate",
                "–",
            )
        )
        report("gpu_step", figures)
    table(rows, chip)


if __name__ == "__main__":
    main()
