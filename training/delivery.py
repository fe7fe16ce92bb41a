"""Exports what a run delivers: the network in its precision, and the bundle. Trains nothing.

A network that was trained is converted to other precisions after training. Each fold measures the score of every
precision on its test images, which neither training nor calibration has seen.
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

# Images on which an exported network is compared with Keras.
_CHECKED = 16


@dataclass(frozen=True)
class DeliveredModel:
    """The network that will answer predictions.

    Attributes:
        precision: the precision of the engine.
        backbone: the network file in the store.
        engine: the engine that runs it.
        choice: the precisions that were compared; None if there was nothing to choose.
        export: the differences between the exported network and Keras; None if the network stayed frozen.
    """

    precision: Precision
    backbone: Digest
    engine: OpenVinoEngine
    choice: PrecisionDecision | None = None
    export: dict[str, Any] | None = None


FrozenNetworkProvider = Callable[[Precision, Indices, ReportProgress], Digest]
"""Returns the file of the frozen network in a precision; calibrates it on the rows if the precision needs that."""


class TrainedNetworkExporter:
    """Exports trained networks in the precisions that a run considers."""

    def __init__(
        self,
        recipe: DecidedRecipe,
        task: Task,
        precisions: Sequence[Precision],
        pixels: Pixels,
        place: Workspace,
        rebuild: Callable[[bytes], Any],
        frozen: FrozenNetworkProvider | None,
    ) -> None:
        """Keep what is needed to export any network of the run.

        Args:
            recipe: the recipe of the run.
            task: what is predicted.
            precisions: the precisions to consider; float32 is always considered.
            pixels: the pixels of every image, uint8 [N, H, W, 3].
            place: the store and the number of threads.
            rebuild: builds the Keras model from images to features, given weights of `LearnedModel.network`.
            frozen: returns the network of a fold that kept the frozen one; None if every network is trained.
        """
        self._recipe = recipe
        self._task = task
        self._others = [precision for precision in precisions if precision is not Precision.FLOAT32]
        self._pixels = pixels
        self._place = place
        self._rebuild = rebuild
        self._frozen = frozen

    def logits(
        self, learned: LearnedModel, train: Indices, rows: Indices, report: ReportProgress
    ) -> dict[Precision, Logits]:
        """Return the logits of rows in every considered precision but float32.

        A trained network is calibrated on its training rows; a frozen network is shared by all folds.
        """
        found: dict[Precision, Logits] = {}
        exported = self._export(learned.network(), rows) if learned.network and self._others else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            for precision in self._others:
                if exported is None:
                    engine = self._engine(self._frozen_in(precision, train, report), precision)
                else:
                    path.write_bytes(self._in(precision, exported.onnx, train, report))
                    engine = OpenVinoEngine(path, precision, self._place.threads)
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
        """Export the final network and choose its precision by the scores of the folds.

        Args:
            final: what was trained on all images.
            train: rows for calibration.
            shown: rows on which the exported network is compared with Keras.
            scores: the out-of-fold headline score of each precision that every machine of the run supports.
            report: called with (done, total) images.
        """
        store = self._place.store
        exported = self._export(final.network(), shown) if final.network else None
        found: dict[Precision, Digest] = {}
        for precision in [Precision.FLOAT32, *(other for other in self._others if other in scores)]:
            found[precision] = (
                store.put(self._in(precision, exported.onnx, train, report))
                if exported
                else self._frozen_in(precision, train, report)
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
        wanted = self._recipe.precision
        if not isinstance(wanted, Precision):
            return choose_precision(self._task, tried)
        good = is_as_good(self._task, scores[wanted], scores[Precision.FLOAT32])
        return PrecisionDecision(wanted if good else Precision.FLOAT32, tuple(tried))

    def _in(self, precision: Precision, network: bytes, train: Indices, report: ReportProgress) -> bytes:
        """Convert a trained network to a precision; return its ONNX file."""
        if precision is not Precision.INT8:
            return network
        return quantise(network, self._pixels[calibration_rows(train, self._recipe.image_size)], report).onnx

    def _frozen_in(self, precision: Precision, train: Indices, report: ReportProgress) -> Digest:
        """Return the digest of the frozen network in a precision."""
        assert self._frozen is not None
        return self._frozen(precision, train, report)

    def _engine(self, network: Digest, precision: Precision) -> OpenVinoEngine:
        return OpenVinoEngine(self._place.store.verified_path(network), precision, self._place.threads)

    def _export(self, weights: bytes, shown: Indices) -> ExportedNetwork:
        """Export a trained network to ONNX and compare it with Keras on some of the rows."""
        return export(self._rebuild(weights), self._place.threads, self._pixels[_some(shown)])

    def _answers(self, final: LearnedModel, engine: Engine, shown: Indices) -> dict[str, Any]:
        """Return the differences between the predictions of the exported network and of Keras on some rows."""
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
    """Return [len(rows), outputs] for rows of images uint8 [N, H, W, 3], a few at a time."""
    return np.concatenate([heads.logits(layers, part) for part in _by_batch(engine, pixels, rows, report)])


def features(engine: Engine, pixels: Pixels, rows: Indices, report: ReportProgress) -> Features:
    """Return float32 [len(rows), D] for rows of images uint8 [N, H, W, 3], a few at a time."""
    return np.concatenate(list(_by_batch(engine, pixels, rows, report)))


def _by_batch(engine: Engine, pixels: Pixels, rows: Indices, report: ReportProgress) -> Iterator[Features]:
    for start in range(0, len(rows), BATCH):
        found = engine.features(pixels[rows[start : start + BATCH]])
        report(start + len(found), len(rows))
        yield found


def _some(rows: Indices) -> Indices:
    return rows[spread(len(rows), _CHECKED)]


def spread(count: int, most: int) -> Indices:
    """Return up to `most` row numbers, evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


def bundle(
    recipe: DecidedRecipe,
    task: Task,
    labels: Sequence[str],
    served: DeliveredModel,
    layers: tuple[Dense, ...],
    neighbours: Digest | None,
) -> Bundle:
    """Return the bundle of a head on a delivered network; `neighbours` names the file of training images to show."""
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
    )


def golden_images(size: Sides) -> Pixels:
    """Return an image that shows a broken engine: smooth slopes and hard edges in every channel, uint8 [1, H, W, 3]."""
    height, width = sides(size)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x / width, 255 * y / height, 255 * (x / width + y / height) / 2], axis=-1)
    edges = 64 * ((x * 8 // width + y * 8 // height) % 2)
    image: Pixels = (slopes * 0.75 + edges[..., None]).astype(np.uint8)[None]
    return image
