"""The shapes of the contract: what answers look like, and requests that are JSON. Builds nothing."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field

from artifacts.layout import Split
from models.comparison import ComparisonState
from models.dataset import DatasetState
from models.job import Queue
from models.run import RunState
from models.view import ViewState
from recipes.catalogue import BackboneName
from recipes.layers import NetworkRecipe, Sides
from recipes.recipe import NAME_PATTERN, Recipe, Task

Item = TypeVar("Item")

LARGEST_NUMBER = 2**31 - 1
"""What a database keeps as a number of a version or an event."""


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN, description="Lower-case letters, digits, '.', '_' and '-'.")]
Id = Annotated[str, AfterValidator(_without_nul)]
Number = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]


class Schema(BaseModel):
    """The root of all shapes."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Request(Schema):
    """The root of all requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(Schema):
    """What went wrong (RFC 9457), with more fields by its type; in an answer also `request_id`, as the log has it."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Stable; `urn:espalier:problem:…`."""
    title: str
    status: int
    detail: str
    """What was expected and what was received."""


class Page(Schema, Generic[Item]):
    """A part of a list, the newest first; `next_cursor` asks for the next part, null at the end."""

    items: list[Item]
    next_cursor: str | None


# --- data sets -----------------------------------------------------------------------------------------------------


class DatasetCreated(Schema):
    """A data set that waits to be taken in."""

    id: str
    name: str
    state: DatasetState
    version: int


class ClassImages(Schema):
    """A class and how many images it has."""

    name: str
    images: int


class RefusedFile(Schema):
    """A file that was refused, and why."""

    path: str
    reason: str


class TargetRange(Schema):
    """The numbers of a regression data set."""

    min: float
    max: float
    mean: float


class IngestProgress(Schema):
    """How far a version is."""

    stage: str
    fraction: float
    eta_s: float | None


class DatasetVersionOut(Schema):
    """One immutable state of a data set."""

    version: int
    state: DatasetState
    images: int
    ignored: int
    """Files that operating systems leave behind."""
    refused: list[RefusedFile]
    """The first thousand."""
    refused_total: int
    progress: IngestProgress | None
    error: Problem | None
    created_at: datetime


class DatasetOut(Schema):
    """A data set as its newest usable version shows it."""

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
    """Accepted files whose content another file of the version has, too."""
    ignored: int
    """Files that operating systems leave behind."""
    refused: list[RefusedFile]
    """The first thousand."""
    refused_total: int
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
    """What to train."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model that the run makes a version of."""
    recipe: Recipe = Recipe()


class RunProgress(Schema):
    """How far a run is; `fraction` of the whole from 0 to 1."""

    stage: str
    fraction: float
    fold: int | None
    folds: int | None
    epoch: int | None
    epochs: int | None
    eta_s: float | None


class FoldOut(Schema):
    """What a fold measured on images it did not train on; `fold` counts from 0."""

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
    """How many different images a run had, how many went through the backbone, and how many were cached."""

    images: int
    computed: int
    cached: int
    seconds: float


class FileOut(Schema):
    """A file that a run made."""

    name: str
    size_bytes: int
    media_type: str
    url: str


