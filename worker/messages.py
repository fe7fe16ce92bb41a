"""Everything that a worker and its child process say to each other, one JSON line a message.

Knows no pipes and no rows. Both ends, and the simulator that plays a child, use these classes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from artifacts.archive import ArchiveLimits
from artifacts.images import ImageFacts, ImageLimits
from artifacts.layout import Split
from artifacts.run_files import RunFile
from artifacts.store import Digest, StoreAddress
from errors import Crashed, EspalierError, Refused, from_record
from recipes.catalogue import BackboneName
from recipes.recipe import Task
from training.progress import Epoch, Extraction, FoldResult

JsonObject = dict[str, Any]
"""A JSON object that is passed on or stored as it is: a recipe, metrics, facts. Its keys mean nothing to a worker."""

_SHOWN_CHARACTERS = 200


class _Message(BaseModel):
    """A frozen value; infinite numbers and NaN survive the way through JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


# --- orders: what a child is to do -----------------------------------------------------------------------------------


class IngestOrder(_Message):
    """Read an archive.

    Attributes:
        store: the folder of the store that is lent.
        code_page: that of names which are not in UTF-8; None if it is to be found out.
        done: paths that were read before.
    """

    type: Literal["ingest"] = "ingest"
    store: str
    archive: Digest
    code_page: str | None = None
    archive_limits: ArchiveLimits
    image_limits: ImageLimits
    decode_cpu_s: int
    memory_bytes: int
    done: tuple[str, ...]


class TrainPart(StrEnum):
    """How much of a run one order covers: its preparation, one fold, the final fit, or everything."""

    PREPARE = "prepare"
    FOLD = "fold"
    FINAL = "final"
    ALL = "all"


@dataclass(frozen=True)
class WeightsSource:
    """Where ImageNet weights come from: a base address, a folder of earlier downloads, and time limits in seconds."""

    url: str
    cache: str
    connect_s: float
    stall_s: float


class TrainingSpec(_Message):
    """What the parts of a run have in common: its recipe, its data, and the limits of the machine.

    `weights` is None for a network from scratch, for weights that are not stored yet, and where `candidates`, the
    weights of each backbone, are to be chosen among.
    """

    run: str
    store: StoreAddress
    features: str
    pixels: str
    pixels_bytes: int
    image_limits: ImageLimits
    threads: int
    source: WeightsSource
    recipe: JsonObject
    manifest: Digest
    labels: tuple[str, ...]
    weights: Digest | None
    candidates: dict[BackboneName, Digest]


class TrainOrder(_Message):
    """Train a part of a run.

    Attributes:
        fold: the number of the fold, if the part is one.
        outcomes: stored outcomes of the folds that have ended, by number.
        checkpoints: stored checkpoints of each fold, the newest first.
        final_checkpoints: those of the final fit.
        checkpoint_share: how much of the time checkpoints may take, from 0 to 1.
        extraction: what the run has had to compute so far.
    """

    type: Literal["train"] = "train"
    part: TrainPart
    fold: int
    outcomes: dict[int, Digest]
    checkpoints: dict[int, tuple[Digest, ...]]
    final_checkpoints: tuple[Digest, ...]
    checkpoint_share: float
    extraction: Extraction | None
    spec: TrainingSpec


class ComparedRun(_Message):
    """A run that succeeded, as a comparison needs it; `position` is its place in the comparison."""

    position: int
    title: str
    task: Task
    metrics: JsonObject
    training_s: float
    version: int
    bundle: Digest
    backbone: Digest
    out_of_fold: Digest


class CompareOrder(_Message):
    """Compare the runs of a comparison."""

    type: Literal["compare"] = "compare"
    store: StoreAddress
    threads: int
    manifest: Digest
    labels: tuple[str, ...]
    name: str
    runs: tuple[ComparedRun, ...]
    failed: int = 0
    """Runs of the comparison that failed, and so are not among `runs`."""
    cancelled: int = 0
    """Runs of the comparison that a client cancelled."""


class _ViewOrder(_Message):
    store: StoreAddress
    threads: int
    image_limits: ImageLimits
    bundle: Digest


class LayersOrder(_ViewOrder):
    """List the layers of the network that a bundle names."""

    type: Literal["layers"] = "layers"


class ActivationsOrder(_ViewOrder):
    """Draw what a layer makes of an image."""

    type: Literal["activations"] = "activations"
    image: Digest
    layer: str


class LearningCurveOrder(_ViewOrder):
    """Measure how the score grows with the number of images."""

    type: Literal["learning-curve"] = "learning-curve"
    features: str
    recipe: JsonObject
    manifest: Digest
    labels: tuple[str, ...]
    out_of_fold: Digest


ViewOrder = LayersOrder | ActivationsOrder | LearningCurveOrder
Order = IngestOrder | TrainOrder | CompareOrder | ViewOrder


