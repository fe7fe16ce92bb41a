"""Networks as files of the store, each exported or quantised only once, and the features of a run's images."""

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
from training.data.extraction import extract
from training.data.pixels import PixelSource
from training.data.split import Indices
from training.networks import backbones
from training.networks.export import EXPORT_VERSION, export
from training.networks.quantisation import calibration_size, quantise
from training.progress import Extraction

# The calibration images depend on the data set alone, not on the recipe's seed, so that runs share quantised networks.
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Workspace:
    """The folders, limits and threads of an experiment.

    Attributes:
        store: has the images, weights and networks.
        features: folder of the cache of features.
        pixels: folder of the cache of pixels and maps.
        pixels_bytes: size to which that cache is cut back when a run starts.
        image_limits: limits of an image that is decoded.
        threads: number of threads for decoding and for the engine.
    """

    store: Store
    features: Path
    pixels: Path
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int


@dataclass(frozen=True)
class BackboneKey:
    """Identifies an exported backbone: equal keys mean equal networks."""

    network: BackboneName
    weights: Digest
    cut: str
    size: int
    export_version: int = EXPORT_VERSION


class Registry(Protocol):
    """The record of networks that all runs share, and of what this run has decided before it was interrupted.

    An experiment runs without a database: whoever starts it implements this.
    """

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        """Return the exported backbone of a key, or None if nobody has exported it."""
        ...

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Record an exported backbone. Return the one to use: another process may have recorded one before."""
        ...

    def find_quantised(self, backbone: Digest) -> Digest | None:
        """Return the quantised copy of a backbone that this run has to use, or None if it has to make one."""
        ...

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Record a quantised copy. Return the one that this run has to use."""
        ...

    def find_bake_off_result(self) -> dict[str, Any] | None:
        """Return the facts of the bake-off that this run has finished before it was interrupted, or None."""
        ...

    def set_bake_off_result(self, facts: dict[str, Any]) -> None:
        """Record which cut this run's features come from, and what was tried for that."""
        ...

    def find_precision_decision(self) -> dict[str, Any] | None:
        """Return the facts of the precision that this run decided on before it was interrupted, or None."""
        ...

    def set_precision_decision(self, facts: dict[str, Any]) -> None:
        """Record which precision this run has decided on, and what it measured for that."""
        ...


@dataclass(frozen=True)
class FrozenBackbone:
    """A frozen network in one precision, and what it gives for every image of a run.

    Attributes:
        precision: the arithmetic of the engine.
        backbone: the network in the store.
        engine: runs the network.
        features: float32 [N, D].
        extraction: how many of the features had to be computed.
    """

    precision: Precision
    backbone: Digest
    engine: OpenVinoEngine
    features: Features
    extraction: Extraction


class NetworkFiles:
    """Makes the networks that a recipe needs, or finds them where another run has made them."""

    def __init__(self, recipe: BackboneRecipe, weights: Digest, workspace: Workspace, registry: Registry) -> None:
        self._recipe = recipe
        self._weights = weights
        self._workspace = workspace
        self._registry = registry

    def export_cut(self, cut: str) -> Digest:
        """Return the network up to a cut; export it if nobody has done so before."""
        recipe, store = self._recipe, self._workspace.store
        backbone, size = recipe.backbone, recipe.image_size
        key = BackboneKey(backbone, self._weights, cut, size)
        digest = self._registry.find_backbone(key)
        if digest is None:
            model = backbones.build_backbone(backbone, cut, size, store.read(self._weights))
            made = export(model, self._workspace.threads)
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

        If there is none, call `begin`, then quantise the network and calibrate it on a sample of `images`.
        """
        digest = self._registry.find_quantised(backbone)
        if digest is None:
            begin()
            store, size = self._workspace.store, self._recipe.image_size
            names = [images[row] for row in calibration_rows(np.arange(len(images)), size)]
            pixels = np.concatenate([batch for _, batch in source.batches(names)])
            made = quantise(store.read(backbone), pixels, report)
            digest = self._registry.add_quantised(backbone, store.put(made.onnx), made.facts())
        return digest

    def engine(self, network: Digest, precision: Precision) -> OpenVinoEngine:
        """Return an engine for a stored network. Raises PrecisionUnsupported if this machine cannot run it."""
        return OpenVinoEngine(self._workspace.store.verified_path(network), precision, self._workspace.threads)

    def feature_space(self, network: Digest, precision: Precision) -> FeatureSpace:
        """Return the key of the cache for features through a network."""
        return FeatureSpace(IMAGE_RULE, self._recipe.image_size, self._recipe.resize, network, precision)

    def frozen_backbone(
        self,
        network: Digest,
        precision: Precision,
        images: Sequence[Digest],
        source: PixelSource,
        report: ReportProgress,
    ) -> FrozenBackbone:
        """Return a network with the features of every image; compute those that no run has computed before."""
        engine = self.engine(network, precision)
        width = CATALOGUE[self._recipe.backbone].cuts[self._recipe.features_from]
        cache = FeatureCache(self._workspace.features, self.feature_space(network, precision), width)
        extraction = extract(images, engine, cache, source, report)
        cache.close()
        return FrozenBackbone(precision, network, engine, cache.rows(images), extraction)


def calibration_rows(rows: Indices, size: Sides) -> Indices:
    """Return a random sample of the rows, in their order, as large as calibration needs for images of that size."""
    count = min(len(rows), calibration_size(size))
    return np.sort(np.random.default_rng(_SAMPLE_SEED).choice(rows, count, replace=False))