class RunOut(Schema):
    """A run."""

    id: str
    dataset: str
    version: int
    name: str
    recipe: dict[str, Any]
    """With every default filled in."""
    batch_size: int | None
    """Images in a step since memory ran out at the recipe's; null if it never did."""
    state: RunState
    progress: RunProgress
    metrics: dict[str, Any] | None
    folds: list[FoldOut]
    extraction: Extraction | None
    model: ModelRef | None
    files: list[FileOut]
    error: Problem | None
    mlflow_url: str | None
    training_s: float | None
    """Seconds of all parts together, whoever did them; waiting does not count."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class CutOut(Schema):
    """A place of a network to take features from, and how many they are."""

    name: str
    width: int


class WeightsOut(Schema):
    """Weights that a recipe may name; `here` says whether they need no fetching."""

    name: str
    here: bool
    sha256: str | None


class BackboneOut(Schema):
    """A backbone."""

    name: str
    title: str
    input_size: int
    minimum_size: int
    features: int
    """Features after the last cut point."""
    cut_points: list[CutOut]
    unfreeze: list[str]
    """Where fine-tuning may begin: a cut point, or all of the network."""
    weights: list[WeightsOut]


# --- networks ------------------------------------------------------------------------------------------------------


class NetworkPreviewRequest(Request):
    """A network to look at: one from scratch, or a backbone with its cut."""

    network: NetworkRecipe | None = None
    """A network from scratch."""
    backbone: BackboneName | None = None
    """Instead of `network`: a backbone."""
    features_from: str | None = None
    """Of a backbone: the cut point whose output becomes the features; by default the last."""
    image_size: Sides | None = None
    """Side of a square in pixels, or height and width; by default the backbone's own, 64 for a CNN, 32 for others."""
    outputs: Annotated[int, Field(ge=1, le=16_384)] | None = None
    """Values of an output layer that closes the table, such as one for each class; by default it has none."""


class LayerOut(Schema):
    """A layer of a network."""

    name: str
    type: str
    inputs: list[str]
    """Names of what it reads: layers before it, or `input`."""
    shape: list[int]
    """Height, width and channels of its maps, or how many values it has in a row."""
    parameters: int
    """BatchNorm's running mean and variance among them."""
    multiply_adds: int
    """Of convolutions and dense layers, for one image."""
    receptive_field: tuple[int, int]
    """Height and width in pixels of what one of its values sees, zeros beyond the image's border included."""
    warning: str | None
    """What of its maps is lost here."""


class NetworkPreviewOut(Schema):
    """The layers of a network, from the pixels on."""

    input: tuple[int, int, int]
    """Height, width and channels of an image."""
    layers: list[LayerOut]
    parameters: int
    multiply_adds: int
    weights_bytes: int
    """Of all parameters in float32."""
    warnings: list[str]
    """Those of the layers, each with the layer's name."""


class ViewProgress(Schema):
    """How far something is; `fraction` of it from 0 to 1."""

    fraction: float
    eta_s: float | None


class ViewOut(Schema):
    """Something that is being computed, since it was asked for: ask again for it."""

    state: ViewState
    progress: ViewProgress


class VisibleLayer(Schema):
    """A layer that can be looked at: `channels` maps of `height` times `width` places."""

    name: str
    height: int
    width: int
    channels: int


class VisibleLayers(Schema):
    """The layers of a run's network as it answers, in its order; some are only seen together with those behind them."""

    layers: list[VisibleLayer]


class CurvePoint(Schema):
    """The headline score after learning from a part of the images of a fold: `fraction`, or `images` in the mean."""

    fraction: float
    images: int
    score: float
    ci95: list[float]


class CurveLaw(Schema):
    """`error = floor + scale * images ** -exponent`; `misfit` is the root mean square of what the points are off it.

    The error is the score, or what it lacks to one if a greater score is better.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float


class CurveTwice(Schema):
    """What the law foretells for twice the images; `change` is by how much the score would change."""

    images: int
    score: float
    ci95: list[float]
    change: float
    change_ci95: list[float]


class LearningCurveOut(Schema):
    """How a run's score hangs on the number of its training images; `law` and `twice` are null for too few of them."""

    metric: str
    greater_is_better: bool
    points: list[CurvePoint]
    law: CurveLaw | None
    twice: CurveTwice | None
    interval: str
    """How the intervals of `twice` were made; those of points are made as the run's own."""
    sentence: str
    picture: str


# --- comparisons ---------------------------------------------------------------------------------------------------


class ComparisonRequest(Request):
    """What to compare."""

    dataset: Id
    """Id of the data set."""
    version: Number | None = None
    """Version of the data set; by default the newest that is ready."""
    name: Name
    """Name of the model that every run makes a version of."""
    recipes: Annotated[list[Recipe], Field(min_length=2, max_length=20)]
    """They share `seed`, `folds.k`, `folds.repeats` and `task`, so that each is tested on the same images."""


