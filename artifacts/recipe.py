"""What a run is asked to do: every field, its values and its default. Knows no data and trains nothing.

A recipe is parsed at the door and travels unchanged; `fill` replaces "choose for me" by what the data set allows.
Values that this version cannot train are not in these types, so that the door refuses them and the documentation
does not offer them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from artifacts.catalogue import ALL, CATALOGUE, BackboneName
from artifacts.layers import Activation, Part
from errors import RecipeInvalid

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
IMAGENET, RANDOM = "imagenet", "random"


class Mode(StrEnum):
    """How a network learns."""

    FEATURE_EXTRACTION = "feature-extraction"
    FINE_TUNING = "fine-tuning"


class Task(StrEnum):
    """What is predicted."""

    MULTICLASS = "multiclass"
    BINARY = "binary"
    MULTILABEL = "multilabel"
    REGRESSION = "regression"


class TaskChoice(StrEnum):
    """The task that a recipe asks for; `auto` takes the data set's."""

    AUTO = "auto"
    MULTICLASS = "multiclass"
    BINARY = "binary"
    MULTILABEL = "multilabel"
    REGRESSION = "regression"


class Resize(StrEnum):
    """How an image becomes a square: stretched, cut to its centre, or given black borders."""

    SQUASH = "squash"
    CROP = "crop"
    PAD = "pad"


class OptimizerName(StrEnum):
    """An update rule; `momentum` and `nesterov` are stochastic gradient descent with momentum 0.9."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    NESTEROV = "nesterov"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"
    ADAM = "adam"
    ADAMW = "adamw"


class Monitor(StrEnum):
    """What early stopping watches on the validation split."""

    VAL_LOSS = "val_loss"
    VAL_ACCURACY = "val_accuracy"


class TargetMetric(StrEnum):
    """What a target may be set on."""

    LOSS = "loss"
    ACCURACY = "accuracy"
    VAL_LOSS = "val_loss"
    VAL_ACCURACY = "val_accuracy"


class ClassWeights(StrEnum):
    """`auto` weighs each class by the inverse of its share."""

    AUTO = "auto"
    NONE = "none"


class Precision(StrEnum):
    """The arithmetic of the backbone; `int8` is a quantised network, a file of its own."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class PrecisionChoice(StrEnum):
    """The precision that a recipe asks for; `auto` tries those of the machine and takes the fastest that is as good."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class HeadRecipe(Part):
    """The trained part: dense layers on the features. Without hidden layers it is linear."""

    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(max_length=4)] = ()
    """Units of each hidden layer."""
    activation: Activation = Activation.RELU
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of inputs dropped before each layer while training."""
    l2: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """Weight of the squared weights in the loss."""


class OptimizerRecipe(Part):
    """How weights are updated."""

    name: OptimizerName = OptimizerName.ADAM
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.001


class Target(Part):
    """A value at which training may end: losses from above, accuracies from below.

    A regression's losses are of standardised numbers: 1 is what answering the mean always would give.
    """

    metric: TargetMetric
    value: float


class EarlyStopping(Part):
    """When a fit ends before its last epoch; the weights of its best epoch are restored."""

    monitor: Monitor = Monitor.VAL_LOSS
    patience: Annotated[int, Field(ge=0, le=10_000)] = 5
    """Epochs without improvement that are waited for."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The least change that counts as an improvement."""
    target: Target | None = None


class Folds(Part):
    """How the score is measured."""

    k: Annotated[int, Field(ge=2, le=20)] | None = None
    """Number of folds; by default 5, or fewer if the smallest class or label has fewer groups of images."""
    repeats: Annotated[int, Field(ge=1, le=20)] = 1
    """How often the whole k-fold evaluation is repeated with other splits."""
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of a fold's training images that early stopping watches; without early stopping none are set aside."""


class Augmentation(Part):
    """How training images are varied, each time anew. Flipping is only done if asked for: it is wrong for digits."""

    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side."""
    zoom: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest share by which an image is enlarged or made smaller."""
    shift: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest share of its side by which an image is moved."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest change of brightness, as a share of white."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest share by which contrast is raised or lowered."""
    flip: bool = False
    """Whether left and right may be exchanged."""


class FineTune(Part):
    """The second phase of fine-tuning, in which layers of the network learn as well as the head."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 20
    warmup_epochs: Annotated[int, Field(ge=0, le=1000)] = 1
    """Epochs over which the learning rate rises from zero; after them it falls along a cosine."""


