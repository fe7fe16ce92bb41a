"""Pydantic models of the HTTP contract: responses, and requests with a JSON body. Routes build them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

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
Id = Annotated[str, AfterValidator(_without_nul)]
Number = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]


class Schema(BaseModel):
    """Base class of all models of the HTTP contract."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Request(Schema):
    """Base class of all request bodies; they refuse unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: object) -> object:
        """Refuse halves of surrogate pairs, which JSON can write but no file, database or answer can hold."""
        try:
            json.dumps(body, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError("expected text in Unicode, received half a surrogate pair") from error
        return body

    @model_validator(mode="before")
    @classmethod
    def _check_truth(cls, body: object) -> object:
        """Refuse `true` and `false` where a number is expected: Python would count them as 1 and 0."""
        return refuse_truth(body, cls)


class Problem(Schema):
    """An error (RFC 9457). Some types add fields; a response also has the `request_id` that the log shows."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Stable; `urn:espalier:problem:…`."""
    title: str
    status: int
    detail: str
    """What was expected and what was received."""


class Page(Schema, Generic[Item]):
    """One page of a list, the newest items first. `next_cursor` requests the next page; it is null on the last."""

    items: list[Item]
    next_cursor: str | None


# --- data sets -----------------------------------------------------------------------------------------------------


class DatasetCreated(Schema):
    """A data set that was uploaded and waits to be ingested."""

    id: str
    name: str
    state: DatasetState
    version: int


class ClassImages(Schema):
    """A class and its number of images."""

    name: str
    images: int


class RefusedFile(Schema):
    """A file that was refused, and why."""

    path: str
    reason: str


class TargetRange(Schema):
    """The smallest, largest and mean target of a regression data set."""

    min: float
    max: float
    mean: float


class IngestProgress(Schema):
    """The progress of a version's ingest; `fraction` goes from 0 to 1."""

    stage: str
    fraction: float
    eta_s: float | None


class DatasetVersionOut(Schema):
    """One immutable state of a data set."""

    version: int
    state: DatasetState
    images: int
    ignored: int
    """Files that operating systems leave behind, and text beside images."""
    refused: list[RefusedFile]
    """The first thousand."""
    refused_total: int
    warnings: list[str]
    """What the owner of the images should know."""
    progress: IngestProgress | None
    error: Problem | None
    created_at: datetime


class DatasetOut(Schema):
    """A data set, described by its newest usable version."""

    id: str
    name: str
    state: DatasetState
    task: Task | None
    images: int
    """Accepted files, duplicates included."""
    classes: list[ClassImages]
    """In the order of a model's outputs."""
    target: TargetRange | None
    duplicates: int
    """Accepted files with the same content as another file of the version."""
    ignored: int
    """Files that operating systems leave behind, and text beside images."""
    refused: list[RefusedFile]
    """The first thousand."""
    refused_total: int
    warnings: list[str]
    """What the owner of the images should know, such as classes that lost images."""
    version: int
    versions: list[DatasetVersionOut]
    progress: IngestProgress | None
    created_at: datetime
    error: Problem | None


class ImageOut(Schema):
    """An image of a data set; `image` is its SHA-256."""

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
    """A training to start."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model to which the run adds a version."""
    recipe: Recipe = Recipe()


class RunProgress(Schema):
    """The progress of a run; `fraction` goes from 0 to 1 over the whole run."""

    stage: str
    fraction: float
    fold: int | None
    folds: int | None
    epoch: int | None
    epochs: int | None
    eta_s: float | None


class FoldOut(Schema):
    """The result of one fold on the images that it did not train on; `fold` counts from 0."""

    fold: int
    epochs: int
    best_epoch: int
    stopped: str
    seconds: float | None
    metrics: dict[str, Any]


class ModelRef(Schema):
    """A version of a model."""

    name: str
    version: int


class Extraction(Schema):
    """How many distinct images a run has, how many the backbone computed, and how many came from the cache."""

    images: int
    computed: int
    cached: int
    seconds: float


