"""Turns the result of a training into what is served: an exported network, its precision, and the bundle.

If a run trains its network (fine-tuning or from scratch), the network is converted to bfloat16 or int8 after training.
Each fold then scores every converted network on the fold's test images. Those images were used neither for training
nor for the calibration of int8.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.bundle import Bundle, Dense, Logits
from artifacts.features import Features
from artifacts.images import IMAGE_RULE, Pixels
from artifacts.store import Digest
from inference import heads
from inference.engine import Engine, OpenVinoEngine
from recipes.filled import DecidedRecipe
from recipes.layers import Sides, sides
from recipes.recipe import Precision, Task
from training.data.arrays import ReportProgress
from training.data.pixels import BATCH
from training.data.split import Indices
from training.fitting.learners import LearnedModel
from training.networks.export import ExportedNetwork, export
from training.networks.network_files import Workspace, calibration_rows
from training.networks.precision import (
    PrecisionDecision,
    PrecisionScore,
    choose_precision,
    is_as_good,
    measure_image_ms,
)
from training.networks.quantisation import quantise

# An exported network is compared with Keras on so many images.
_CHECKED_IMAGES = 16


@dataclass(frozen=True)
class DeliveredModel:
    """The exported network that a run's model uses for predictions.

    Attributes:
        precision: the precision in which the engine runs the network.
        backbone: digest of the network's ONNX file in the store.
        engine: an engine that has loaded this file.
        choice: the scores and times of the compared precisions; None if only one precision was possible.
        export: how far the exported network differs from Keras, as JSON; None if the run did not train the network.
    """

    precision: Precision
    backbone: Digest
    engine: OpenVinoEngine
    choice: PrecisionDecision | None = None
    export: dict[str, Any] | None = None


FrozenNetworkProvider = Callable[[Precision, Indices, ReportProgress], Digest]
"""Returns the digest of the frozen network in a precision. For int8, the network is calibrated on the given rows."""


class TrainedNetworkExporter:
    """Exports the trained networks of a run, in each precision that the run compares."""

    def __init__(
        self,
        recipe: DecidedRecipe,
        task: Task,
        precisions: Sequence[Precision],
        pixels: Pixels,
        workspace: Workspace,
        rebuild: Callable[[bytes], Any],
        frozen: FrozenNetworkProvider | None,
    ) -> None:
        """Keep the inputs that every export of the run needs.

        Args:
            recipe: the recipe of the run.
            task: what the model predicts.
            precisions: the precisions to compare; float32 is always compared, even if it is not listed.
            pixels: the pixels of every image, uint8 [N, H, W, 3].
            workspace: the store and the number of threads.
            rebuild: takes the bytes that `LearnedModel.network` returns, and builds the Keras model from images to
                features.
            frozen: provides the frozen network, for folds that kept it because fine-tuning did not help; None from
                scratch, where every fold trains its network.
        """
        self._recipe = recipe
        self._task = task
        self._others = [precision for precision in precisions if precision is not Precision.FLOAT32]
        self._pixels = pixels
        self._workspace = workspace
        self._rebuild = rebuild
        self._frozen = frozen

    def logits(
        self, learned: LearnedModel, train: Indices, rows: Indices, report: ReportProgress
    ) -> dict[Precision, Logits]:
        """Return the logits of a fold's model in every compared precision except float32.

        Args:
            learned: the model of the fold.
            train: the fold's training rows, on which an int8 network is calibrated.
            rows: the rows to compute logits for.
            report: called with (done, total) images.

        Returns:
            float32 [len(rows), outputs] for each precision.
        """
        found: dict[Precision, Logits] = {}
        exported = self._export(learned.network(), rows) if learned.network and self._others else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            for precision in self._others:
                if exported is None:
                    engine = self._engine(self._frozen_network(precision, train, report), precision)
                else:
                    path.write_bytes(self._convert(precision, exported.onnx, train, report))
                    engine = OpenVinoEngine(path, precision, self._workspace.threads)
                found[precision] = logits(engine, learned.layers, self._pixels, rows, report)
        return found

    def serve(
        self,
        final: LearnedModel,
        train: Indices,
        shown: Indices,
        scores: Mapping[Precision, float],
        report: ReportProgress,
    ) -> DeliveredModel:
        """Export the network of the final model, and choose its precision by the scores of the folds.

        Args:
            final: the model that was trained on all images.
            train: the rows on which an int8 network is calibrated.
            shown: the rows on which the exported network is compared with Keras; a few of them are used.
            scores: the out-of-fold headline score of each precision that all folds could measure. A precision is
                missing if a fold ran on a machine without it.
            report: called with (done, total) images.
        """
        store = self._workspace.store
        exported = self._export(final.network(), shown) if final.network else None
        found: dict[Precision, Digest] = {}
        for precision in [Precision.FLOAT32, *(other for other in self._others if other in scores)]:
            found[precision] = (
                store.put(self._convert(precision, exported.onnx, train, report))
                if exported
                else self._frozen_network(precision, train, report)
            )
        engines = {precision: self._engine(digest, precision) for precision, digest in found.items()}
        choice = self._choose(scores, engines, report) if self._others else None
        chosen = choice.precision if choice else Precision.FLOAT32
        facts = exported.facts() | self._answers(final, engines[Precision.FLOAT32], shown) if exported else None
        return DeliveredModel(chosen, found[chosen], engines[chosen], choice, facts)

    def _choose(
        self, scores: Mapping[Precision, float], engines: Mapping[Precision, Engine], report: ReportProgress
    ) -> PrecisionDecision:
        times = measure_image_ms(engines, golden_images(self._recipe.image_size), lambda: report(0, 1))
        tried = [PrecisionScore(precision, scores[precision], time) for precision, time in times.items()]
        requested = self._recipe.precision
        if not isinstance(requested, Precision):
            return choose_precision(self._task, tried)
        good = is_as_good(self._task, scores[requested], scores[Precision.FLOAT32])
        return PrecisionDecision(requested if good else Precision.FLOAT32, tuple(tried))

    def _convert(self, precision: Precision, network: bytes, train: Indices, report: ReportProgress) -> bytes:
        """Return the ONNX file of a trained network for a precision. Only int8 needs another file than float32."""
        if precision is not Precision.INT8:
            return network
        return quantise(network, self._pixels[calibration_rows(train, self._recipe.image_size)], report).onnx

    def _frozen_network(self, precision: Precision, train: Indices, report: ReportProgress) -> Digest:
        """Return the digest of the frozen network in a precision; int8 is calibrated on the training rows."""
        assert self._frozen is not None
        return self._frozen(precision, train, report)

    def _engine(self, network: Digest, precision: Precision) -> OpenVinoEngine:
        return OpenVinoEngine(self._workspace.store.verified_path(network), precision, self._workspace.threads)

    def _export(self, weights: bytes, shown: Indices) -> ExportedNetwork:
        """Export a network with these trained weights to ONNX, and compare it with Keras on some of the rows."""
        return export(self._rebuild(weights), self._workspace.threads, self._pixels[_some(shown)])

    def _answers(self, final: LearnedModel, engine: Engine, shown: Indices) -> dict[str, Any]:
        """Compare the predictions of the exported network with those of Keras on some rows; return JSON values.

        `largest_difference_of_an_answer` is a probability, or the predicted number of a regression.
        `answered_otherwise` counts the predicted labels that differ.
        """
        rows, task = _some(shown), self._task
        ours = np.asarray(heads.logits(final.layers, engine.features(self._pixels[rows])), np.float64)
        theirs = np.asarray(final.logits(rows), np.float64)
        otherwise = 0
        if task is not Task.REGRESSION:
            ours, theirs = heads.probabilities(task, ours), heads.probabilities(task, theirs)
            otherwise = int((heads.answers(task, ours) != heads.answers(task, theirs)).sum())
        return {
            "images": len(rows),
            "largest_difference_of_an_answer": float(np.abs(ours - theirs).max()),
            "answered_otherwise": otherwise,
        }


def logits(engine: Engine, layers: Sequence[Dense], pixels: Pixels, rows: Indices, report: ReportProgress) -> Logits:
    """Return the logits of some images, [len(rows), outputs], computed in small batches.

    Args:
        engine: computes the features.
        layers: the head.
        pixels: all images, uint8 [N, H, W, 3].
        rows: the images to compute logits for.
        report: called with (done, total) images after each batch.
    """
    return np.concatenate([heads.logits(layers, part) for part in _by_batch(engine, pixels, rows, report)])


def features(engine: Engine, pixels: Pixels, rows: Indices, report: ReportProgress) -> Features:
    """Return the features of some images, float32 [len(rows), D], computed in small batches.

    Args:
        engine: computes the features.
        pixels: all images, uint8 [N, H, W, 3].
        rows: the images to compute features for.
        report: called with (done, total) images after each batch.
    """
    return np.concatenate(list(_by_batch(engine, pixels, rows, report)))


def _by_batch(engine: Engine, pixels: Pixels, rows: Indices, report: ReportProgress) -> Iterator[Features]:
    for start in range(0, len(rows), BATCH):
        found = engine.features(pixels[rows[start : start + BATCH]])
        report(start + len(found), len(rows))
        yield found


def _some(rows: Indices) -> Indices:
    return rows[spread(len(rows), _CHECKED_IMAGES)]


def spread(count: int, most: int) -> Indices:
    """Return up to `most` row numbers from 0 to `count` - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


