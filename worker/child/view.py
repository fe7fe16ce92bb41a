"""Computes a view of a finished run, inside a child process: a list of layers, activations, or a learning curve."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts import bundle as bundles
from artifacts import images, manifest
from artifacts.bucket_store import open_store
from artifacts.bundle import Bundle
from artifacts.images import IMAGE_RULE
from artifacts.store import Digest, Store
from errors import Corrupt, ImageRefused
from recipes.filled import HeadedRecipe, parse_filled
from worker.child.channel import Channel
from worker.messages import ActivationsOrder, LayersOrder, LearningCurveOrder, ViewOrder, ViewOutcome, ViewProgress

if TYPE_CHECKING:
    from artifacts.features import Features

_REPORT_EVERY_S = 1.0


def compute(order: ViewOrder, channel: Channel) -> None:
    """Compute the view that the order names.

    Sends ViewProgress regularly for a learning curve, and ViewOutcome at the end.
    """
    store = open_store(order.store)
    bundle = bundles.load(store.read(order.bundle))
    match order:
        case LayersOrder():
            channel.send(ViewOutcome(file=store.put(_layers(order, store, bundle))))
        case ActivationsOrder():
            channel.send(ViewOutcome(file=store.put(_activations(order, store, bundle))))
        case LearningCurveOrder():
            curve, picture = _learning_curve(order, store, bundle, channel)
            channel.send(ViewOutcome(file=store.put(curve), picture=store.put(picture)))


def _layers(order: LayersOrder, store: Store, bundle: Bundle) -> bytes:
    """Return the layers of the network as JSON: the name, height, width and channels of each layer."""
    from inference.layer_maps import LayerReader

    insight = LayerReader(store.verified_path(bundle.backbone), order.threads)
    return json.dumps([asdict(layer) for layer in insight.layers]).encode()


def _activations(order: ActivationsOrder, store: Store, bundle: Bundle) -> bytes:
    """Return a PNG picture with the activations of one layer for one image."""
    from inference import explain
    from inference.layer_maps import CHANNELS, LayerReader

    try:
        file = store.read(order.image)
        pixels = images.decode(file, bundle.size, bundle.resize, order.image_limits, bit_depth=bundle.bit_depth)
    except ImageRefused as error:
        raise Corrupt(f"Image {order.image} was accepted but cannot be decoded any more: {error.detail}") from error
    insight = LayerReader(store.verified_path(bundle.backbone), order.threads)
    return explain.grid(insight.maps(pixels, order.layer), CHANNELS)


def _learning_curve(order: LearningCurveOrder, store: Store, bundle: Bundle, channel: Channel) -> tuple[bytes, bytes]:
    """Measure the learning curve; return it as JSON, and its picture as PNG."""
    # Files are read before TensorFlow is imported, which takes seconds, so that a missing file is reported at once.
    rows = manifest.load(store.read(order.manifest))
    measured = store.read(order.out_of_fold)
    from safetensors.numpy import load as load_tensors

    from recipes.headline import HEADLINES
    from training import learning_curve
    from training.statistics.comparison import OutOfFoldLogits

    progress = _ViewReporter(channel)
    progress.begin_stage(0.0, _FEATURES_SHARE)
    recipe = parse_filled(order.recipe)
    assert isinstance(recipe, HeadedRecipe), "Expected a head on features. This is a bug."
    subject = learning_curve.MeasuredRun(
        recipe=recipe,
        labels=order.labels,
        rows=rows,
        features=_features(order, store, bundle, [row.sha256 for row in rows], progress),
        measured=OutOfFoldLogits(**load_tensors(measured)),
    )
    progress.begin_stage(_FEATURES_SHARE, 1.0)
    found = learning_curve.measure_learning_curve(subject, progress.report)
    headline = HEADLINES[bundle.task]
    curve = {
        "metric": headline.metric,
        "greater_is_better": headline.is_greater_better,
        "points": [asdict(point) for point in found.points],
        "law": None if found.law is None else asdict(found.law),
        "twice": None if found.twice is None else asdict(found.twice),
        "interval": learning_curve.INTERVAL,
        "sentence": found.sentence,
    }
    return json.dumps(curve).encode(), found.picture


# Share of the features in the progress bar. It is small because features are usually cached.
_FEATURES_SHARE = 0.05


def _features(
    order: LearningCurveOrder, store: Store, bundle: Bundle, digests: Sequence[Digest], progress: _ViewReporter
) -> Features:
    """Return the features of these images from the network of the run; compute those that are not cached."""
    from artifacts.features import FeatureCache, FeatureSpace
    from inference.engine import OpenVinoEngine
    from training.data.extraction import extract
    from training.data.pixels import ImageDecoder

    width = bundle.layers[0].kernel.shape[0]
    size, resize, bit_depth = bundle.size, bundle.resize, bundle.bit_depth
    space = FeatureSpace(IMAGE_RULE, size, resize, bundle.backbone, bundle.precision, bit_depth)
    cache = FeatureCache(Path(order.features), space, width)
    try:
        if cache.missing(digests):
            engine = OpenVinoEngine(store.verified_path(bundle.backbone), bundle.precision, order.threads)
            decoder = ImageDecoder(store, size, resize, order.image_limits, order.threads, bit_depth)
            extract(digests, engine, cache, decoder, lambda done, total: progress.report(done / total))
        return cache.rows(digests)
    finally:
        cache.close()


class _ViewReporter:
    """Sends ViewProgress at most once a second. The remaining time is estimated from the speed of the stage so far."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def begin_stage(self, start: float, end: float) -> None:
        """Begin a stage that covers the progress bar from `start` to `end`, both between 0 and 1."""
        self._start, self._end = start, end
        self._begun_at = time.monotonic()
        self._send(0.0)

    def report(self, share: float) -> None:
        """Send the progress, unless the last message is less than a second old.

        `share` is the finished fraction of the stage, from 0 to 1.
        """
        if time.monotonic() - self._sent_at >= _REPORT_EVERY_S:
            self._send(share)

    def _send(self, share: float) -> None:
        self._sent_at = time.monotonic()
        spent_s = self._sent_at - self._begun_at
        eta_s = spent_s * (1 - share) / share if share > 0 else None
        fraction = self._start + (self._end - self._start) * share
        self._channel.send(ViewProgress(fraction=min(1.0, fraction), eta_s=eta_s))
