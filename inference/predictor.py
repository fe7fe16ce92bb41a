"""Answers for one model: decodes images, runs its backbone and its head. Knows no HTTP, SQL or names of models."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from artifacts import images
from artifacts.bundle import Bundle, Float32
from artifacts.images import IMAGE_RULE, ImageLimits, Pixels
from artifacts.recipe import Task
from errors import BundleRefused, DeadlineExceeded, ImageRefused
from inference import heads
from inference.engine import TOLERANCE, Engine


@dataclass(frozen=True)
class ClassPrediction:
    """The class of one image; `probabilities` by label, in the bundle's order."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class LabelsPrediction:
    """The labels of one image, none or several; `probabilities` of each label by itself."""

    labels: list[str]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ValuePrediction:
    """The number of one image."""

    value: float


Prediction = ClassPrediction | LabelsPrediction | ValuePrediction


@dataclass(frozen=True)
class Timings:
    """Where the time of an answer went, in milliseconds."""

    queue: float
    decode: float
    backbone: float
    head: float


class Predictor:
    """One bundle with the engine of its backbone; `turn` is held by whoever uses that engine."""

    def __init__(self, bundle: Bundle, engine: Engine, turn: threading.Lock) -> None:
        self.bundle = bundle
        self._engine = engine
        self._turn = turn

    def check(self) -> None:
        """See that this machine gives the golden output for the golden input. Raises BundleRefused."""
        bundle = self.bundle
        if bundle.image_rule != IMAGE_RULE:
            raise BundleRefused(
                f"The model was trained with image rule {bundle.image_rule}, this version decodes by rule "
                f"{IMAGE_RULE}. Train it again, or serve it with the version that trained it."
            )
        found = self.golden_logits()
        scale = max(1.0, float(np.abs(bundle.golden_output).max()))
        difference = float(np.abs(found - bundle.golden_output).max()) / scale
        if not difference <= TOLERANCE[bundle.precision]:
            raise BundleRefused(
                f"This machine's {self._engine.name} engine answers differently from the one that trained the model: "
                f"expected at most {TOLERANCE[bundle.precision]:g} relative difference. Received {difference:g}."
            )

    def golden_logits(self) -> Float32:
        """Return what this machine answers for the golden input, float32 [N, outputs]."""
        return heads.logits(self.bundle.layers, self._engine.features(self.bundle.golden_input))

    def predict(
        self, files: Sequence[bytes], limits: ImageLimits, deadline_s: float
    ) -> tuple[list[Prediction], Timings]:
        """Answer for each image file.

        Raises:
            ImageRefused: an image cannot be used; `image` is its position.
            DeadlineExceeded: decoding and waiting for the engine took longer than `deadline_s`.
        """
        bundle = self.bundle
        started = time.perf_counter()
        until = started + deadline_s
        pixels = np.stack([self._decode(position, file, limits, until) for position, file in enumerate(files)])
        decoded = time.perf_counter()
        if not self._turn.acquire(timeout=max(0.0, until - decoded)):
            raise DeadlineExceeded(
                f"The engine was still busy after {deadline_s:g} s. Try again, or send fewer images at once."
            )
        try:
            waited = time.perf_counter()
            features = self._engine.features(pixels)
            computed = time.perf_counter()
        finally:
            self._turn.release()
        predictions = _predictions(bundle, heads.logits(bundle.layers, features))
        finished = time.perf_counter()
        return predictions, Timings(
            queue=1000 * (waited - decoded),
            decode=1000 * (decoded - started),
            backbone=1000 * (computed - waited),
            head=1000 * (finished - computed),
        )

    def _decode(self, position: int, file: bytes, limits: ImageLimits, until: float) -> Pixels:
        if time.perf_counter() > until:
            raise DeadlineExceeded(f"Only {position} images were decoded in time. Send fewer or smaller ones at once.")
        try:
            return images.decode(file, self.bundle.size, self.bundle.resize, limits)
        except ImageRefused as error:
            raise ImageRefused(f"Image {position + 1}: {error.detail}", image=position) from error


def _predictions(bundle: Bundle, logits: Float32) -> list[Prediction]:
    """Return what logits [N, outputs] say in the words of the bundle's task."""
    if bundle.task is Task.REGRESSION:
        return [ValuePrediction(float(value)) for value in logits[:, 0]]
    probabilities = heads.probabilities(bundle.task, logits, bundle.temperature)
    chosen = heads.answers(bundle.task, probabilities, bundle.threshold)
    named = [dict(zip(bundle.labels, map(float, row), strict=True)) for row in probabilities]
    if bundle.task is Task.MULTILABEL:
        return [
            LabelsPrediction([label for label, is_there in zip(bundle.labels, row, strict=True) if is_there], of_image)
            for row, of_image in zip(chosen, named, strict=True)
        ]
    return [
        ClassPrediction(bundle.labels[index], float(row[index]), of_image)
        for index, row, of_image in zip(chosen, probabilities, named, strict=True)
    ]