def bundle(
    recipe: DecidedRecipe,
    task: Task,
    labels: Sequence[str],
    served: DeliveredModel,
    layers: tuple[Dense, ...],
    neighbours: Digest | None,
    bit_depth: int,
) -> Bundle:
    """Return the bundle of a model, with a golden input and its golden output.

    Args:
        recipe: the recipe of the run.
        task: what the model predicts.
        labels: class names in the order of the outputs.
        served: the network.
        layers: the head.
        neighbours: digest of the neighbour index, the features of the training images; None without neighbours.
        bit_depth: number of bits from which 16-bit images are scaled.
    """
    golden_input = golden_images(recipe.image_size)
    return Bundle(
        task=task,
        labels=tuple(labels),
        backbone=served.backbone,
        engine=served.engine.name,
        precision=served.precision,
        image_rule=IMAGE_RULE,
        size=recipe.image_size,
        resize=recipe.resize,
        layers=layers,
        golden_input=golden_input,
        golden_output=heads.logits(layers, served.engine.features(golden_input)),
        neighbours=neighbours,
        bit_depth=bit_depth,
    )


def golden_images(size: Sides) -> Pixels:
    """Return a test image, uint8 [1, H, W, 3], on which a broken engine gives other features than a correct one.

    The image has smooth gradients and hard edges in every channel.
    """
    height, width = sides(size)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x / width, 255 * y / height, 255 * (x / width + y / height) / 2], axis=-1)
    edges = 64 * ((x * 8 // width + y * 8 // height) % 2)
    image: Pixels = (slopes * 0.75 + edges[..., None]).astype(np.uint8)[None]
    return image