class Recipe(Part):
    """Everything that a run is asked to do."""

    mode: Mode = Mode.FEATURE_EXTRACTION
    backbone: BackboneName = BackboneName.XCEPTION
    weights: Annotated[str, Field(pattern=NAME_PATTERN)] = IMAGENET
    """`imagenet`, `random`, or a name under which the operator imported weights."""
    features_from: str | None = None
    """The cut point whose output becomes the features; by default the last. See GET /api/v1/backbones."""
    image_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Side of the square in pixels that images are resized to; by default the backbone's own."""
    resize: Resize = Resize.SQUASH
    task: TaskChoice = TaskChoice.AUTO
    head: HeadRecipe = HeadRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    batch_size: Annotated[int, Field(ge=1, le=8192)] = 32
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 100
    early_stopping: EarlyStopping | None = EarlyStopping()
    """`null` trains every epoch and keeps the last weights."""
    folds: Folds = Folds()
    augmentation: Augmentation | None = None
    """Fine-tuning only, and there by default a little rotation, zoom and brightness; `null` leaves images as they are.
    Features of a frozen backbone are computed once per image, so there is nothing to augment."""
    unfreeze: str | None = None
    """Fine-tuning only: the first cut that learns, or `all`; by default the last block of the network."""
    fine_tune: FineTune | None = None
    """Fine-tuning only: the second phase."""
    class_weights: ClassWeights = ClassWeights.NONE
    precision: PrecisionChoice = PrecisionChoice.FLOAT32
    """The arithmetic of the backbone, for training and answers alike. `auto` measures each on the folds and takes the
    fastest whose score is at most half a point below that of `float32`; the report shows what it tried."""
    recalibrate: bool = False
    """Whether to quantise the backbone anew, on this data set; models made before keep the one they have."""
    neighbours: bool = False
    """Whether to keep what the training images look like to the network, so that `?explain=neighbours` shows those that
    are nearest to a new one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def flat(self) -> dict[str, Any]:
        """Return every value by its path, such as `head.l2`."""
        return flat(self.model_dump(mode="json"))


@dataclass(frozen=True)
class ClassCount:
    """A class of a data set version: its images, and how many groups of them can be folded.

    An image without a group is a group of its own; test and validation images are in no fold.
    """

    name: str
    images: int
    groups: int


def fill(recipe: Recipe, task: Task, classes: Sequence[ClassCount], groups: int = 0) -> Recipe:
    """Return the recipe with every default filled in for a data set.

    Args:
        recipe: what was asked for.
        task: what the data set is for.
        classes: its classes or labels; none for a regression.
        groups: how many groups of images can be folded; only asked for where there are no classes.

    Raises:
        RecipeInvalid: the recipe does not fit itself or the data set; it names the field.
    """
    backbone = CATALOGUE[recipe.backbone]
    size = recipe.image_size or backbone.size
    if size < backbone.minimum_size:
        raise RecipeInvalid(
            "image_size",
            f"Expected at least {backbone.minimum_size} pixels for {backbone.title}. Received {size}.",
        )
    cut = backbone.last_cut if recipe.features_from is None else recipe.features_from
    if cut not in backbone.cuts:
        raise RecipeInvalid(
            "features_from",
            f"Expected a cut point of {backbone.title} ({', '.join(backbone.cuts)}). Received {cut!r}.",
        )
    chosen = _filled_task(recipe.task, task, classes)
    _check_task_fits(recipe, chosen)
    _check_recalibrate(recipe)
    return recipe.model_copy(
        update={
            "image_size": size,
            "features_from": cut,
            **_filled_tuning(recipe, cut),
            "task": TaskChoice(chosen.value),
            "folds": recipe.folds.model_copy(update={"k": _filled_k(recipe.folds.k, classes, groups)}),
        }
    )


def _check_recalibrate(recipe: Recipe) -> None:
    """See that there is something to calibrate. Raises RecipeInvalid."""
    if recipe.recalibrate and recipe.precision not in (PrecisionChoice.INT8, PrecisionChoice.AUTO):
        raise RecipeInvalid(
            "recalibrate", f"Expected false with precision {recipe.precision.value!r}: only int8 is calibrated."
        )
    if recipe.recalibrate and recipe.mode is Mode.FINE_TUNING:
        raise RecipeInvalid("recalibrate", "Expected false: a network that has learned is calibrated anew anyway.")


_LITTLE = Augmentation(rotate_degrees=10.0, zoom=0.1, brightness=0.1)


def _filled_tuning(recipe: Recipe, cut: str) -> dict[str, object]:
    """Return what concerns fine-tuning alone, filled in. Raises RecipeInvalid for it in another mode."""
    given = {name: getattr(recipe, name) for name in ("augmentation", "unfreeze", "fine_tune")}
    if recipe.mode is not Mode.FINE_TUNING:
        for name, value in given.items():
            if value is not None:
                raise RecipeInvalid(name, f"Expected null: this is for mode {Mode.FINE_TUNING.value!r} alone.")
        return given
    backbone = CATALOGUE[recipe.backbone]
    cuts = list(backbone.cuts)
    allowed = [*cuts[: cuts.index(cut) + 1], ALL]
    unfreeze = cut if recipe.unfreeze is None else recipe.unfreeze
    if unfreeze not in allowed:
        raise RecipeInvalid(
            "unfreeze",
            f"Expected a cut point of {backbone.title} up to {cut!r}, where features are taken from, or {ALL!r} "
            f"({', '.join(allowed)}). Received {unfreeze!r}.",
        )
    return {
        "augmentation": recipe.augmentation if "augmentation" in recipe.model_fields_set else _LITTLE,
        "unfreeze": unfreeze,
        "fine_tune": recipe.fine_tune or FineTune(),
    }


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of a recipe in JSON by its path, such as `head.l2`."""
    values: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


