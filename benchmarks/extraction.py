"""Measures what decoding, the store and the cache cost: extraction compared with the engine alone.

Run as `python -m benchmarks.extraction [--images 512] [--size 96] [--data archive.zip]`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from artifacts.features import FeatureCache, FeatureSpace
from artifacts.images import IMAGE_RULE
from benchmarks.bench_data import LIMITS, prepare_bench_data
from benchmarks.figures import report, spread
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.recipe import Precision, Resize
from training.data.extraction import extract
from training.data.pixels import BATCH, ImageDecoder


def main() -> None:
    """Measure extraction and the engine alone in turns, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=BackboneName, default=BackboneName.VGG16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    cut = CATALOGUE[args.backbone].last_cut
    with prepare_bench_data(args.backbone, cut, args.size, args.images, args.data) as bench:
        engine = OpenVinoEngine(bench.store.path(bench.backbone), Precision.FLOAT32, bench.threads)
        digests = [row.sha256 for row in bench.rows]
        pixels = bench.pixels
        engine.features(pixels[:BATCH])
        bare, whole = [], []
        for _ in range(args.pairs):
            started = time.perf_counter()
            for start in range(0, len(pixels), BATCH):
                engine.features(pixels[start : start + BATCH])
            bare.append(time.perf_counter() - started)

            folder = bench.folder / "features"
            shutil.rmtree(folder, ignore_errors=True)
            started = time.perf_counter()
            space = FeatureSpace(IMAGE_RULE, args.size, Resize.SQUASH, bench.backbone, Precision.FLOAT32)
            cache = FeatureCache(folder, space, CATALOGUE[args.backbone].cuts[cut])
            decoder = ImageDecoder(bench.store, args.size, Resize.SQUASH, LIMITS, bench.threads)
            extract(digests, engine, cache, decoder, lambda done, total: None)
            cache.close()
            whole.append(time.perf_counter() - started)
        report(
            "extraction",
            {
                "network": f"{args.backbone.value} at {args.size} px, float32",
                "images": len(pixels),
                "images_per_s_bare_engine": spread([len(pixels) / spent for spent in bare]),
                "images_per_s_extraction": spread([len(pixels) / spent for spent in whole]),
                "ratio_to_bare_engine": spread([one / other for one, other in zip(bare, whole, strict=True)]),
                "aim": ">= 0.9",
            },
        )


if __name__ == "__main__":
    main()