class FileOut(Schema):
    """A file that a run produced."""

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
    """The reduced batch size after memory ran out with the recipe's; null if that never happened."""
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
    """Total seconds of all parts on all workers, without waiting."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class CutOut(Schema):
    """A cut point of a network; `width` is the number of features there."""

    name: str
    width: int


class WeightsOut(Schema):
    """Weights that a recipe may name; `here` is true if they are stored already and need no download."""

    name: str
    here: bool
    sha256: str | None


class BackboneOut(Schema):
    """A backbone with its cut points and weights."""

    name: str
    title: str
    input_size: int
    minimum_size: int
    features: int
    """Features after the last cut point."""
    cut_points: list[CutOut]
    unfreeze: list[str]
    """Where fine-tuning may begin: after a cut point, or at the whole network."""
    weights: list[WeightsOut]


# --- networks ------------------------------------------------------------------------------------------------------


class NetworkPreviewRequest(Request):
    """A network to preview: one from scratch, or a backbone with its cut point."""

    network: NetworkRecipe | None = None
    """A network from scratch."""
    backbone: BackboneName | None = None
    """Instead of `network`: a backbone."""
    features_from: str | None = None
    """Only with `backbone`: the cut point whose output becomes the features; by default the last."""
    image_size: Sides | None = None
    """Side of a square in pixels, or height and width; by default the backbone's own, 64 for a CNN, 32 for others."""
    outputs: Annotated[int, Field(ge=1, le=16_384)] | None = None
    """Number of outputs, such as one per class. Adds an output layer to the table; by default there is none."""


class LayerOut(Schema):
    """One layer of a network, with its shape and costs."""

    name: str
    type: str
    inputs: list[str]
    """Names of the layers that it reads, or `input`."""
    shape: list[int]
    """Height, width and channels of its maps, or the length of its output vector."""
    parameters: int
    """Number of parameters, including BatchNorm's running mean and variance."""
    multiply_adds: int
    """Multiply-adds of convolutions and dense layers, for one image."""
    receptive_field: tuple[int, int]
    """Height and width in pixels of the area that one value depends on, including zeros beyond the border."""
    warning: str | None
    """Which part of its input maps this layer ignores."""


class NetworkPreviewOut(Schema):
    """The layers of a network in order, and its totals."""

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
    """The progress of a view; `fraction` goes from 0 to 1."""

    fraction: float
    eta_s: float | None


class ViewOut(Schema):
    """A view that is still being computed; repeat the request to get it."""

    state: ViewState
    progress: ViewProgress


class VisibleLayer(Schema):
    """A layer whose output can be shown: `channels` maps of `height` times `width` positions."""

    name: str
    height: int
    width: int
    channels: int


class VisibleLayers(Schema):
    """The layers of a run's network as it is served, in order. Layers that the engine merges appear as one."""

    layers: list[VisibleLayer]


class CurvePoint(Schema):
    """The headline score after training on a part of each fold's images: `fraction` of them, `images` on average."""

    fraction: float
    images: int
    score: float
    ci95: list[float]


class CurveLaw(Schema):
    """The power law `error = floor + scale * images ** -exponent`.

    `misfit` is the root mean square distance of the points from it. The error is the score, or 1 - score if a greater
    score is better.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float


class CurveTwice(Schema):
    """The law's forecast for twice the images; `change` is the expected change of the score."""

    images: int
    score: float
    ci95: list[float]
    change: float
    change_ci95: list[float]


class LearningCurveOut(Schema):
    """How a run's score depends on its number of training images; `law` and `twice` are null if there are too few."""

    metric: str
    greater_is_better: bool
    points: list[CurvePoint]
    law: CurveLaw | None
    twice: CurveTwice | None
    interval: str
    """How the intervals of `twice` were computed; intervals of points are computed like the run's own."""
    sentence: str
    picture: str


# --- comparisons ---------------------------------------------------------------------------------------------------