_DEFAULT_K = 5


def _filled_task(wanted: TaskChoice, task: Task, classes: Sequence[ClassCount]) -> Task:
    allowed = {
        Task.BINARY: [Task.BINARY, Task.MULTICLASS, Task.MULTILABEL],
        Task.MULTICLASS: [Task.MULTICLASS, Task.MULTILABEL],
    }.get(task, [task])
    chosen = task if wanted is TaskChoice.AUTO else Task(wanted.value)
    if chosen not in allowed:
        raise RecipeInvalid(
            "task",
            f"Expected {' or '.join(repr(choice.value) for choice in allowed)} for a data set of task {task.value!r} "
            f"with {len(classes)} classes. Received {wanted.value!r}.",
        )
    return chosen


def _check_task_fits(recipe: Recipe, task: Task) -> None:
    """See that nothing is asked for that the task has not. Raises RecipeInvalid."""
    if recipe.class_weights is not ClassWeights.NONE and task not in (Task.BINARY, Task.MULTICLASS):
        raise RecipeInvalid(
            "class_weights",
            f"Expected 'none' for task {task.value!r}, whose images have no one class. Received "
            f"{recipe.class_weights.value!r}.",
        )
    stopping = recipe.early_stopping
    if task is not Task.REGRESSION or stopping is None:
        return
    if stopping.monitor is Monitor.VAL_ACCURACY:
        raise RecipeInvalid("early_stopping.monitor", "Expected 'val_loss': a regression has no accuracy.")
    if stopping.target and stopping.target.metric in (TargetMetric.ACCURACY, TargetMetric.VAL_ACCURACY):
        raise RecipeInvalid("early_stopping.target.metric", "Expected a loss: a regression has no accuracy.")


def _filled_k(k: int | None, classes: Sequence[ClassCount], groups: int) -> int:
    if not classes:
        return _checked_k(k, groups, "the data set", f"The data set has {groups}. Add images.")
    smallest = min(classes, key=lambda count: count.groups)
    name = f"class {smallest.name!r}"
    has = f"Class {smallest.name!r} has {smallest.groups} (of {smallest.images} images). Add images of it."
    return _checked_k(k, smallest.groups, name, has)


def _checked_k(k: int | None, groups: int, name: str, has: str) -> int:
    if groups < 2:
        raise RecipeInvalid(
            "dataset",
            f"Expected at least 2 images of {name} that do not belong together, to train on one and test on the other. "
            f"{has}",
        )
    if k is not None and k > groups:
        raise RecipeInvalid(
            "folds.k",
            f"Expected at most {groups} folds: {name} has no more images that do not belong together. Received {k}.",
        )
    return k or min(_DEFAULT_K, groups)
