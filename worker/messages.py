"""The messages between a worker and its child process. Each message is one line of JSON.

The worker, the child and the simulated child of the tests use only these classes. How messages are sent is in
`worker.child_process` and `worker.child.channel`; what is written to the database is in `worker.handlers`.
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
"""A JSON object that the worker stores or passes on without reading it: a recipe, metrics, or facts about a file."""

_SHOWN_CHARACTERS = 200


class _Message(BaseModel):
    """Base class of all messages. Infinite numbers and NaN stay the same when written to JSON and read again."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


# --- orders: the work that a worker gives to a child -----------------------------------------------------------------


class IngestOrder(_Message):
    """Read an uploaded archive and decode its images.

    Attributes:
        store: folder of the store that holds the archive; the child writes the images there.
        code_page: the encoding of names that are not in UTF-8; None if it must be found out.
        done: paths in the archive that an earlier child has read; this child skips them.
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
    """The part of a run that one order covers: the preparation, one fold, the final fit, or all of them."""

    PREPARE = "prepare"
    FOLD = "fold"
    FINAL = "final"
    ALL = "all"


@dataclass(frozen=True)
class WeightsSource:
    """Where a child finds ImageNet weights.

    Attributes:
        url: base address of the downloads.
        cache: folder with files that were downloaded before.
        connect_s: time limit in seconds for a connection.
        stall_s: seconds without data after which a download fails.
    """

    url: str
    cache: str
    connect_s: float
    stall_s: float


class TrainingSpec(_Message):
    """The parts of a `TrainOrder` that are the same for every part of a run.

    Attributes:
        features: folder of cached features.
        pixels: folder of cached pixels, of about `pixels_bytes` at most.
        recipe: the filled recipe.
        labels: names of the classes, in the order of the outputs.
        weights: the stored weights of the backbone. None for a network from scratch, for weights that are not stored
            yet, and for `"backbone": "auto"`.
        candidates: for `"backbone": "auto"`, the stored weights of each backbone to choose from.
        bit_depth: number of bits from which 16-bit images of the data set are scaled.
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
    bit_depth: int


class TrainOrder(_Message):
    """Train one part of a run.

    Attributes:
        fold: number of the fold, from 0; ignored unless `part` is FOLD.
        outcomes: stored outcomes of the folds that have ended, by number of the fold.
        checkpoints: stored checkpoints of each fold, the newest first, by number of the fold.
        final_checkpoints: stored checkpoints of the final fit, the newest first.
        checkpoint_share: fraction of the training time that writing checkpoints may take, from 0 to 1.
        extraction: how many features earlier parts of the run computed, and how long that took; None if none did.
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
    """The results of one run in a comparison. `position` counts the runs of the comparison from 0."""

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
    """Compare the results of several runs that used the same folds."""

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
    """Draw the activations of one layer for one image."""

    type: Literal["activations"] = "activations"
    image: Digest
    layer: str


class LearningCurveOrder(_ViewOrder):
    """Measure how the score of a run grows with the number of training images."""

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
    """The answer to questions about a stored file: the digest of the file to use, or None if there is none yet."""

    type: Literal["digest"] = "digest"
    digest: Digest | None


class ChoiceAnswer(_Message):
    """The answer to questions about a choice: what an earlier part of the run chose, or None if none has chosen yet."""

    type: Literal["choice"] = "choice"
    choice: JsonObject | None


class Stored(_Message):
    """The answer to a child that asked the worker to store something: it is stored."""

    type: Literal["stored"] = "stored"


Answer = DigestAnswer | ChoiceAnswer | Stored


class Drain(_Message):
    """Ask the child to write its last checkpoints and to exit."""

    type: Literal["drain"] = "drain"


WorkerMessage = Order | Answer | Drain


# --- messages of a child that reads an archive -----------------------------------------------------------------------


class LayoutFound(_Message):
    """The child has listed the files of the archive and read their labels.

    Attributes:
        task: what can be learned from the archive.
        samples: number of images that have a label or target and are to be decoded.
        classes: number of images of each class, including those that are already refused.
        ignored: number of files that are neither images nor labels.
        refused: files that cannot be used, with the reasons.
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
    """The child is about to decode this image. If the child then dies, the worker refuses the image."""

    type: Literal["reading"] = "reading"
    path: str


