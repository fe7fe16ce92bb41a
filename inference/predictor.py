"""Predicts with one model: decodes images, runs the backbone through its batcher, applies the head. Knows no HTTP."""

from __future__ import annotations

import math
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from artifacts import images, neighbours
from artifacts.bundle import Bundle, Logits
from artifacts.decode_memory import Reserve, reserve_nothing
from artifacts.features import Features
from artifacts.images import IMAGE_RULE, ImageLimits, Pixels
from artifacts.neighbours import NeighbourIndex
from artifacts.store import Digest
from errors import BundleRefused, Corrupt, DeadlineExceeded, ImageRefused, NotFound, RequestInvalid
from inference import captions, explain, heads
from inference.batcher import BackboneOutput, Batcher, FeatureFuture
from inference.engine import TOLERANCE
from inference.explain import Explanation
from inference.neighbours import Neighbour, nearest, sheet
from recipes.layers import sides
from recipes.recipe import Task


@dataclass(frozen=True)
class ClassPrediction:
    """The predicted class of one image. `probabilities` has the probability of each label, in the bundle's order."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class LabelsPrediction:
    """The predicted labels of one image: none, one or several. Each label has an independent probability."""

    labels: list[str]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ValuePrediction:
    """The number that a regression predicts for one image."""

    value: float


Prediction = ClassPrediction | LabelsPrediction | ValuePrediction


@dataclass(frozen=True)
class ExplanationImage:
    """A picture that explains the prediction for one image.

    Attributes:
        label: the label that the picture explains; None if it explains no label.
        png: the picture.
        neighbours: the training images in the picture; None for other kinds of explanation.
    """

    label: str | None
    png: bytes
    neighbours: Sequence[Neighbour] | None = None


@dataclass(frozen=True)
class Timings:
    """How many milliseconds each step of a prediction took."""

    queue: float
    decode: float
    backbone: float
    head: float


class Predictor:
    """A loaded model: the head of one bundle, and the batcher of its backbone.

    Attributes:
        bundle: the bundle without its golden input and output, which take more memory than the head.
        size_bytes: memory of the head, and of the neighbour index once it is loaded.
    """

    def __init__(
        self, bundle: Bundle, batcher: Batcher, read: Callable[[Digest], bytes], on_growth: Callable[[], None]
    ) -> None:
        """Check that this machine reproduces the golden output of the bundle.

        Args:
            bundle: the bundle of the model.
            batcher: runs the bundle's backbone.
            read: returns a stored file by its digest.
            on_growth: called after the predictor has loaded its neighbour index and so takes more memory.

        Raises:
            BundleRefused: the output differs from the golden output, or the bundle needs another image rule.
        """
        self._batcher = batcher
        self._read = read
        self._on_growth = on_growth
        self._reading = threading.Lock()
        self._neighbours: NeighbourIndex | None = None
        self.bundle = bundle
        self._check()
        # Empty copies, because an empty slice would keep the whole array in memory.
        golden_input, golden_output = bundle.golden_input[:0].copy(), bundle.golden_output[:0].copy()
        self.bundle = replace(bundle, golden_input=golden_input, golden_output=golden_output)
        arrays = [array for layer in bundle.layers for array in (layer.kernel, layer.bias, layer.offset)]
        self.size_bytes = sum(array.nbytes for array in arrays if array is not None)

    def _check(self) -> None:
        bundle = self.bundle
        if bundle.image_rule != IMAGE_RULE:
            raise BundleRefused(
                f"The model was trained with image rule {bundle.image_rule}, but this version of Espalier decodes "
                f"images by rule {IMAGE_RULE}. Train the model again, or serve it with the version that trained it."
            )
        found, golden = self.logits(bundle.golden_input), bundle.golden_output
        unit = bundle.layers[-1].unit
        if unit is not None:  # a large mean would hide any difference
            deviation = np.where(unit.scale > 0, unit.scale, 1.0)
            found, golden = (found - unit.mean) / deviation, (golden - unit.mean) / deviation
        difference = float(np.abs(found - golden).max()) / max(1.0, float(np.abs(golden).max()))
        if not difference <= TOLERANCE[bundle.precision]:
            raise BundleRefused(
                f"The engine {self._batcher.engine} of this machine does not reproduce the golden output of the model. "
                f"The relative difference is {difference:g}, but at most {TOLERANCE[bundle.precision]:g} is allowed. "
                "Serve the model on another machine or engine, or train it again."
            )

    def logits(self, pixels: Pixels) -> Logits:
        """Return the logits [N, outputs] of decoded images, uint8 [N, H, W, 3]. Waits without a deadline."""
        return heads.logits(self.bundle.layers, self._batcher.submit(pixels, math.inf).result().features)

    @property
    def heat_map_scale(self) -> int:
        """How many times as high and wide as the network's input an image should be under a heat map, to be seen."""
        return -(-explain.LEAST_PICTURE // min(sides(self.bundle.size)))

    def decode(
        self,
        position: int,
        file: bytes,
        limits: ImageLimits,
        until: float,
        scale: int = 1,
        reserve: Reserve = reserve_nothing,
    ) -> Pixels:
        """Decode one image file of a request to uint8 [H, W, 3].

        Args:
            position: index of the image in the request, for errors.
            file: the bytes of the file.
            limits: limits for decoded images.
            until: the deadline, as a time of `time.perf_counter`.
            scale: factor by which the result is larger than the network's input, in height and width.
            reserve: waits until there is memory for the decoder.

        Raises:
            ImageRefused: the image cannot be used; the error has its position as `image`.
            DeadlineExceeded: the deadline has passed.
        """
        if time.perf_counter() > until:
            raise DeadlineExceeded(
                f"Only {position} images were decoded before the deadline. Send fewer or smaller images per request."
            )
        try:
            bundle = self.bundle
            height, width = sides(bundle.size)
            size = (height * scale, width * scale)
            return images.decode(file, size, bundle.resize, limits, reserve, bundle.bit_depth)
        except ImageRefused as error:
            raise ImageRefused(f"Image {position + 1}: {error.detail}", image=position) from error

    def submit(self, pixels: Pixels, until: float, *, wants_maps: bool = False) -> FeatureFuture | None:
        """Queue images as `Batcher.submit` does and return its future.

        Returns None if this predictor was unloaded meanwhile. The caller must then load it again.
        """
        future = self._batcher.submit(pixels, until, wants_maps=wants_maps)
        return None if self._batcher.is_closed and future.done() else future

    @property
    def is_closed(self) -> bool:
        """Whether the backbone of this predictor was unloaded, so that the predictor must be loaded again."""
        return self._batcher.is_closed

    def wait_s(self, images: int) -> float:
        """Return the estimated seconds until all waiting images and `images` more are computed."""
        return self._batcher.wait_s(images)

    def answer(self, features: Features) -> list[Prediction]:
        """Return a prediction for each row of features float32 [N, D]. Its type depends on the task of the bundle."""
        bundle = self.bundle
        logits = heads.logits(bundle.layers, features)
        if bundle.task is Task.REGRESSION:
            return [ValuePrediction(float(value)) for value in logits[:, 0]]
        probabilities = heads.probabilities(bundle.task, logits, bundle.temperature)
        chosen = heads.answers(bundle.task, probabilities, bundle.threshold)
        named = [dict(zip(bundle.labels, map(float, row), strict=True)) for row in probabilities]
        if bundle.task is Task.MULTILABEL:
            return [
                LabelsPrediction([label for label, is_there in zip(bundle.labels, row, strict=True) if is_there], image)
                for row, image in zip(chosen, named, strict=True)
            ]
        return [
            ClassPrediction(bundle.labels[index], float(row[index]), image)
            for index, row, image in zip(chosen, probabilities, named, strict=True)
        ]

    def explain(
        self,
        kind: Explanation,
        label: str | None,
        pixels: Pixels,
        computed: BackboneOutput,
        predictions: list[Prediction],
        limits: ImageLimits,
        reserve: Reserve = reserve_nothing,
    ) -> list[ExplanationImage]:
        """Return a picture for each image of a request.

        Args:
            kind: the kind of explanation.
            label: the label that a heat map explains; None for the label with the highest probability.
            pixels: the images, uint8 [n, H, W, 3]; they may be larger than the network's input, see `heat_map_scale`.
            computed: the output of the backbone for these images.
            predictions: the predictions for these images.
            limits: limits for the decoding of neighbours.
            reserve: waits until there is memory to decode neighbours.

        Raises:
            RequestInvalid: the model has no such label, or its maps are too small for a picture.
        """
        if kind is Explanation.NEIGHBOURS:
            near = nearest(self._neighbour_index(), computed.features)
            return [self._neighbour_sheet(*one, limits, reserve) for one in zip(pixels, near, strict=True)]
        assert computed.maps is not None
        explain.check_side(computed.maps, self.bundle.size)
        if kind is Explanation.ACTIVATIONS:
            return [ExplanationImage(None, explain.grid(maps)) for maps in computed.maps]
        found = []
        for image, features, maps, prediction in zip(
            pixels, computed.features, computed.maps, predictions, strict=True
        ):
            chosen = self._explained_label(label, prediction)
            output, sign = self._output(chosen)
            places = sign * explain.heat(self.bundle.layers, features, maps, output)
            found.append(ExplanationImage(chosen, explain.overlay(image, places, self._heat_title(chosen))))
        return found

    def _heat_title(self, label: str | None) -> str:
        """Return the title of a heat map: the label that it explains, or its number if no font has its letters."""
        if label is None:
            return "contribution to the number"
        if captions.can_write(label):
            return f"contribution to {label}"
        return f"contribution to class {self.bundle.labels.index(label) + 1} of {len(self.bundle.labels)}"

    def check_explains(self, kind: Explanation) -> None:
        """Check that this model supports a kind of explanation. Raises RequestInvalid."""
        if kind is Explanation.NEIGHBOURS and self.bundle.neighbours is None:
            raise RequestInvalid(
                "explain: This model was trained without neighbours. To use explain=neighbours, train a model with "
                "`neighbours: true`.",
                field="explain",
            )

    def _neighbour_sheet(
        self, image: Pixels, found: Sequence[Neighbour], limits: ImageLimits, reserve: Reserve
    ) -> ExplanationImage:
        picture = sheet(image, found, lambda known: self._read_pixels(known, limits, reserve))
        return ExplanationImage(None, explain.png(np.asarray(picture)), found)

    def _neighbour_index(self) -> NeighbourIndex:
        """Return the neighbour index. The first call loads it."""
        with self._reading:
            if self._neighbours is None:
                assert self.bundle.neighbours is not None
                self._neighbours = neighbours.load(self._read(self.bundle.neighbours))
                self.size_bytes += self._neighbours.size_bytes
                self._on_growth()
            return self._neighbours

    def _read_pixels(self, image: Digest, limits: ImageLimits, reserve: Reserve) -> Pixels | None:
        """Return the decoded pixels of a training image, or None if it was deleted or is damaged."""
        try:
            bundle = self.bundle
            return images.decode(self._read(image), bundle.size, bundle.resize, limits, reserve, bundle.bit_depth)
        except (NotFound, Corrupt, ImageRefused):
            return None

    def _explained_label(self, label: str | None, prediction: Prediction) -> str | None:
        if isinstance(prediction, ValuePrediction):
            if label is None:
                return None
            raise RequestInvalid(
                f"label: This model predicts a number and has no labels. Leave out label {label!r}.", field="label"
            )
        if label is None:
            return max(prediction.probabilities, key=prediction.probabilities.__getitem__)
        for known in self.bundle.labels:  # older bundles may have labels in NFD, as macOS writes them
            if unicodedata.normalize("NFC", known) == unicodedata.normalize("NFC", label):
                return known
        known = ", ".join(self.bundle.labels[:10])
        raise RequestInvalid(f"label: This model has no label {label!r}. Its labels are: {known}.", field="label")

    def _output(self, label: str | None) -> tuple[int, float]:
        """Return the index of the output for a label, and whether it supports (1) or opposes (-1) the label."""
        if label is None:
            return 0, 1.0
        index = self.bundle.labels.index(label)
        if self.bundle.task is Task.BINARY:
            return 0, 1.0 if index else -1.0
        return index, 1.0

    def predict(self, files: Sequence[bytes], limits: ImageLimits, deadline_s: float) -> list[Prediction]:
        """Decode image files one after the other, and return a prediction for each.

        Raises:
            ImageRefused: an image cannot be used; the error has its position as `image`.
            DeadlineExceeded: decoding and waiting for the engine took longer than `deadline_s`.
            Unavailable: this predictor was unloaded.
        """
        until = time.perf_counter() + deadline_s
        pixels = np.stack([self.decode(position, file, limits, until) for position, file in enumerate(files)])
        return self.answer(self._batcher.submit(pixels, until).result().features)
