"""The layers of networks: types for the layers that a recipe can list, and the default layers of each kind of network.

Some layer types occur only in backbones (`recipes.backbone_layers`), and a recipe cannot use them. `recipes.shapes`
computes the shapes of layers, and `training.networks.scratch_networks` builds networks from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

LAYER_NAME_PATTERN = r"^[a-z][a-z0-9_]{0,39}$"
INPUT = "input"
"""The name of the pixels, for layers that read them as their input."""
OUTPUT = "output"
"""The name of the output layer, which is not listed in a recipe because it depends on the task."""


class Part(BaseModel):
    """The base class of all parts of a recipe: immutable, and unknown fields are refused."""

    # A number such as 1e999 becomes infinity, which JSON cannot hold and the database refuses.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_truth(cls, values: object) -> object:
        """Refuse `true` and `false` where a number is expected: Python would count them as 1 and 0."""
        return refuse_truth(values, cls)


def refuse_truth(values: object, model: type[BaseModel]) -> object:
    """Return the values of a model. Raises ValidationError for fields with `true` or `false` that take neither."""
    wrong = [
        InitErrorDetails(type=_NO_TRUTH, loc=(name,), input=value)
        for name, value in (values.items() if isinstance(values, Mapping) else ())
        if isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(one, bool) for one in value))
        if name in model.model_fields and not _takes_truth(model.model_fields[name].annotation)
    ]
    if wrong:
        raise ValidationError.from_exception_data(model.__name__, wrong)
    return values


_NO_TRUTH = PydanticCustomError("no_truth", "Input should be no true or false")


def _takes_truth(annotation: object) -> bool:
    return annotation in (bool, Any) or any(_takes_truth(inner) for inner in get_args(annotation))


class Activation(StrEnum):
    """The activation function of a layer."""

    LINEAR = "linear"
    RELU = "relu"
    SIGMOID = "sigmoid"
    TANH = "tanh"


class NetworkKind(StrEnum):
    """A textbook network: one layer (Rosenblatt 1958), layers of units, or convolutions."""

    PERCEPTRON = "perceptron"
    MLP = "mlp"
    CNN = "cnn"


class Threshold(StrEnum):
    """The output of a perceptron during training: `step` gives 0 or 1, `sigmoid` a probability."""

    STEP = "step"
    SIGMOID = "sigmoid"


class Padding(StrEnum):
    """`valid` keeps windows inside the map; `same` adds zeros, so that a side becomes side / stride, rounded up."""

    VALID = "valid"
    SAME = "same"


class PoolingKind(StrEnum):
    """The value taken from each window: the largest, the mean, or one drawn by its size (Zeiler & Fergus 2013)."""

    MAX = "max"
    AVERAGE = "average"
    STOCHASTIC = "stochastic"


Side = Annotated[int, Field(ge=1, le=1024)]


def _is_pair(value: object) -> str:
    return "sides" if isinstance(value, list | tuple) else "side"


# The discriminator chooses one type before validation. Without it a bad number would give two errors.
Sides = Annotated[Annotated[Side, Tag("side")] | Annotated[tuple[Side, Side], Tag("sides")], Discriminator(_is_pair)]
"""The side of a square in pixels, or height and width."""


_Name = Annotated[str, Field(pattern=LAYER_NAME_PATTERN)]


class _Layer(Part):
    name: _Name | None = None
    """By default the type and a number, such as `convolution_1`."""
    inputs: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=16, fail_fast=True)] | None = None
    """Names of the layers that it reads, or `input`; by default the previous layer."""


class Convolution(_Layer):
    """Filters that slide over the map."""

    type: Literal["convolution"] = "convolution"
    filters: Annotated[int, Field(ge=1, le=4096)]
    kernel: Sides = 3
    stride: Sides = 1
    padding: Padding = Padding.VALID
    activation: Activation = Activation.RELU

    has_bias: ClassVar[bool] = True


class Pooling(_Layer):
    """One value for each window of each channel."""

    type: Literal["pooling"] = "pooling"
    kind: PoolingKind = PoolingKind.MAX
    size: Sides = 2
    stride: Sides | None = None
    """By default the size, so that windows touch."""
    padding: Padding = Padding.VALID


class Dropout(_Layer):
    """Sets a share of the values to zero while training."""

    type: Literal["dropout"] = "dropout"
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Flatten(_Layer):
    """Puts all values of all maps in a row."""

    type: Literal["flatten"] = "flatten"


class GlobalAverage(_Layer):
    """The mean of each channel."""

    type: Literal["global_average"] = "global_average"


class FullyConnected(_Layer):
    """Units that each read all values."""

    type: Literal["dense"] = "dense"
    units: Annotated[int, Field(ge=1, le=16_384)]
    activation: Activation = Activation.RELU


class BatchNormalization(_Layer):
    """Standardises each channel over the batch, then applies a learned scale and offset."""

    type: Literal["batch_normalization"] = "batch_normalization"

    # Moving mean, moving variance, scale and offset.
    numbers_per_channel: ClassVar[int] = 4


class Sum(_Layer):
    """The sum of branches of the same shape."""

    type: Literal["add"] = "add"
    activation: Activation = Activation.LINEAR


class Concatenation(_Layer):
    """The channels of branches, one after the other."""

    type: Literal["concatenate"] = "concatenate"


Layer = Annotated[
    Convolution
    | Pooling
    | Dropout
    | Flatten
    | GlobalAverage
    | FullyConnected
    | BatchNormalization
    | Sum
    | Concatenation,
    Field(discriminator="type"),
]


class BareConvolution(Convolution):
    """A convolution without bias and activation, since BatchNorm follows. Backbones only."""

    activation: Activation = Activation.LINEAR

    has_bias: ClassVar[bool] = False


class SeparableConvolution(_Layer):
    """A filter for each channel, then a 1×1 convolution, without bias (Chollet 2017). Backbones only."""

    type: Literal["separable_convolution"] = "separable_convolution"
    filters: int
    kernel: Sides = 3
    stride: Sides = 1
    padding: Padding = Padding.SAME


class ZeroPadding(_Layer):
    """Adds `width` zeros on each side of the map. Backbones only."""

    type: Literal["zero_padding"] = "zero_padding"
    width: int


class Rectifier(_Layer):
    """ReLU as a layer of its own. Backbones only."""

    type: Literal["activation"] = "activation"


class OffsetNormalization(BatchNormalization):
    """BatchNorm that learns no scale. Backbones only."""

    numbers_per_channel: ClassVar[int] = 3


AnyLayer = Layer | SeparableConvolution | ZeroPadding | Rectifier
"""A layer of any network, of a recipe or of a backbone."""

_Channels = Literal[1, 3]
_MOST_LAYERS = 200


class NetworkRecipe(Part):
    """A network that starts with random weights. Its output layer follows the task and is not among the layers."""

    kind: NetworkKind = NetworkKind.CNN
    layers: Annotated[tuple[Layer, ...], Field(max_length=_MOST_LAYERS, fail_fast=True)] | None = None
    """The layers between the pixels and the output layer; by default they follow from the kind and the image size. A
    perceptron has none."""
    channels: _Channels = 3
    """3 for colour, 1 for brightness only."""
    threshold: Threshold | None = None
    """Perceptron only: the output during training, by default `sigmoid`."""


def default_layers(kind: NetworkKind, height: int, width: int) -> tuple[Layer, ...]:
    """Return the default layers of a kind of network, for images of `height` × `width` pixels.

    A perceptron has no layers before its output. An MLP has one dense layer. A CNN alternates convolutions with
    pooling, which halves the maps, until the shorter side has at most 8 values. Then follows a dense layer.
    """
    match kind:
        case NetworkKind.PERCEPTRON:
            return ()
        case NetworkKind.MLP:
            return (FullyConnected(units=128), Dropout(rate=0.2))
        case NetworkKind.CNN:
            layers: list[Layer] = []
            filters, side = 16, min(height, width)
            while True:
                layers.append(Convolution(filters=filters, padding=Padding.SAME))
                if side <= _SMALL:
                    break
                layers.append(Pooling())
                filters, side = min(2 * filters, _WIDEST), side // 2
            return (*layers, Flatten(), Dropout(rate=0.3), FullyConnected(units=64))


_SMALL, _WIDEST = 8, 64


def named(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return copies of the layers in which every layer has a name and the names of its inputs."""
    taken = {layer.name for layer in layers} | {INPUT}
    found: list[Layer] = []
    counts: dict[str, int] = {}
    before = INPUT
    for layer in layers:
        name = layer.name
        while name is None:
            counts[layer.type] = counts.get(layer.type, 0) + 1
            candidate = f"{layer.type}_{counts[layer.type]}"
            name = candidate if candidate not in taken else None
        found.append(layer.model_copy(update={"name": name, "inputs": layer.inputs or (before,)}))
        before = name
    return tuple(found)


def sides(size: Sides) -> tuple[int, int]:
    """Return height and width; a single number is both."""
    return (size, size) if isinstance(size, int) else size