class ComparisonProgress(Schema):
    """How far a comparison is; `fraction` is the mean of its runs', `ended` of `runs` are over."""

    stage: str
    fraction: float
    ended: int
    runs: int
    eta_s: float | None


class DifferenceOut(Schema):
    """A score less the best one; `p_value` is adjusted for the number of recipes (Holm)."""

    difference: float
    ci95: list[float]
    p_value: float


class ComparisonRow(Schema):
    """A recipe of a comparison, by its run; what is not known, or not yet, is null."""

    position: int
    run: str
    title: str
    """The fields in which the recipes differ."""
    state: RunState
    score: float | None
    ci95: list[float] | None
    difference: DifferenceOut | None
    """Null for the best."""
    training_s: float | None
    """From start to end, with what no run had computed before."""
    extraction_s: float | None
    """The part of it before the first epoch: features, and where a network learns its pixels and activations."""
    predict_ms: float | None
    """For one decoded image on the machine that compared: the backbone and the head."""
    backbone_bytes: int | None
    bundle_bytes: int | None
    model: ModelRef | None
    error: Problem | None


class ComparisonOut(Schema):
    """A comparison; `best` is the position of the row with the best score.

    While a run of a finished one is tried again it is running, and shows the table that it had.
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
    """How intervals were made."""
    test: str | None
    """How `p_value` was made."""
    rows: list[ComparisonRow]
    error: Problem | None
    created_at: datetime
    finished_at: datetime | None


# --- models and predictions ----------------------------------------------------------------------------------------


class ModelVersionOut(Schema):
    """What one run made of a model."""

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
    """A model with its versions, the newest first."""

    name: str
    versions: list[ModelVersionOut]
    aliases: dict[str, int]
    created_at: datetime


class AliasRequest(Request):
    """Where to point an alias."""

    version: Number


class AliasOut(Schema):
    """An alias; `serving` is `new` once this process answers with the version it points at."""

    model: str
    alias: str
    version: int
    serving: Literal["new", "old"]


class PredictRequest(Request):
    """Images as base64 text."""

    images: Annotated[list[Base64Bytes], Field(min_length=1)]


class ClassPredictionOut(Schema):
    """The class of one image."""

    label: str
    probability: float
    probabilities: dict[str, float]


class LabelsPredictionOut(Schema):
    """The labels of one image, none or several; the probability of each is by itself."""

    labels: list[str]
    probabilities: dict[str, float]


class ValuePredictionOut(Schema):
    """The number of one image."""

    value: float


class TimingsOut(Schema):
    """Where the time of an answer went, in milliseconds."""

    queue: float
    decode: float
    backbone: float
    head: float


class NeighbourOut(Schema):
    """A training image that looks like another one to the network.

    `image` is the digest of its file, `path` where it lay in the data set, and `similarity` the cosine of the angle
    between the features of both, 1 at most.
    """

    image: str
    path: str
    labels: list[str]
    target: float | None
    similarity: float


class ExplanationOut(Schema):
    """A picture that explains the answer for one image: `png` is base64; `label` is whose it is, if of one.

    For neighbours it shows the image and then those in `neighbours`, the nearest first; a grey one was deleted.
    """

    label: str | None
    png: str
    neighbours: list[NeighbourOut] | None = None


class PredictionsOut(Schema):
    """The answers for a request's images, in their order."""

    model: str
    version: int
    predictions: list[ClassPredictionOut] | list[LabelsPredictionOut] | list[ValuePredictionOut]
    """By the model's task: a class, labels, or a number for each image."""
    explanations: list[ExplanationOut] | None = None
    """A picture for each image, if asked for by `explain`."""
    timings_ms: TimingsOut


# --- operations ----------------------------------------------------------------------------------------------------


class WorkerOut(Schema):
    """A worker process: which queues it serves, and when it last looked for work."""

    name: str
    queues: list[Queue]
    is_alive: bool
    started_at: datetime
    looked_at: datetime


class Check(Schema):
    """One part of the service."""

    ok: bool
    detail: str


class Readiness(Schema):
    """Whether requests should be sent here, part by part; `broker` and `workers` do not decide it."""

    ready: bool
    checks: dict[str, Check]
