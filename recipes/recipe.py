"""The recipe of a run as a client writes it: every field, its values and its default. Trains nothing.

`recipes.defaults` fills in defaults that depend on the data set or on other fields. These types contain only values
that this version can train, so that the API refuses and does not document any others.
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
LARGEST_LOSS = 1e6
"""The largest value that early stopping compares losses with. It computes in float32, which ends at 3e38; a loss of
random weights is far below."""


class Mode(StrEnum):
    """Which part of a network is trained."""

    FEATURE_EXTRACTION = "feature-extraction"
    FINE_TUNING = "fine-tuning"
    FROM_SCRATCH = "from-scratch"


class Task(StrEnum):
    """What a model predicts."""

    MULTICLASS = "multiclass"
    BINARY = "binary"
    MULTILABEL = "multilabel"
    REGRESSION = "regression"


class Resize(StrEnum):
    """How an image is resized to the input size: stretched, cropped to its centre, or padded with black borders."""

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
    """The metric on the validation images that early stopping monitors."""

    VAL_LOSS = "val_loss"
    VAL_ACCURACY = "val_accuracy"


class TargetMetric(StrEnum):
    """The metric that a target is set on."""

    LOSS = "loss"
    ACCURACY = "accuracy"
    VAL_LOSS = "val_loss"
    VAL_ACCURACY = "val_accuracy"


class ClassWeights(StrEnum):
    """Weights of the classes in the loss; `auto` weights each class by the inverse of its share of the images."""

    AUTO = "auto"
    NONE = "none"


class Loss(StrEnum):
    """The loss of a network from scratch; `auto` follows the task."""

    AUTO = "auto"
    MEAN_SQUARED_ERROR = "mean_squared_error"


class Precision(StrEnum):
    """The arithmetic of the backbone; `int8` runs a quantised copy of it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class _EnumOrAuto:
    """A pydantic annotation that treats `auto` and the values of an enum as one enum, also in the OpenAPI schema."""

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


# Type aliases, so that each becomes a schema with a name in the OpenAPI document.
_BACKBONE_CHOICE = "A backbone, or `auto`: compare those whose weights are here and take the best."
_TASK_CHOICE = "A task, or `auto`: the task of the data set."
_PRECISION_CHOICE = (
    "A precision, or `auto`: compare those that the machine supports and take the fastest that scores as well."
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
    """The dense layers that are trained on the features. Without hidden layers the head is linear."""

    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(max_length=4, fail_fast=True)] = ()
    """Units of each hidden layer."""
    activation: Activation = Activation.RELU
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate before each layer during training."""
    l2: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """L2 regularisation: the factor of the squared weights in the loss."""


class OptimizerRecipe(Part):
    """The optimizer and its learning rate."""

    name: OptimizerName = OptimizerName.ADAM
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.001


class Target(Part):
    """A value at which training ends: when a loss falls to it, or an accuracy rises to it.

    The loss of a regression is measured on standardised numbers: always predicting the mean gives 1.
    """

    metric: TargetMetric
    value: Annotated[float, Field(ge=0, le=LARGEST_LOSS)]
    """An accuracy is at most 1."""


class EarlyStopping(Part):
    """When training ends early. The weights of the best epoch, or of the one that reached the target, are kept."""

    monitor: Monitor = Monitor.VAL_LOSS
    patience: Annotated[int, Field(ge=0, le=10_000)] = 5
    """Number of epochs without improvement after which training ends."""
    min_delta: Annotated[float, Field(ge=0, le=LARGEST_LOSS)] = 0.0
    """The smallest change that counts as an improvement."""
    target: Target | None = None


class Folds(Part):
    """Cross-validation, which measures the score."""

    k: Annotated[int, Field(ge=2, le=20)] | None = None
    """Number of folds. The default is 5, or fewer if the smallest class or label has fewer groups of images."""
    repeats: Annotated[int, Field(ge=1, le=20)] = 1
    """How many times the whole cross-validation is run, each time with other splits."""
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of the training images of a fold that early stopping monitors. None are set aside without it."""


