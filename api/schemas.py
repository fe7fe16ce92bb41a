"""Pydantic models of the HTTP API's JSON: bodies of requests and responses."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    EncodedBytes,
    EncoderProtocol,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from artifacts.layout import Split
from models.comparison import ComparisonState
from models.dataset import DatasetState
from models.job import Queue
from models.run import RunState
from models.view import ViewState
from recipes.catalogue import BackboneName
from recipes.layers import NetworkRecipe, Sides, refuse_truth
from recipes.recipe import NAME_PATTERN, Recipe, Task

Item = TypeVar("Item")

LARGEST_NUMBER = 2**31 - 1
"""The largest number of a version or an event that the database can store."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN, description="Lower-case letters, digits, '.', '_' and '-'.")]
Id = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Number = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]


class Schema(BaseModel):
    """Base class of all models for the HTTP API's JSON."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Request(Schema):
    """Base class of all request bodies. Request bodies with unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: object) -> object:
        """Refuse halves of surrogate pairs, which JSON can write but no file, database or answer can hold.

        Refuse also what is nested more deeply than Python can write it.
        """
        try:
            json.dumps(body, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError("expected text in Unicode, received half a surrogate pair") from error
        except RecursionError as error:
            raise ValueError("expected JSON that is not so deeply nested") from error
        return body

    @model_validator(mode="before")
    @classmethod
    def _check_truth(cls, body: object) -> object:
        """Refuse `true` and `false` where a number is expected: Python would count them as 1 and 0."""
        return refuse_truth(body, cls)


class Problem(Schema):
    """An error as a problem object (RFC 9457). Some types have more fields.

    In a response, `request_id` identifies the request in the API's log.
    """

    model_config = ConfigDict(extra="allow")

    type: str
    """Identifies the kind of error, as `urn:espalier:problem:…`. It stays the same in later releases."""
    title: str
    status: int
    detail: str
    """What is wrong with this request, and what to do."""


class Page(Schema, Generic[Item]):
    """One page of a list. `next_cursor` is the `cursor` with which to request the next page, null on the last page."""

    items: list[Item]
    next_cursor: str | None


# --- data sets -----------------------------------------------------------------------------------------------------


class DatasetCreated(Schema):
    """The data set version that an upload has created. It waits to be ingested."""

    id: str
    name: str
    state: DatasetState
    version: int


class ClassImages(Schema):
    """A class and its number of images in the data set."""

    name: str
    images: int


class RefusedFile(Schema):
    """A file of an archive that was refused, and the reason."""

    path: str
    reason: str


class TargetRange(Schema):
    """The smallest, largest and mean target of a regression data set."""

    min: float
    max: float
    mean: float


class IngestProgress(Schema):
    """The progress of an ingest. `fraction` is from 0 to 1, `eta_s` the estimated seconds left."""

    stage: str
    fraction: float
    eta_s: float | None


class DatasetVersionListed(Schema):
    """One version of a data set, which never changes once it is ready, without the list of its refused files."""

    version: int
    state: DatasetState
    images: int
    ignored: int
    """Number of hidden files, files that macOS or Windows create, such as `.DS_Store`, and text files beside images."""
    refused_total: int
    warnings: list[str]
    """What the owner of the images should know."""
    progress: IngestProgress | None
    error: Problem | None
    created_at: datetime


class DatasetVersionOut(DatasetVersionListed):
    """One version of a data set, which never changes once it is ready."""

    refused: list[RefusedFile]
    """The first 1,000 refused files."""


class DatasetListed(Schema):
    """A data set with all its versions, without the lists of their refused files.

    Other fields than `versions` describe the newest version that is ready, or the newest version if none is ready.
    """

    id: str
    name: str
    state: DatasetState
    task: Task | None
    images: int
    """Number of accepted files, including duplicates."""
    classes: list[ClassImages]
    """The classes in the order of a model's outputs."""
    target: TargetRange | None
    duplicates: int
    """Number of accepted files with the same content as another file of the version."""
    ignored: int
    """Number of hidden files, files that macOS or Windows create, such as `.DS_Store`, and text files beside images."""
    refused_total: int
    warnings: list[str]
    """What the owner of the images should know, such as classes that lost images."""
    bit_depth: int | None
    """Number of bits from which 16-bit images are scaled: the smallest of 10, 12, 14 and 16 that holds their values.
    Null without such images; 16 for versions of earlier releases with PNG or TIFF files."""
    version: int
    versions: list[DatasetVersionListed]
    progress: IngestProgress | None
    created_at: datetime
    error: Problem | None


class DatasetOut(DatasetListed):
    """A data set with all its versions.

    Other fields than `versions` describe the newest version that is ready, or the newest version if none is ready.
    """

    refused: list[RefusedFile]
    """The first 1,000 refused files."""
    versions: list[DatasetVersionOut]  # type: ignore[assignment]  # a list of a subclass


class ImageOut(Schema):
    """An image of a data set. `image` is the SHA-256 of its file, `thumbnail` the address of a small picture."""

    image: str
    path: str
    label: str | None
    labels: list[str]
    target: float | None
    group: str | None
    split: Split
    width: int
    height: int
    format: str
    size_bytes: int
    thumbnail: str


# --- runs ----------------------------------------------------------------------------------------------------------


class RunRequest(Request):
    """The body of a request to start a run."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model to which the run adds a version."""
    recipe: Recipe = Recipe()


class RunProgress(Schema):
    """The progress of a run. `fraction` is from 0 to 1 over the whole run."""

    stage: str
    fraction: float
    fold: int | None
    folds: int | None
    epoch: int | None
    epochs: int | None
    position: int | None = None
    """The place of a queued run in the queue of its workers: 1 is the next. Null for other runs."""
    eta_s: float | None
    """Estimated seconds until the run ends, or until its stage ends if that is before the folds.

    For a queued run it includes the wait, and is computed from the times of past runs with the same mode, network,
    image size and folds. Null if unknown, for example because there are none, or because no worker serves the queue.
    """


class FoldOut(Schema):
    """The result of one fold, tested on images on which it was not trained. `fold` counts from 0."""

    fold: int
    epochs: int
    best_epoch: int
    stopped: str
    seconds: float | None
    metrics: dict[str, Any]


class ModelRef(Schema):
    """A reference to a version of a model."""

    name: str
    version: int


class Extraction(Schema):
    """How many distinct images a run has, for how many the backbone computed features, and how many were cached."""

    images: int
    computed: int
    cached: int
    seconds: float


class FileOut(Schema):
    """A file that a run produced, and the address at which to get it."""

    name: str
    size_bytes: int
    media_type: str
    url: str


class MlflowRefusal(Schema):
    """Something that MLflow refused, and its reason."""

    what: str
    reason: str


class RunOut(Schema):
    """A run with its progress, results and files."""

    id: str
    dataset: str
    version: int
    name: str
    recipe: dict[str, Any]
    """The recipe with all defaults filled in."""
    batch_size: int | None
    """The reduced batch size, if memory ran out with the batch size of the recipe; otherwise null."""
    state: RunState
    progress: RunProgress
    metrics: dict[str, Any] | None
    folds: list[FoldOut]
    extraction: Extraction | None
    model: ModelRef | None
    files: list[FileOut]
    error: Problem | None
    mlflow_url: str | None
    mlflow_refused: list[MlflowRefusal] = Field(default_factory=list)
    """What MLflow refused for good, so that its page of the run lacks it."""
    training_s: float | None
    """Seconds of training, summed over all folds and the final fit, without the time spent waiting."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class CutOut(Schema):
    """A cut point of a backbone. `width` is the number of features at the cut point."""

    name: str
    width: int


class WeightsOut(Schema):
    """Weights of a backbone that a recipe may name. `here` is true if they are stored and need no download."""

    name: str
    here: bool
    sha256: str | None


class BackboneOut(Schema):
    """A backbone that a recipe may name, with its cut points and weights."""

    name: str
    title: str
    input_size: int
    minimum_size: int
    features: int
    """Number of features at the last cut point."""
    cut_points: list[CutOut]
    unfreeze: list[str]
    """Values that a recipe's `unfreeze` may have: train all layers after this cut point, or `all` layers."""
    weights: list[WeightsOut]


# --- networks ------------------------------------------------------------------------------------------------------


class NetworkPreviewRequest(Request):
    """The network to preview: either a `network` to train from scratch, or a `backbone`."""

    network: NetworkRecipe | None = None
    """A network to train from scratch."""
    backbone: BackboneName | None = None
    """The name of a backbone, instead of `network`."""
    features_from: str | None = None
    """The cut point of the backbone at which the network ends; by default the last. Not allowed with `network`."""
    image_size: Sides | None = None
    """Side of square images in pixels, or height and width.

    By default the input size of the backbone; without a backbone, 64 for a CNN and 32 for other networks.
    """
    outputs: Annotated[int, Field(ge=1, le=16_384)] | None = None
    """If set, the table ends with an output layer with this number of outputs, for example one for each class."""


class LayerOut(Schema):
    """One layer of a network, with its shape and costs."""

    name: str
    type: str
    inputs: list[str]
    """Names of the layers whose outputs this layer reads, or `input` for the image."""
    shape: list[int]
    """Height, width and channels of the layer's output maps, or the length of its output vector."""
    parameters: int
    """Number of parameters, including BatchNorm's running mean and variance."""
    multiply_adds: int
    """Multiply-adds of convolutions and dense layers, for one image."""
    receptive_field: tuple[int, int]
    """Height and width in pixels of the area that one value depends on, including zeros beyond the border."""
    warning: str | None
    """A warning if the layer ignores a part of its input maps; otherwise null."""


class NetworkPreviewOut(Schema):
    """The layers of a network in order, and the totals of the network."""

    input: tuple[int, int, int]
    """Height, width and channels of the input image."""
    layers: list[LayerOut]
    parameters: int
    multiply_adds: int
    weights_bytes: int
    """Size of all parameters in float32."""
    warnings: list[str]
    """The warnings of all layers, each with the layer's name."""


class ViewProgress(Schema):
    """The progress of a view's computation. `fraction` is from 0 to 1, `eta_s` the estimated seconds left."""

    fraction: float
    eta_s: float | None


class ViewOut(Schema):
    """A view that is still being computed. Repeat the request later to get the view."""

    state: ViewState
    progress: ViewProgress


class VisibleLayer(Schema):
    """A layer whose output can be shown. The output has `channels` maps of `height` × `width` values."""

    name: str
    height: int
    width: int
    channels: int


class VisibleLayers(Schema):
    """The layers of a run's exported network, in order. If the engine merges layers, they are listed as one."""

    layers: list[VisibleLayer]


class CurvePoint(Schema):
    """A point of a learning curve: the score after training on a `fraction` of each fold's training images.

    `images` is the number of these images, averaged over the folds. `ci95` is the confidence interval of the score.
    """

    fraction: float
    images: int
    score: float
    ci95: list[float]


class CurveLaw(Schema):
    """The curve fitted to the points of a learning curve: `error = floor + scale * images ** -exponent`.

    The error is the score, or 1 - score if a greater score is better. `misfit` is the root mean square distance between
    the points and the fitted curve.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float


class CurveTwice(Schema):
    """The score that the fitted curve predicts for twice as many images. `change` is the change from today's score."""

    images: int
    score: float
    ci95: list[float]
    change: float
    change_ci95: list[float]


class LearningCurveOut(Schema):
    """How a run's score depends on the number of training images: its learning curve.

    `law` is a curve fitted to the points, and `twice` its prediction for twice as many images. Both are null if the
    points are too few.
    """

    metric: str
    greater_is_better: bool
    points: list[CurvePoint]
    law: CurveLaw | None
    twice: CurveTwice | None
    interval: str
    """How the confidence intervals of `twice` were computed. Those of the points are computed like the run's own."""
    sentence: str
    picture: str


# --- comparisons ---------------------------------------------------------------------------------------------------


class ComparisonRequest(Request):
    """The body of a request to compare recipes on one data set."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model to which every run adds a version."""
    recipes: Annotated[list[Recipe], Field(min_length=2, max_length=20, fail_fast=True)]
    """The recipes to compare. All must have the same `seed`, `folds.k`, `folds.repeats` and `task`.

    Then all of them are tested on the same images.
    """


class ComparisonProgress(Schema):
    """The progress of a comparison. `fraction` is the mean over its `runs` runs, of which `ended` have ended."""

    stage: str
    fraction: float
    ended: int
    runs: int
    position: int | None
    """While no run has started, the place in the queue of the first one: 1 is the next. Null later."""
    eta_s: float | None
    """Estimated seconds until the last run ends; null if unknown."""


class DifferenceOut(Schema):
    """The score of a recipe minus the best score, with its confidence interval.

    `p_value` is adjusted for the number of recipes by Holm's method.
    """

    difference: float
    ci95: list[float]
    p_value: float


class ComparisonRow(Schema):
    """One recipe of a comparison and the result of its run. Fields that are not known yet are null."""

    position: int
    run: str
    title: str
    """The recipe's values of those fields in which the recipes of the comparison differ."""
    state: RunState
    score: float | None
    ci95: list[float] | None
    difference: DifferenceOut | None
    """The difference from the best recipe; null for the best recipe itself."""
    training_s: float | None
    """Seconds of training. They include computing features or other data that was not cached yet."""
    extraction_s: float | None
    """The part of `training_s` that was spent before the first epoch.

    In this time the run computes features, or pixels and activations if it trains layers.
    """
    predict_ms: float | None
    """Milliseconds that backbone and head take for one decoded image, on the machine that made the table."""
    backbone_bytes: int | None
    bundle_bytes: int | None
    model: ModelRef | None
    error: Problem | None


class ComparisonOut(Schema):
    """A comparison with its runs and its table. `best` is the position of the row with the best score.

    If a run of a finished comparison is retried, the comparison is running again and shows its previous table until the
    new one is made.
    """

    id: str
    dataset: str
    version: int
    name: str
    state: ComparisonState
    progress: ComparisonProgress
    metric: str | None
    greater_is_better: bool | None
    best: int | None
    verdict: str | None
    interval: str | None
    """How the confidence intervals were computed."""
    test: str | None
    """How `p_value` was computed."""
    rows: list[ComparisonRow]
    error: Problem | None
    created_at: datetime
    finished_at: datetime | None


# --- models and predictions ----------------------------------------------------------------------------------------


class ModelVersionOut(Schema):
    """One version of a model: the result of one run."""

    version: int
    run: str
    dataset: str
    dataset_version: int
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    bundle: str
    """SHA-256 of the bundle."""
    backbone: str
    """SHA-256 of the backbone."""
    aliases: list[str]
    created_at: datetime


class ModelOut(Schema):
    """A model with its aliases and versions, the newest first."""

    name: str
    versions: list[ModelVersionOut]
    """The newest 50, with metrics that leave out `confusion` and `per_class`."""
    versions_total: int
    aliases: dict[str, int]
    created_at: datetime


class AliasRequest(Request):
    """The number of the model version to which an alias should point."""

    version: Number


class AliasOut(Schema):
    """An alias and the version to which it points.

    `serving` is `new` if this process already answers with that version, `old` if the previous version still answers.
    """

    model: str
    alias: str
    version: int
    serving: Literal["new", "old"]


class _StrictBase64(EncoderProtocol):
    """Base64 in which line breaks and spaces are allowed, but no other characters.

    Pydantic's own decoder skips every foreign character, so that it reads the head of a data URL as data.
    """

    @classmethod
    def decode(cls, data: bytes) -> bytes:
        try:
            return base64.b64decode(data.translate(None, b" \t\r\n"), validate=True)
        except ValueError as error:
            raise PydanticCustomError(
                "base64_decode", "Base64 decoding error: {error}", {"error": str(error)}
            ) from error

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return base64.b64encode(value)

    @classmethod
    def get_json_format(cls) -> Literal["base64"]:
        return "base64"


class PredictRequest(Schema):
    """The body of a prediction request in JSON: image files as base64 text."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[list[Annotated[bytes, EncodedBytes(encoder=_StrictBase64)]], Field(min_length=1, fail_fast=True)]


class ClassPredictionOut(Schema):
    """The predicted class of one image, with the probabilities of all classes."""

    label: str
    probability: float
    probabilities: dict[str, float]


class LabelsPredictionOut(Schema):
    """The predicted labels of one image: none, one or several. Each label has a probability of its own."""

    labels: list[str]
    probabilities: dict[str, float]


class ValuePredictionOut(Schema):
    """The number that a regression model predicts for one image."""

    value: float


class TimingsOut(Schema):
    """The time of each stage of a prediction, in milliseconds."""

    queue: float
    decode: float
    backbone: float
    head: float


class NeighbourOut(Schema):
    """A training image with features similar to those of the predicted image.

    `image` is the SHA-256 of the training image's file, and `path` its path in the data set. `similarity` is the cosine
    similarity between the features of both images, at most 1.
    """

    image: str
    path: str
    labels: list[str]
    target: float | None
    similarity: float


class ExplanationOut(Schema):
    """A picture that explains the prediction for one image. `png` is the picture as base64 text.

    `label` is the label that the picture explains, null if it explains no single label. For `explain=neighbours`, the
    picture shows the predicted image and then the images in `neighbours`, the most similar first. A deleted image is
    shown as a grey area.
    """

    label: str | None
    png: str
    neighbours: list[NeighbourOut] | None = None


class PredictionsOut(Schema):
    """The predictions for the images of a request, in the order of the images."""

    model: str
    version: int
    predictions: list[ClassPredictionOut] | list[LabelsPredictionOut] | list[ValuePredictionOut]
    """For each image, the predicted class, labels or number, depending on the model's task."""
    explanations: list[ExplanationOut] | None = None
    """For each image, a picture that explains its prediction; only if `explain` requests it."""
    timings_ms: TimingsOut


# --- operations ----------------------------------------------------------------------------------------------------


class WorkerOut(Schema):
    """A worker process: the queues that it serves, and when it was last seen (`looked_at`)."""

    name: str
    queues: list[Queue]
    is_alive: bool
    started_at: datetime
    looked_at: datetime


class Check(Schema):
    """The health of one part of the service."""

    ok: bool
    detail: str | None
    """What was found; null for requests without the API key, if there is one."""


class Readiness(Schema):
    """Whether this process is ready for requests, with one check for each part of the service.

    The checks `store`, `broker`, `workers` and `mlflow` do not affect `ready`.
    """

    ready: bool
    checks: dict[str, Check]