class ComparisonRequest(Request):
    """Recipes to compare on one data set."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model to which every run adds a version."""
    recipes: Annotated[list[Recipe], Field(min_length=2, max_length=20, fail_fast=True)]
    """Recipes with equal `seed`, `folds.k`, `folds.repeats` and `task`, so that all are tested on the same images."""


class ComparisonProgress(Schema):
    """The progress of a comparison: `fraction` is the mean over its runs, and `ended` of `runs` have ended."""

    stage: str
    fraction: float
    ended: int
    runs: int
    eta_s: float | None


class DifferenceOut(Schema):
    """The score minus the best score; `p_value` is adjusted for the number of recipes (Holm)."""

    difference: float
    ci95: list[float]
    p_value: float


class ComparisonRow(Schema):
    """One recipe of a comparison and the result of its run; fields that are not known (yet) are null."""

    position: int
    run: str
    title: str
    """The values of the fields in which the recipes differ."""
    state: RunState
    score: float | None
    ci95: list[float] | None
    difference: DifferenceOut | None
    """Null for the best recipe."""
    training_s: float | None
    """Training time, including what no earlier run had computed."""
    extraction_s: float | None
    """The part of it before the first epoch: features, or pixels and activations if the network itself is trained."""
    predict_ms: float | None
    """Time of backbone and head for one decoded image, on the machine that ran the comparison."""
    backbone_bytes: int | None
    bundle_bytes: int | None
    model: ModelRef | None
    error: Problem | None


class ComparisonOut(Schema):
    """A comparison; `best` is the position of the row with the best score.

    When a run of a finished comparison is retried, the comparison is running again and still shows its last table.
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
    """One version of a model, made by one run."""

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
    """The version that an alias will point to."""

    version: Number


class AliasOut(Schema):
    """An alias; `serving` is `new` once this process answers with the version that it points to."""

    model: str
    alias: str
    version: int
    serving: Literal["new", "old"]


class PredictRequest(Schema):
    """Images as base64 text."""

    model_config = ConfigDict(extra="forbid")

    images: Annotated[list[Base64Bytes], Field(min_length=1, fail_fast=True)]


class ClassPredictionOut(Schema):
    """The predicted class of one image."""

    label: str
    probability: float
    probabilities: dict[str, float]


class LabelsPredictionOut(Schema):
    """The predicted labels of one image, any number of them; each label has an independent probability."""

    labels: list[str]
    probabilities: dict[str, float]


class ValuePredictionOut(Schema):
    """The predicted number of one image."""

    value: float


class TimingsOut(Schema):
    """The time of each stage of a prediction, in milliseconds."""

    queue: float
    decode: float
    backbone: float
    head: float


class NeighbourOut(Schema):
    """A training image whose features are near to those of the predicted image.

    `image` is the digest of its file, `path` its path in the data set, and `similarity` the cosine similarity of the
    features of both images, at most 1.
    """

    image: str
    path: str
    labels: list[str]
    target: float | None
    similarity: float


class ExplanationOut(Schema):
    """A picture that explains the prediction for one image: `png` is base64, `label` what it explains, if one label.

    For neighbours it shows the image, then the images in `neighbours`, the nearest first; a deleted one is grey.
    """

    label: str | None
    png: str
    neighbours: list[NeighbourOut] | None = None


class PredictionsOut(Schema):
    """The predictions for the images of a request, in their order."""

    model: str
    version: int
    predictions: list[ClassPredictionOut] | list[LabelsPredictionOut] | list[ValuePredictionOut]
    """For each image a class, labels or a number, depending on the model's task."""
    explanations: list[ExplanationOut] | None = None
    """A picture for each image, if `explain` requested it."""
    timings_ms: TimingsOut


# --- operations ----------------------------------------------------------------------------------------------------


class WorkerOut(Schema):
    """A worker process: the queues that it serves, and when it last looked for work."""

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
    """Whether this process is ready for requests, with one check per part.

    `store`, `broker`, `workers` and `mlflow` do not count.
    """

    ready: bool
    checks: dict[str, Check]