# --- answers to a child's questions ----------------------------------------------------------------------------------


class DigestAnswer(_Message):
    """The file that counts; None if there is none yet."""

    type: Literal["digest"] = "digest"
    digest: Digest | None


class ChoiceAnswer(_Message):
    """What the run has chosen before; None if nothing."""

    type: Literal["choice"] = "choice"
    choice: JsonObject | None


class Stored(_Message):
    """What the child asked to be stored is stored."""

    type: Literal["stored"] = "stored"


Answer = DigestAnswer | ChoiceAnswer | Stored


class Drain(_Message):
    """Write the last checkpoints and end."""

    type: Literal["drain"] = "drain"


WorkerMessage = Order | Answer | Drain


# --- what the child of an ingest says --------------------------------------------------------------------------------


class LayoutFound(_Message):
    """What an archive holds.

    Attributes:
        task: what can be learned from it.
        samples: number of images that are to be decoded.
        classes: number of images of each class, those that were refused already included.
        ignored: number of files that are no images.
        refused: files that were refused already.
        warnings: what the owner of the images should know.
    """

    type: Literal["layout"] = "layout"
    task: Task
    samples: int
    ignored: int
    refused: tuple[Refused, ...]
    classes: dict[str, int] = {}
    warnings: tuple[str, ...] = ()


class ImageBegun(_Message):
    """The image that is decoded next; if the child dies, this one killed it."""

    type: Literal["reading"] = "reading"
    path: str


class ImageRejected(_Message):
    """An image that cannot be used, and why."""

    type: Literal["refused"] = "refused"
    path: str
    reason: str


class ImageAccepted(_Message):
    """An image that is in the lent store, with what its archive says of it."""

    type: Literal["accepted"] = "accepted"
    path: str
    sha256: Digest
    size_bytes: int
    facts: ImageFacts
    labels: tuple[str, ...]
    target: float | None
    group: str | None
    split: Split


IngestMessage = LayoutFound | ImageBegun | ImageRejected | ImageAccepted


# --- what the child of a training says -------------------------------------------------------------------------------


class JobProgress(_Message):
    """How far a job is.

    Attributes:
        stage: a key of `worker.run_progress.STAGES`.
        share: of the stage, from 0 to 1; the sum over all folds that are learned side by side.
        eta_s: seconds to the end of the stage, or of these folds; None if nothing tells yet.
        fold: the fold that moved last; None in other stages.
        folds: how many folds are learned side by side.
        epoch: the present epoch of that fold, from 1.
        epochs: the most that it will have.
        spent_s: seconds that went into these folds so far, by earlier attempts too.
    """

    stage: str
    share: float
    eta_s: float | None = None
    fold: int | None = None
    folds: int = 1
    epoch: int | None = None
    epochs: int | None = None
    spent_s: float = 0.0


class Progress(_Message):
    """How far the job is; the last one counts."""

    type: Literal["progress"] = "progress"
    state: JobProgress


class Alive(_Message):
    """Work moves; `step_s` is the time that one step usually takes, 0 if unknown."""

    type: Literal["alive"] = "alive"
    step_s: float = 0.0


class EpochEnded(_Message):
    """An epoch of a fold, or of the final fit (None), counted from 1 through all phases."""

    type: Literal["epoch"] = "epoch"
    fold: int | None
    epoch: int
    metrics: Epoch


class CheckpointWritten(_Message):
    """A checkpoint of a fold, or of the final fit (None), is stored; it holds so many epochs."""

    type: Literal["checkpoint"] = "checkpoint"
    fold: int | None
    epochs: int
    sha256: Digest
    size_bytes: int


class Extracted(_Message):
    """The features are there."""

    type: Literal["extraction"] = "extraction"
    extraction: Extraction


class StoredFile(_Message):
    """A file of the run that lies in the store."""

    name: RunFile
    sha256: Digest
    size_bytes: int
    media_type: str


class FileWritten(_Message):
    """A file of the run is there before its end."""

    type: Literal["file"] = "file"
    file: StoredFile


class Prepared(_Message):
    """What the folds read is there."""

    type: Literal["prepared"] = "prepared"


class FoldEnded(_Message):
    """A fold has ended; `outcome` is the stored file that the end of the run needs."""

    type: Literal["fold"] = "fold"
    result: FoldResult
    outcome: Digest


class RunOutcome(_Message):
    """A run has ended with a model."""

    type: Literal["outcome"] = "outcome"
    bundle: Digest
    backbone: Digest
    metrics: JsonObject
    training_s: float
    files: tuple[StoredFile, ...]


# --- what the child of a training asks -------------------------------------------------------------------------------


