"""What all folds of a run read: networks as files of the store, each made only once, and features through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from artifacts.features import FeatureCache, Features, FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.filled import BackboneRecipe
from recipes.layers import Sides
from recipes.recipe import Precision
from training.data.arrays import ReportProgress
from training.data.extraction import Extraction, extract
from training.data.pixels import PixelSource
from training.data.split import Indices
from training.networks import backbones
from training.networks.export import EXPORT_VERSION, export
from training.networks.quantisation import calibration_size, quantise

# The sample that a network is calibrated on depends on the data set alone, whatever the recipe's seed.
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Workspace:
    """Where an experiment runs: folders, limits and threads.

    `features` and `pixels` hold caches, the latter (with maps) up to about `pixels_bytes`.
    """

    store: Store
    features: Path
    pixels: Path
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int


@dataclass(frozen=True)
class BackboneKey:
    """What an exported backbone was made from."""

    network: BackboneName
    weights: Digest
    cut: str
    size: int
    export_version: int = EXPORT_VERSION


class Registry(Protocol):
    """What the outside knows of networks, and is told of new ones; and of what this run has settled on."""

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        """Return the digest of the export that counts for a key, or None."""
        ...

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Tell of an export; return the digest that counts, which may be an earlier one's."""
        ...

    def find_quantised(self, backbone: Digest) -> Digest | None:
        """Return the quantised copy of a backbone that this run is to use, or None if it is to make one."""
        ...

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Tell of a quantised copy; return the digest that counts for this run."""
        ...

    def find_pick(self) -> dict[str, Any] | None:
        """Return where this run's features come from, if it has chosen before it was interrupted."""
        ...

    def set_pick(self, facts: dict[str, Any]) -> None:
        """Tell where this run's features come from, and what was tried for that."""
        ...

    def find_precision_decision(self) -> dict[str, Any] | None:
        """Return the facts of the precision that this run decided on before it was interrupted, or None."""
        ...

    def set_precision_decision(self, facts: dict[str, Any]) -> None:
        """Record which precision this run has decided on, and what it measured for that."""
        ...


@dataclass(frozen=True)
class FrozenBackbone:
    """A network that stays frozen in one precision, and the features of every image through it, float32 [N, D]."""

    precision: Precision
    backbone: Digest
    engine: OpenVinoEngine
    features: Features
    extraction: Extraction


class NetworkFiles:
    """The networks that a recipe needs."""

    def __init__(self, recipe: BackboneRecipe, weights: Digest, place: Workspace, registry: Registry) -> None:
        self._recipe = recipe
        self._weights = weights
        self._place = place
        self._registry = registry

    def export_cut(self, cut: str) -> Digest:
        """Return the network up to a cut, exporting it if nobody has."""
        recipe, store = self._recipe, self._place.store
        backbone, size = recipe.backbone, recipe.image_size
        key = BackboneKey(backbone, self._weights, cut, size)
        digest = self._registry.find_backbone(key)
        if digest is None:
            model = backbones.build_backbone(backbone, cut, size, store.read(self._weights))
            made = export(model, self._place.threads)
            digest = self._registry.add_backbone(key, store.put(made.onnx), made.facts())
        return digest

    def quantise(
        self,
        backbone: Digest,
        images: Sequence[Digest],
        source: PixelSource,
        report: ReportProgress,
        begin: Callable[[], None] = lambda: None,
    ) -> Digest:
        """Return the quantised copy of an exported network.

        If nobody has made it, `begin` is called and it is calibrated on a sample of `images`.
        """
        digest = self._registry.find_quantised(backbone)
        if digest is None:
            begin()
            store, size = self._place.store, self._recipe.image_size
            names = [images[row] for row in calibration_rows(np.arange(len(images)), size)]
            pixels = np.concatenate([batch for _, batch in source.batches(names)])
            made = quantise(store.read(backbone), pixels, report)
            digest = self._registry.add_quantised(backbone, store.put(made.onnx), made.facts())
        return digest

    def engine(self, network: Digest, precision: Precision) -> OpenVinoEngine:
        """Return an engine for a stored network. Raises PrecisionUnsupported."""
        return OpenVinoEngine(self._place.store.verified_path(network), precision, self._place.threads)

    def feature_space(self, network: Digest, precision: Precision) -> FeatureSpace:
        """Return what features through a network depend on."""
        return FeatureSpace(IMAGE_RULE, self._recipe.image_size, self._recipe.resize, network, precision)

    def frozen_backbone(
        self,
        network: Digest,
        precision: Precision,
        images: Sequence[Digest],
        source: PixelSource,
        report: ReportProgress,
    ) -> FrozenBackbone:
        """Return a network with the features of every image, computing those that no run has computed before."""
        engine = self.engine(network, precision)
        width = CATALOGUE[self._recipe.backbone].cuts[self._recipe.features_from]
        cache = FeatureCache(self._place.features, self.feature_space(network, precision), width)
        extraction = extract(images, engine, cache, source, report)
        cache.close()
        return FrozenBackbone(precision, network, engine, cache.rows(images), extraction)


def calibration_rows(rows: Indices, size: Sides) -> Indices:
    """Return some of the rows, in their order, to calibrate a network for images of that size on."""
    count = min(len(rows), calibration_size(size))
    return np.sort(np.random.default_rng(_SAMPLE_SEED).choice(rows, count, replace=False))
