"""Computes a view of a finished run, inside a child process: what a layer sees, or what more images would bring."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts import bundle as bundles
from artifacts import images, manifest
from artifacts.bucket_store import open_store
from artifacts.bundle import Bundle
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store, StoreAddress
from errors import Corrupt, ImageRefused
from recipes.filled import HeadedRecipe, parse_filled
from worker.child.channel import Channel

if TYPE_CHECKING:
    from artifacts.features import Features

_SAY_EVERY_S = 1.0


def look(order: Mapping[str, Any], channel: Channel) -> None:
    """Compute what is ordered, sending `progress`, then `outcome` with the digests of what was stored."""
    store = open_store(StoreAddress(**order["store"]))
    bundle = bundles.load(store.read(Digest(order["bundle"])))
    match order["what"]:
        case "layers":
            channel.send("outcome", file=store.put(_layers(order, store, bundle)))
        case "activations":
            channel.send("outcome", file=store.put(_activations(order, store, bundle)))
        case "learning-curve":
            curve, picture = _learning_curve(order, store, bundle, channel)
            channel.send("outcome", file=store.put(curve), picture=store.put(picture))


def _layers(order: Mapping[str, Any], store: Store, bundle: Bundle) -> bytes:
    """Return the layers that can be looked at, as JSON."""
    from inference.layer_maps import LayerReader

    insight = LayerReader(store.verified_path(bundle.backbone), order["threads"])
    return json.dumps([asdict(layer) for layer in insight.layers]).encode()


def _activations(order: Mapping[str, Any], store: Store, bundle: Bundle) -> bytes:
    """Return the picture of what a layer makes of an image, as PNG."""
    from inference import explain
    from inference.layer_maps import CHANNELS, LayerReader

    image = Digest(order["image"])
    try:
        pixels = images.decode(store.read(image), bundle.size, bundle.resize, _limits(order))
    except ImageRefused as error:
        raise Corrupt(f"Image {image} was accepted but cannot be decoded any more: {error.detail}") from error
    insight = LayerReader(store.verified_path(bundle.backbone), order["threads"])
    return explain.grid(insight.maps(pixels, order["layer"]), CHANNELS)


def _learning_curve(order: Mapping[str, Any], store: Store, bundle: Bundle, channel: Channel) -> tuple[bytes, bytes]:
    """Return the curve as JSON and its picture as PNG."""
    # Imported here and now: TensorFlow takes seconds, and what was deleted meanwhile should be told before.
    rows = manifest.load(store.read(Digest(order["manifest"])))
    measured = store.read(Digest(order["out_of_fold"]))
    from safetensors.numpy import load as load_tensors

    from recipes.headline import HEADLINES
    from training import learning_curve
    from training.statistics.comparison import OutOfFoldLogits

    said = _Said(channel)
    said.begin(0.0, _FEATURES_SHARE)
    recipe = parse_filled(order["recipe"])
    assert isinstance(recipe, HeadedRecipe), "Expected a head on features. This is a bug."
    subject = learning_curve.Subject(
        recipe=recipe,
        labels=order["labels"],
        rows=rows,
        features=_features(order, store, bundle, [row.sha256 for row in rows], said),
        measured=OutOfFoldLogits(**load_tensors(measured)),
    )
    said.begin(_FEATURES_SHARE, 1.0)
    found = learning_curve.measure(subject, said.say)
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


# Of the bar: features are cached as a rule.
_FEATURES_SHARE = 0.05


def _features(
    order: Mapping[str, Any], store: Store, bundle: Bundle, digests: Sequence[Digest], said: _Said
) -> Features:
    """Return the features of every image through the run's network, computing those that are not cached any more."""
    from artifacts.features import FeatureCache, FeatureSpace
    from inference.engine import OpenVinoEngine
    from training.data.extraction import extract
    from training.data.pixels import ImageDecoder

    width = bundle.layers[0].kernel.shape[0]
    space = FeatureSpace(IMAGE_RULE, bundle.size, bundle.resize, bundle.backbone, bundle.precision)
    cache = FeatureCache(Path(order["features"]), space, width)
    try:
        if cache.missing(digests):
            engine = OpenVinoEngine(store.verified_path(bundle.backbone), bundle.precision, order["threads"])
            decoder = ImageDecoder(store, bundle.size, bundle.resize, _limits(order), order["threads"])
            extract(digests, engine, cache, decoder, lambda done, total: said.say(done / total))
        return cache.rows(digests)
    finally:
        cache.close()


def _limits(order: Mapping[str, Any]) -> ImageLimits:
    return ImageLimits(**{**order["image_limits"], "formats": tuple(order["image_limits"]["formats"])})


class _Said:
    """Says at most once a second how much is done, and how long the present stage should still take by its speed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def begin(self, start: float, end: float) -> None:
        """Begin a stage, which is this part of the whole."""
        self._start, self._end = start, end
        self._begun_at = time.monotonic()
        self._tell(0.0)

    def say(self, share: float) -> None:
        """Say how much of the stage is done."""
        if time.monotonic() - self._said_at >= _SAY_EVERY_S:
            self._tell(share)

    def _tell(self, share: float) -> None:
        self._said_at = time.monotonic()
        spent_s = self._said_at - self._begun_at
        eta_s = spent_s * (1 - share) / share if share > 0 else None
        fraction = self._start + (self._end - self._start) * share
        self._channel.send("progress", state={"fraction": min(1.0, fraction), "eta_s": eta_s})
