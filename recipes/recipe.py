"""What a run is asked to do: every field, its values and its default. Knows no data and trains nothing.

A recipe is parsed at the door and travels unchanged; `recipes.defaults` replaces "choose for me" by what the data set
allows.
Values that this version cannot train are not in these types, so that the door refuses them and the documentation
does not offer them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypeAliasType

from recipes.catalogue import BackboneName
from recipes.layers import Activation, NetworkRecipe, Part, Sides

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
IMAGENET, RANDOM = "imagenet", "random"
AUTO: Final = "auto"


class Mode(StrEnum):
    """How a network learns."""

    FEATURE_EXTRACTION = "feature-extraction"
    FINE_TUNING = "fine-tuning"
    FROM_SCRATCH = "from-scratch"


class Task(StrEnum):
    """What is predicted."""

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


class Loss(StrEnum):
    """What a network from scratch makes small; `auto` follows the task."""

    AUTO = "auto"
    MEAN_SQUARED_ERROR = "mean_squared_error"


class Precision(StrEnum):
    """The arithmetic of the backbone; `int8` is a quantised network, a file of its own."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class _EnumOrAuto:
    """Validates and documents the values of an enum and `auto` together, as if they were one enum."""

    def __init__(self, values: type[StrEnum], title: str, description: str) -> None:
        self._values = values
        self._title = title
        self._description = description

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        values = core_schema.literal_schema([AUTO, *(member.value for member in self._values)])
        return core_schema.no_info_after_validator_function(self._member, values)

    def _member(self, value: str) -> StrEnum | str:
        return value if value == AUTO else self._values(value)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        values = [AUTO, *(member.value for member in self._values)]
        return {"description": self._description, "enum": values, "title": self._title, "type": "string"}


# Aliases of a type, so that each is a schema of its own in the documentation of the API.
_BACKBONE_CHOICE = "The backbone that a recipe asks for; `auto` tries those whose weights are here, and takes the best."
_TASK_CHOICE = "The task that a recipe asks for; `auto` takes the data set's."
_PRECISION_CHOICE = (
    "The precision that a recipe asks for; `auto` tries those of the machine and takes the fastest that is as good."
)
BackboneChoice = TypeAliasType(
    "BackboneChoice",
    Annotated[BackboneName | Literal["auto"], _EnumOrAuto(BackboneName, "BackboneChoice", _BACKBONE_CHOICE)],
)
TaskChoice = TypeAliasType(
    "TaskChoice", Annotated[Task | Literal["auto"], _EnumOrAuto(Task, "TaskChoice", _TASK_CHOICE)]
)
PrecisionChoice = TypeAliasType(
    "PrecisionChoice",
    Annotated[Precision | Literal["auto"], _EnumOrAuto(Precision, "PrecisionChoice", _PRECISION_CHOICE)],
)


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
    """When a fit ends before its last epoch; the weights of its best epoch are restored, or of that at its target."""

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
    backbone: BackboneChoice | None = BackboneName.XCEPTION
    """`null` for a network from scratch. `auto` tries, on a sample, the last cut of each backbone whose weights are
    here, or all cuts with `features_from` `auto`; the report shows what it tried."""
    weights: Annotated[str, Field(pattern=NAME_PATTERN)] | None = IMAGENET
    """`imagenet`, `random`, or a name under which the operator imported weights."""
    features_from: str | None = None
    """The cut point whose output becomes the features; by default the last. `auto` tries all, on a sample. See GET
    /api/v1/backbones."""
    network: NetworkRecipe | None = None
    """From scratch only: the network; by default a small CNN. See POST /api/v1/networks/preview."""
    image_size: Sides | None = None
    """Side of the square in pixels that images are resized to; by default the backbone's own, for a CNN from scratch 64
    and for other networks 32. A network from scratch may also have `[height, width]`."""
    resize: Resize = Resize.SQUASH
    task: TaskChoice = AUTO
    head: HeadRecipe | None = HeadRecipe()
    """What learns on a backbone's features; a network from scratch has an output layer of its own."""
    loss: Loss = Loss.AUTO
    """From scratch only: cross-entropy for classes and labels and mean squared error for numbers, or mean squared error
    for a sigmoid output too (tasks binary and multilabel)."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    batch_size: Annotated[int, Field(ge=1, le=8192)] = 32
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 100
    early_stopping: EarlyStopping | None = EarlyStopping()
    """`null` trains every epoch and keeps the last weights."""
    folds: Folds = Folds()
    augmentation: Augmentation | None = None
    """Fine-tuning has by default a little rotation, zoom and brightness; `null` leaves images as they are. Features of
    a frozen backbone are computed once per image, so there is nothing to augment."""
    unfreeze: str | None = None
    """Fine-tuning only: the first cut that learns, or `all`, which is what the first cut of a network means; by default
    the last block of the network."""
    fine_tune: FineTune | None = None
    """Fine-tuning only: the second phase."""
    class_weights: ClassWeights = ClassWeights.NONE
    precision: PrecisionChoice = Precision.FLOAT32
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


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of a recipe in JSON by its path, such as `head.l2`."""
    values: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values