class ImageRejected(_Message):
    """The child found that this image cannot be used, for this reason."""

    type: Literal["refused"] = "refused"
    path: str
    reason: str


class ImageAccepted(_Message):
    """An image that the child has decoded and written to the lent store.

    The archive gives its labels or target, its group and its split.
    """

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


# --- messages of a child that trains ---------------------------------------------------------------------------------


class JobProgress(_Message):
    """The progress of one job of a run.

    Attributes:
        stage: a key of `worker.run_progress.STAGES`.
        share: finished fraction of the stage, from 0 to 1. In the stage `folds`, the sum of these fractions over all
            folds that this job trains at the same time.
        eta_s: estimated seconds to the end of the stage, or of these folds; None if there is no estimate yet.
        fold: the fold that reported last, from 0; None in other stages.
        folds: how many folds this job trains at the same time.
        epoch: the current epoch of `fold`, from 1.
        epochs: the largest number of epochs that `fold` can have.
        spent_s: seconds of training that these folds have taken so far, earlier attempts included.
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
    """A message with the current progress of the job. Each one replaces the one before."""

    type: Literal["progress"] = "progress"
    state: JobProgress


class Alive(_Message):
    """The job makes progress. `step_s` is the usual duration of one step in seconds, 0 if unknown."""

    type: Literal["alive"] = "alive"
    step_s: float = 0.0


class EpochEnded(_Message):
    """One epoch has ended, in a fold or, if `fold` is None, in the final fit.

    `epoch` counts from 1 and continues through all phases of fine-tuning.
    """

    type: Literal["epoch"] = "epoch"
    fold: int | None
    epoch: int
    metrics: Epoch


class CheckpointWritten(_Message):
    """A checkpoint is in the store. It holds the state of a fold, or of the final fit if `fold` is None.

    `epochs` is the number of epochs that were finished at the checkpoint.
    """

    type: Literal["checkpoint"] = "checkpoint"
    fold: int | None
    epochs: int
    sha256: Digest
    size_bytes: int


class Extracted(_Message):
    """All features of the run are computed; `extraction` says how many and how long that took."""

    type: Literal["extraction"] = "extraction"
    extraction: Extraction


class StoredFile(_Message):
    """A file that the child has put into the store, and the name under which the run lists it."""

    name: RunFile
    sha256: Digest
    size_bytes: int
    media_type: str


class FileWritten(_Message):
    """The child has stored a file that users may read before the run ends, such as examples of augmentation."""

    type: Literal["file"] = "file"
    file: StoredFile


class Prepared(_Message):
    """The preparation has ended: the folds can start."""

    type: Literal["prepared"] = "prepared"


class FoldEnded(_Message):
    """A fold has ended. `outcome` is the stored file with its predictions, which the final part of the run reads."""

    type: Literal["fold"] = "fold"
    result: FoldResult
    outcome: Digest


class RunOutcome(_Message):
    """The run has succeeded; `bundle` is the file of its model."""

    type: Literal["outcome"] = "outcome"
    bundle: Digest
    backbone: Digest
    metrics: JsonObject
    training_s: float
    files: tuple[StoredFile, ...]


# --- questions of a child that trains --------------------------------------------------------------------------------


class WeightsObtained(_Message):
    """Ask the worker to record weights that the child has downloaded or created. The answer is `Stored`."""

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
    """Ask for the recorded export of a backbone. The answer is a `DigestAnswer`."""

    type: Literal["find_backbone"] = "find_backbone"


class AddBackbone(_AboutBackbone):
    """Ask the worker to record a new export of a backbone.

    The `DigestAnswer` has the export to use: another run may have recorded one first.
    """

    type: Literal["add_backbone"] = "add_backbone"
    digest: Digest
    facts: JsonObject


class FindQuantised(_Message):
    """Ask for the quantised copy of a backbone that this run must use. The answer is a `DigestAnswer`."""

    type: Literal["find_quantised"] = "find_quantised"
    backbone: Digest
    image_rule: int


class AddQuantised(_Message):
    """Ask the worker to record a new quantised copy of a backbone.

    The `DigestAnswer` has the copy that this run must use: another part of the run may have recorded one first.
    """

    type: Literal["add_quantised"] = "add_quantised"
    backbone: Digest
    image_rule: int
    digest: Digest
    facts: JsonObject


class FindFeaturesChoice(_Message):
    """Ask for the backbone and layer that an earlier part of this run chose. The answer is a `ChoiceAnswer`."""

    type: Literal["find_features_choice"] = "find_features_choice"


class SetFeaturesChoice(_Message):
    """Ask the worker to store the chosen backbone and layer of this run. The answer is `Stored`.

    `weights` are the stored weights of the chosen backbone.
    """

    type: Literal["set_features_choice"] = "set_features_choice"
    choice: JsonObject
    weights: Digest


class FindPrecisionChoice(_Message):
    """Ask for the precision that an earlier part of this run chose. The answer is a `ChoiceAnswer`."""

    type: Literal["find_precision_choice"] = "find_precision_choice"


class SetPrecisionChoice(_Message):
    """Ask the worker to store the chosen precision of this run. The answer is `Stored`."""

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


# --- messages of other children --------------------------------------------------------------------------------------


class ComparisonOutcome(_Message):
    """The comparison is complete: its table, and the stored files of its picture and report."""

    type: Literal["comparison-outcome"] = "comparison-outcome"
    picture: Digest
    report: Digest
    table: JsonObject


class ViewProgress(_Message):
    """The progress of a view: the finished `fraction` from 0 to 1, and the seconds left, or None if unknown."""

    type: Literal["view-progress"] = "view-progress"
    fraction: float
    eta_s: float | None


class ViewOutcome(_Message):
    """The view is complete. Only a learning curve also has a `picture`."""

    type: Literal["view-outcome"] = "view-outcome"
    file: Digest
    picture: Digest | None = None


class Failed(_Message):
    """The child cannot carry out its order. `error` is the `EspalierError.record` of the reason."""

    type: Literal["error"] = "error"
    error: JsonObject

    @classmethod
    def by(cls, error: EspalierError) -> Failed:
        """Return the message that reports an error."""
        return cls(error=error.record())

    def as_error(self) -> EspalierError:
        """Return the error, as an instance of its original class."""
        return from_record(self.error)


ChildMessage = IngestMessage | TrainMessage | ComparisonOutcome | ViewProgress | ViewOutcome | Failed


# --- lines -----------------------------------------------------------------------------------------------------------


def line_of(message: BaseModel) -> str:
    """Return a message as one line of JSON, including the newline."""
    return message.model_dump_json() + "\n"


def parse_child_message(line: str) -> ChildMessage:
    """Return the message in a line that a child sent. Raises Crashed if the line is not a message."""
    try:
        return _child_messages().validate_json(line)
    except ValidationError as error:
        raise Crashed(_unreadable("the child", line, error)) from error


def parse_worker_message(line: str) -> WorkerMessage:
    """Return the message in a line that the worker sent. Raises Crashed if the line is not a message."""
    try:
        return _worker_messages().validate_json(line)
    except ValidationError as error:
        raise Crashed(_unreadable("the worker", line, error)) from error


def _unreadable(sender: str, line: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return (
        f"Expected a message of worker.messages from {sender}. Received {line[:_SHOWN_CHARACTERS]!r}, "
        f"which is not valid: {first['msg']}{f' at {where}' if where else ''}. This is a bug."
    )


@cache
def _child_messages() -> TypeAdapter[ChildMessage]:
    return TypeAdapter(Annotated[ChildMessage, Field(discriminator="type")])


@cache
def _worker_messages() -> TypeAdapter[WorkerMessage]:
    return TypeAdapter(Annotated[WorkerMessage, Field(discriminator="type")])
