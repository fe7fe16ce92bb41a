"""Makes the network files that a run needs and extracts its features. Reuses what earlier runs have made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from artifacts.bit_depths import FULL_DEPTH
from artifacts.features import FeatureCache, Features, FeatureSpace
from artifacts.images import IMAGE_RULE, ImageLimits
from artifacts.store import Digest, Store
from inference.engine import OpenVinoEngine
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.filled import BackboneRecipe
from recipes.layers import Sides
from recipes.recipe import Precision, Resize
from training.data.arrays import ReportProgress
from training.data.extraction import extract
from training.data.pixels import ImageDecoder, PixelSource
from training.data.split import Indices
from training.networks import backbones
from training.networks.export import EXPORT_VERSION, export
from training.networks.quantisation import calibration_size, quantise
from training.progress import Extraction

# The calibration images depend only on the data set, not on the seed of the recipe, so that runs share networks.
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Workspace:
    """The store, cache folders, limits and threads that a training may use, and how it reads its images.

    Attributes:
        store: the store with images, weights and networks.
        features: folder of the feature cache.
        pixels: folder of the cache of pixels and maps.
        pixels_bytes: size in bytes to which that cache is reduced when a run starts.
        image_limits: limits for decoded images.
        threads: number of threads for decoding and for the engine.
        bit_depth: number of bits from which the 16-bit images of the data set are scaled.
    """

    store: Store
    features: Path
    pixels: Path
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int
    bit_depth: int = FULL_DEPTH

    def decoder(self, size: Sides, resize: Resize) -> ImageDecoder:
        """Return a decoder of the images of the data set."""
        return ImageDecoder(self.store, size, resize, self.image_limits, self.threads, self.bit_depth)


@dataclass(frozen=True)
class BackboneKey:
    """Identifies an exported backbone: two backbones with equal keys are the same network."""

    network: BackboneName
    weights: Digest
    cut: str
    size: int
    export_version: int = EXPORT_VERSION


class Registry(Protocol):
    """The record of the networks that all runs share, and of the decisions that this run has made.

    Training does not use the database itself. The caller of an experiment implements this protocol.
    """

    def find_backbone(self, key: BackboneKey) -> Digest | None:
        """Return the digest of the exported backbone with this key; None if it was never exported."""
        ...

    def add_backbone(self, key: BackboneKey, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Record an exported backbone, and return the digest to use.

        If another process has recorded a backbone with this key before, its digest is returned.
        """
        ...

    def find_quantised(self, backbone: Digest) -> Digest | None:
        """Return the digest of the quantised copy of a backbone that this run must use; None if it must make one."""
        ...

    def add_quantised(self, backbone: Digest, digest: Digest, facts: dict[str, Any]) -> Digest:
        """Record a quantised copy of a backbone, and return the digest that this run must use."""
        ...

    def find_bake_off_result(self) -> dict[str, Any] | None:
        """Return the result of this run's bake-off as JSON values; None if the bake-off has not ended yet."""
        ...

    def set_bake_off_result(self, facts: dict[str, Any]) -> None:
        """Record the result of this run's bake-off: the chosen cut point and the scores of all candidates."""
        ...

    def find_precision_decision(self) -> dict[str, Any] | None:
        """Return the precision that this run chose, with the scores, as JSON values; None if it has not chosen yet."""
        ...

    def set_precision_decision(self, facts: dict[str, Any]) -> None:
        """Record the precision that this run chose, and the scores and times of all candidates."""
        ...


@dataclass(frozen=True)
class FrozenBackbone:
    """A frozen network in one precision, with the features of every image of a run.

    Attributes:
        precision: the arithmetic of the engine.
        backbone: digest of the network file in the store.
        engine: an engine that has loaded this file.
        features: float32 [N, D].
        extraction: how many of the features were computed, and how many came from the cache.
    """

    precision: Precision
    backbone: Digest
    engine: OpenVinoEngine
    features: Features
    extraction: Extraction


class NetworkFiles:
    """Returns the network files that a recipe needs, and makes those that no earlier run has made."""

    def __init__(self, recipe: BackboneRecipe, weights: Digest, workspace: Workspace, registry: Registry) -> None:
        self._recipe = recipe
        self._weights = weights
        self._workspace = workspace
        self._registry = registry

    def export_cut(self, cut: str) -> Digest:
        """Return the digest of the network up to a cut point. Export the network if no earlier run has done so."""
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
        """Return the digest of the quantised copy of an exported network; make the copy if there is none.

        Args:
            backbone: digest of the exported network.
            images: images to calibrate on; a random sample of them is used.
            source: yields their pixels.
            report: called with (done, total) images.
            begin: called before a copy is made.
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
        """Load a stored network into an engine. Raises PrecisionUnsupported if this machine lacks the precision."""
        return OpenVinoEngine(self._workspace.store.verified_path(network), precision, self._workspace.threads)

    def feature_space(self, network: Digest, precision: Precision) -> FeatureSpace:
        """Return the key under which features of a network in a precision are cached."""
        recipe, bit_depth = self._recipe, self._workspace.bit_depth
        return FeatureSpace(IMAGE_RULE, recipe.image_size, recipe.resize, network, precision, bit_depth)

    def frozen_backbone(
        self,
        network: Digest,
        precision: Precision,
        images: Sequence[Digest],
        source: PixelSource,
        report: ReportProgress,
    ) -> FrozenBackbone:
        """Return a frozen network with the features of every image. Features that are not cached are computed."""
        engine = self.engine(network, precision)
        width = CATALOGUE[self._recipe.backbone].cuts[self._recipe.features_from]
        cache = FeatureCache(self._workspace.features, self.feature_space(network, precision), width)
        extraction = extract(images, engine, cache, source, report)
        cache.close()
        return FrozenBackbone(precision, network, engine, cache.rows(images), extraction)


def calibration_rows(rows: Indices, size: Sides) -> Indices:
    """Return a random sample of the rows, in ascending order, for the calibration of a network on images of a size."""
    count = min(len(rows), calibration_size(size))
    return np.sort(np.random.default_rng(_SAMPLE_SEED).choice(rows, count, replace=False))