class Augmentation(Part):
    """Random changes of the training images in every epoch. Flipping is off by default: it is wrong for digits."""

    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side, in degrees."""
    zoom: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest share by which an image is enlarged or shrunk."""
    shift: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest shift, as a share of the side of the image."""
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest change of brightness, as a share of white."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest share by which contrast is increased or reduced."""
    flip: bool = False
    """Whether images may be flipped from left to right."""


class FineTune(Part):
    """The second phase of fine-tuning, which trains layers of the backbone together with the head."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 20
    warmup_epochs: Annotated[int, Field(ge=0, le=1000)] = 1
    """Number of epochs in which the learning rate rises from zero. It then falls to zero along a cosine."""


class Recipe(Part):
    """Everything that a run does. Fields that are left out have defaults."""

    mode: Mode = Mode.FEATURE_EXTRACTION
    backbone: BackboneChoice | None = BackboneName.XCEPTION
    """`null` for a network from scratch. `auto` compares the backbones whose weights are here on a sample of the
    images: each at its last cut point, or at all of them if `features_from` is `auto`. The report shows the scores."""
    weights: Annotated[str, Field(pattern=NAME_PATTERN)] | None = IMAGENET
    """`imagenet`, `random`, or the name of weights that the operator imported."""
    features_from: str | None = None
    """The cut point whose output becomes the features. The default is the last; `auto` compares all of them on a
    sample of the images. GET /api/v1/backbones lists them."""
    network: NetworkRecipe | None = None
    """From scratch only: the network. The default is a small CNN; POST /api/v1/networks/preview shows its layers."""
    image_size: Sides | None = None
    """The size in pixels that images are resized to: the side of a square or, for a network from scratch,
    `[height, width]`. The default is that of the backbone, 64 for a CNN from scratch and 32 for other networks."""
    resize: Resize = Resize.SQUASH
    task: TaskChoice = AUTO
    head: HeadRecipe | None = HeadRecipe()
    """The layers that are trained on the features of the backbone; `null` for a network from scratch."""
    loss: Loss = Loss.AUTO
    """From scratch only. `auto` is cross-entropy for classes and labels, and mean squared error for numbers. Tasks
    binary and multilabel may also use the mean squared error of the sigmoid output."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    batch_size: Annotated[int, Field(ge=1, le=8192)] = 32
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 100
    early_stopping: EarlyStopping | None = EarlyStopping()
    """`null` trains all epochs and keeps the last weights."""
    folds: Folds = Folds()
    augmentation: Augmentation | None = None
    """Fine-tuning and networks from scratch only. Fine-tuning has a little rotation, zoom and brightness by default;
    `null` turns augmentation off. Feature extraction computes the features of each image once, without augmentation."""
    unfreeze: str | None = None
    """Fine-tuning only: the first cut point whose layers are trained, or `all`. The default is the last block of the
    network. The first cut point means `all`, since no layer is before it."""
    fine_tune: FineTune | None = None
    """Fine-tuning only: the second phase."""
    class_weights: ClassWeights = ClassWeights.NONE
    precision: PrecisionChoice = Precision.FLOAT32
    """The precision of the backbone in training and predictions. `auto` compares the precisions on the folds and takes
    the fastest whose score is at most half a point below that of `float32`. The report shows the scores."""
    recalibrate: bool = False
    """Whether to quantise the backbone anew on this data set. Existing models keep their quantised backbone."""
    neighbours: bool = False
    """Whether to keep the features of the training images, so that `?explain=neighbours` shows the training images that
    are most similar to a new image."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def flat(self) -> dict[str, Any]:
        """Return every value by its dotted path, such as `head.l2`."""
        return flat(self.model_dump(mode="json"))


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of a recipe in JSON by its dotted path, such as `head.l2`."""
    values: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values