class WeightsObtained(_Message):
    """Have weights named that were downloaded or made."""

    type: Literal["weights"] = "weights"
    network: BackboneName
    name: str
    sha256: Digest
    source: JsonObject


class _AboutBackbone(_Message):
    network: BackboneName
    weights: Digest
    cut: str
    size: int
    export_version: int


class FindBackbone(_AboutBackbone):
    """Ask for the export that counts."""

    type: Literal["find_backbone"] = "find_backbone"


class AddBackbone(_AboutBackbone):
    """Have an export named; the answer is the one that counts, which may be an earlier one."""

    type: Literal["add_backbone"] = "add_backbone"
    digest: Digest
    facts: JsonObject


class FindQuantised(_Message):
    """Ask for the quantised copy of a backbone that this run is to use."""

    type: Literal["find_quantised"] = "find_quantised"
    backbone: Digest
    image_rule: int


class AddQuantised(_Message):
    """Have a quantised copy named; the answer is the one that counts for this run."""

    type: Literal["add_quantised"] = "add_quantised"
    backbone: Digest
    image_rule: int
    digest: Digest
    facts: JsonObject


class FindFeaturesChoice(_Message):
    """Ask where this run takes its features from, if it has chosen before."""

    type: Literal["find_features_choice"] = "find_features_choice"


class SetFeaturesChoice(_Message):
    """Have the choice of where features come from stored; `weights` are those of the chosen backbone."""

    type: Literal["set_features_choice"] = "set_features_choice"
    choice: JsonObject
    weights: Digest


class FindPrecisionChoice(_Message):
    """Ask for the precision of this run, if it has chosen before."""

    type: Literal["find_precision_choice"] = "find_precision_choice"


class SetPrecisionChoice(_Message):
    """Have the choice of a precision stored."""

    type: Literal["set_precision_choice"] = "set_precision_choice"
    choice: JsonObject


Question = (
    WeightsObtained
    | FindBackbone
    | AddBackbone
    | FindQuantised
    | AddQuantised
    | FindFeaturesChoice
    | SetFeaturesChoice
    | FindPrecisionChoice
    | SetPrecisionChoice
)
TrainMessage = (
    Progress
    | Alive
    | EpochEnded
    | CheckpointWritten
    | Extracted
    | FileWritten
    | Prepared
    | FoldEnded
    | RunOutcome
    | Question
)


# --- what other children say -----------------------------------------------------------------------------------------


class ComparisonOutcome(_Message):
    """A comparison has ended with a table, a picture and a report."""

    type: Literal["comparison-outcome"] = "comparison-outcome"
    picture: Digest
    report: Digest
    table: JsonObject


class ViewProgress(_Message):
    """How far a view is, from 0 to 1."""

    type: Literal["view-progress"] = "view-progress"
    fraction: float
    eta_s: float | None


class ViewOutcome(_Message):
    """A view is computed; some have a picture beside their file."""

    type: Literal["view-outcome"] = "view-outcome"
    file: Digest
    picture: Digest | None = None


class Failed(_Message):
    """The order cannot be carried out; `error` is `EspalierError.record` of what went wrong."""

    type: Literal["error"] = "error"
    error: JsonObject

    @classmethod
    def by(cls, error: EspalierError) -> Failed:
        """Return the message for an error."""
        return cls(error=error.record())

    def as_error(self) -> EspalierError:
        """Return the error as the class that it was."""
        return from_record(self.error)


ChildMessage = IngestMessage | TrainMessage | ComparisonOutcome | ViewProgress | ViewOutcome | Failed


# --- lines -----------------------------------------------------------------------------------------------------------


def line_of(message: BaseModel) -> str:
    """Return a message as one line of JSON, its end included."""
    return message.model_dump_json() + "\n"


def parse_child_message(line: str) -> ChildMessage:
    """Return the message in a line of a child. Raises Crashed if it is none."""
    try:
        return _child_messages().validate_json(line)
    except ValidationError as error:
        raise Crashed(_unreadable("the child", line, error)) from error


def parse_worker_message(line: str) -> WorkerMessage:
    """Return the message in a line of the worker. Raises Crashed if it is none."""
    try:
        return _worker_messages().validate_json(line)
    except ValidationError as error:
        raise Crashed(_unreadable("the worker", line, error)) from error


def _unreadable(sender: str, line: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return (
        f"Expected a message of worker.messages from {sender}. Received {line[:_SHOWN_CHARACTERS]!r}, "
        f"which is none: {first['msg']}{f' at {where}' if where else ''}. This is a bug."
    )


@cache
def _child_messages() -> TypeAdapter[ChildMessage]:
    return TypeAdapter(Annotated[ChildMessage, Field(discriminator="type")])


@cache
def _worker_messages() -> TypeAdapter[WorkerMessage]:
    return TypeAdapter(Annotated[WorkerMessage, Field(discriminator="type")])
