"""Computes shapes, parameters and receptive fields of a network, layer by layer, before training. Knows no Keras.

Shapes (Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning"): a window of n pixels and stride s
on a side of m pixels gives floor((m - n) / s) + 1 values without padding, and ceil(m / s) with padding `same`.

Receptive fields (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks"): the jump is the
distance in pixels between the receptive fields of two neighbouring values. A layer with window n, stride s and p pixels
of padding moves the start of the field by -p * jump, makes the field (n - 1) * jump pixels longer, and multiplies the
jump by s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from errors import RecipeInvalid
from recipes.backbone_layers import backbone_layers
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.layers import (
    INPUT,
    OUTPUT,
    AnyLayer,
    BatchNormalization,
    Concatenation,
    Convolution,
    Dropout,
    Flatten,
    FullyConnected,
    GlobalAverage,
    Layer,
    NetworkKind,
    NetworkRecipe,
    Padding,
    Pooling,
    PoolingKind,
    Rectifier,
    SeparableConvolution,
    Sum,
    ZeroPadding,
    default_layers,
    named,
    sides,
)

MOST_PARAMETERS = 100_000_000
MOST_VALUES = 64_000_000
"""The most values of one layer for one image. They take 256 MB, times the batch size."""

MOST_WINDOW_PIXELS = 64
"""The most pixels in a window of stochastic pooling, which copies the map once for each pixel of the window."""

Shape = tuple[int, ...]
"""Height, width and channels of maps, or the number of values in a row."""
_Pair = tuple[int, int]
"""A vertical and a horizontal number, such as a stride."""


@dataclass(frozen=True)
class Span:
    """The receptive field of the first value of a map, along one side of the image. All fields are in pixels.

    Pixels are numbered from 0 at the border of the image. Pixels in the padding before the image have negative numbers.

    Attributes:
        first: number of the first pixel of the receptive field.
        last: number of the last pixel of the receptive field.
        jump: how many pixels further the receptive field of the next value starts.
    """

    first: int = 0
    last: int = 0
    jump: int = 1

    @property
    def pixels(self) -> int:
        """Length of the receptive field in pixels, including padding."""
        return self.last - self.first + 1

    def through(self, window: int, stride: int, padding: int) -> Span:
        """Return the span after a convolution or pooling layer.

        Args:
            window: pixels of the kernel or pooling window along this side.
            stride: stride along this side.
            padding: number of zeros that the layer adds before the map.
        """
        first = self.first - padding * self.jump
        return Span(first, first + self.last - self.first + (window - 1) * self.jump, self.jump * stride)

    def joined(self, other: Span) -> Span:
        """Return the span of a value that depends on two branches.

        If the jumps of the branches differ, the result is only right for the first value of the map.
        """
        return Span(min(self.first, other.first), max(self.last, other.last), max(self.jump, other.jump))


@dataclass(frozen=True)
class ReceptiveField:
    """The rectangle of image pixels that one value of a map depends on, as a vertical and a horizontal span."""

    down: Span = Span()
    across: Span = Span()

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.down.pixels

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.across.pixels

    def through(self, window: _Pair, stride: _Pair, padding: _Pair) -> ReceptiveField:
        """Return the receptive field after a convolution or pooling layer; arguments as in `Span.through`."""
        return ReceptiveField(
            self.down.through(window[0], stride[0], padding[0]), self.across.through(window[1], stride[1], padding[1])
        )

    def joined(self, other: ReceptiveField) -> ReceptiveField:
        """Return the receptive field of a value that depends on two branches; see `Span.joined`."""
        return ReceptiveField(self.down.joined(other.down), self.across.joined(other.across))


@dataclass(frozen=True)
class Row:
    """One layer of a network, as a row of its table.

    Attributes:
        name: name of the layer.
        type: type of the layer, as in a recipe.
        inputs: names of the layers whose output this layer reads.
        shape: height, width and channels, or the number of values.
        parameters: number of weights, including the moving mean and variance of BatchNorm.
        multiply_adds: multiply-adds of a convolution or dense layer for one image, without biases.
        receptive_field: the pixels of the image that one value depends on, including padding.
        warning: a sentence on rows and columns that no window of the layer reaches; None if there are none.
        zeros: number of rows and columns of zeros at the end of the map. A later layer may skip them without a warning.
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    shape: Shape
    parameters: int = 0
    multiply_adds: int = 0
    receptive_field: ReceptiveField = ReceptiveField()
    warning: str | None = None
    zeros: _Pair = (0, 0)


def default_size(kind: NetworkKind) -> int:
    """Return the default image size of a network from scratch: the side of a square in pixels."""
    return 64 if kind is NetworkKind.CNN else 32


def filled_network(network: NetworkRecipe, height: int, width: int, outputs: int | None = None) -> NetworkRecipe:
    """Return the network with its default layers filled in, and with a name for every layer.

    Args:
        network: the network of a recipe.
        height: height of the images in pixels.
        width: width of the images in pixels.
        outputs: size of the output layer, whose parameters then count for the limit; by default they do not.

    Raises:
        RecipeInvalid: the network does not fit its kind or the images, or is too large.
    """
    if network.kind is NetworkKind.PERCEPTRON and network.layers:
        raise RecipeInvalid(
            "network.layers",
            "A perceptron has only its output layer, so this field must be empty. For more layers, use kind 'mlp' or "
            "'cnn'.",
        )
    if network.kind is not NetworkKind.PERCEPTRON and network.threshold is not None:
        raise RecipeInvalid("network.threshold", "Only a perceptron has a threshold, so this field must be null.")
    layers = named(network.layers if network.layers is not None else default_layers(network.kind, height, width))
    allowed = _ALLOWED[network.kind]
    for number, layer in enumerate(layers):
        if layer.type not in allowed:
            raise _refusal(
                number, layer, f"A network of kind {network.kind.value!r} can only have layers: {', '.join(allowed)}."
            )
    network = network.model_copy(update={"layers": layers})
    table(network, height, width, outputs)
    return network


_ALLOWED: Mapping[NetworkKind, Sequence[str]] = {
    NetworkKind.PERCEPTRON: (),
    NetworkKind.MLP: ("dense", "dropout", "batch_normalization"),
    NetworkKind.CNN: (
        "convolution",
        "pooling",
        "dropout",
        "flatten",
        "global_average",
        "dense",
        "batch_normalization",
        "add",
        "concatenate",
    ),
}


def chain(network: NetworkRecipe) -> tuple[Layer, ...]:
    """Return all layers between the pixels and the output layer. Except in a CNN, a flatten layer comes first."""
    layers = network.layers or ()
    if network.kind is NetworkKind.CNN:
        return layers
    row = Flatten(name=_ROW, inputs=(INPUT,))
    return (row, *(layer.model_copy(update={"inputs": _with_row(layer)}) for layer in layers))


_ROW = "pixels"


def _with_row(layer: Layer) -> tuple[str, ...]:
    return tuple(_ROW if name == INPUT else name for name in layer.inputs or ())


def table(network: NetworkRecipe, height: int, width: int, outputs: int | None = None) -> list[Row]:
    """Return the layers of a filled network with their shapes, the pixels first.

    Args:
        network: the network.
        height: height of the images in pixels.
        width: width of the images in pixels.
        outputs: size of the output layer, which becomes the last row; by default the table has no output layer.

    Raises:
        RecipeInvalid: a layer does not fit its inputs, or the network is too large; the error names the layer.
    """
    layers = chain(network)
    own = len(network.layers or ())
    pixels = Row(INPUT, INPUT, (), (height, width, network.channels))
    rows = _rows(layers, pixels, own)
    for number, (layer, row) in enumerate(zip(layers, rows[1:], strict=True), start=own - len(layers)):
        if prod(row.shape) > MOST_VALUES:
            raise _refusal(
                number, layer, f"The output has {prod(row.shape):,} values. At most {MOST_VALUES:,} are supported."
            )
    if len(rows[-1].shape) > 1:
        if not layers:
            raise RecipeInvalid(
                "network.layers", "A CNN needs at least one layer. Add layers that end in flatten or global_average."
            )
        raise _refusal(
            own - 1, layers[-1], "The network still has maps at the end. Add a flatten or a global_average layer."
        )
    rows += _output(rows, outputs)
    _check_parameters(rows)
    return rows


def backbone_table(name: BackboneName, cut: str | None, size: int | None, outputs: int | None = None) -> list[Row]:
    """Return the layers of a backbone with their shapes, from the pixels to its features.

    Args:
        name: the backbone.
        cut: the cut point that features are taken from; by default the last.
        size: side of the images in pixels; by default the backbone's own.
        outputs: size of an output layer on the features, which becomes the last row; by default there is none.

    Raises:
        RecipeInvalid: the backbone has no such cut, or needs larger images.
    """
    cut, size = CATALOGUE[name].fitted(cut, size)
    layers = backbone_layers(name, cut)
    features = GlobalAverage(name=_FEATURES, inputs=(layers[-1].name or INPUT,))
    rows = _rows((*layers, features), Row(INPUT, INPUT, (), (size, size, 3)), len(layers) + 1)
    return rows + _output(rows, outputs)


_FEATURES = "features"


def _rows(layers: Sequence[AnyLayer], pixels: Row, own: int) -> list[Row]:
    """Return a row for the pixels and a row for each layer.

    Args:
        layers: the layers in order.
        pixels: the row of the pixels.
        own: how many of the layers the recipe lists; they are the last ones, and errors count from the first of them.

    Raises:
        RecipeInvalid: a layer does not fit; the error names the layer.
    """
    rows = [pixels]
    at = {INPUT: pixels}
    unread = {layer.name for layer in layers[:-1]}
    for number, layer in enumerate(layers, start=own - len(layers)):
        assert layer.name is not None and layer.inputs is not None
        if layer.name in at or layer.name == OUTPUT:
            raise _refusal(
                number, layer, "This name is reserved or used by another layer. Choose another name.", "name"
            )
        unknown = [name for name in layer.inputs if name not in at]
        if unknown:
            raise _refusal(
                number,
                layer,
                f"There is no layer {unknown[0]!r} before this one. It can read: {', '.join(at)}.",
                "inputs",
            )
        unread -= set(layer.inputs)
        row = _row(number, layer, [at[name] for name in layer.inputs], _whole(pixels))
        at[layer.name] = row
        rows.append(row)
    if unread:
        numbered = enumerate(layers, start=own - len(layers))
        number, layer = next((number, layer) for number, layer in numbered if layer.name in unread)
        raise _refusal(
            number,
            layer,
            "No later layer reads the output of this one. Remove this layer, or use its output.",
            "inputs",
        )
    return rows


def _whole(pixels: Row) -> ReceptiveField:
    height, width, _ = pixels.shape
    return ReceptiveField(Span(last=height - 1), Span(last=width - 1))


def _output(rows: Sequence[Row], outputs: int | None) -> list[Row]:
    """Return the row of the output layer in a list; an empty list if `outputs` is None."""
    if outputs is None:
        return []
    layer = FullyConnected(name=OUTPUT, inputs=(rows[-1].name,), units=outputs)
    return [_row(len(rows), layer, [rows[-1]], _whole(rows[0]))]


def _check_parameters(rows: Sequence[Row]) -> None:
    """Check that a network has no more than MOST_PARAMETERS parameters. Raises RecipeInvalid."""
    total = sum(row.parameters for row in rows)
    if total > MOST_PARAMETERS:
        largest = max(rows, key=lambda row: row.parameters)
        raise RecipeInvalid(
            "network.layers",
            f"The network has {total:,} parameters. At most {MOST_PARAMETERS:,} are supported. Layer {largest.name!r} "
            f"alone has {largest.parameters:,}. Use smaller images, or add pooling before this layer.",
        )


def _refusal(number: int, layer: AnyLayer, detail: str, field: str | None = None) -> RecipeInvalid:
    where = f"network.layers[{number}]" + (f".{field}" if field else "")
    return RecipeInvalid(where, f"Layer {layer.name!r} ({layer.type}): {detail}")


def _row(number: int, layer: AnyLayer, read: Sequence[Row], whole: ReceptiveField) -> Row:
    """Return the table row of a layer: shape, parameters, receptive field. Raises RecipeInvalid if it does not fit.

    `read` has the rows of the layers that are its inputs.
    """

    def refuse(detail: str, field: str | None = None) -> RecipeInvalid:
        return _refusal(number, layer, detail, field)

    is_joining = isinstance(layer, Sum | Concatenation)
    if is_joining != (len(read) > 1):
        if is_joining:
            raise refuse(f"This layer needs at least two input layers. Received {len(read)}.", "inputs")
        raise refuse(
            f"This layer can have one input layer. Received {len(read)}. Join the branches by an add or concatenate "
            "layer first.",
            "inputs",
        )
    one = read[0]
    about = (layer.name or "", layer.type, tuple(row.name for row in read))
    field = one.receptive_field
    match layer:
        case Convolution() | SeparableConvolution():
            height, width, channels = _maps(one, refuse)
            kernel, stride = sides(layer.kernel), sides(layer.stride)
            left, receptive_field = _apply_windows(one, kernel, stride, layer.padding)
            if min(left) < 1:
                raise refuse(_too_large("kernel", kernel, (height, width)), "kernel")
            if isinstance(layer, Convolution):
                weights = prod(kernel) * channels * layer.filters
                biases = layer.filters if layer.has_bias else 0
            else:
                weights = prod(kernel) * channels + channels * layer.filters
                biases = 0
            return Row(*about, (*left, layer.filters), weights + biases, prod(left) * weights, receptive_field)
        case Pooling():
            height, width, channels = _maps(one, refuse)
            size, stride = sides(layer.size), sides(layer.stride or layer.size)
            left, receptive_field = _apply_windows(one, size, stride, layer.padding)
            if min(left) < 1:
                raise refuse(_too_large("window", size, (height, width)), "size")
            copied = prod(size) * prod(left) * channels
            if layer.kind is PoolingKind.STOCHASTIC and (prod(size) > MOST_WINDOW_PIXELS or copied > MOST_VALUES):
                raise refuse(
                    f"Stochastic pooling supports windows of at most {MOST_WINDOW_PIXELS} pixels, with at most "
                    f"{MOST_VALUES:,} values in all windows together. This layer has windows of {prod(size)} pixels "
                    f"with {copied:,} values.",
                    "size",
                )
            warning = _border(one, size, stride) if layer.padding is Padding.VALID else None
            return Row(*about, (*left, channels), receptive_field=receptive_field, warning=warning)
        case ZeroPadding():
            height, width, channels = _maps(one, refuse)
            added = (layer.width, layer.width)
            shape = (height + 2 * layer.width, width + 2 * layer.width, channels)
            return Row(*about, shape, receptive_field=field.through((1, 1), (1, 1), added), zeros=added)
        case Dropout() | Rectifier():
            return Row(*about, one.shape, receptive_field=field)
        case Flatten():
            # Flattening does not change the receptive field of a value.
            return Row(*about, (prod(one.shape),), receptive_field=field)
        case GlobalAverage():
            _maps(one, refuse)
            return Row(*about, one.shape[-1:], receptive_field=whole)
        case FullyConnected():
            if len(one.shape) > 1:
                raise refuse(
                    f"It reads a vector, but {one.name!r} gives maps. Put flatten or global_average between the two."
                )
            weights = one.shape[0] * layer.units
            return Row(*about, (layer.units,), weights + layer.units, weights, whole)
        case BatchNormalization():
            return Row(*about, one.shape, layer.numbers_per_channel * one.shape[-1], receptive_field=field)
        case Sum() | Concatenation():
            return Row(*about, _joined(layer, read, refuse), receptive_field=_joined_field(read))


def windows(sides: _Pair, window: _Pair, stride: _Pair, padding: Padding) -> _Pair:
    """Return how many windows fit vertically and horizontally; below 1 if the window is larger than the map."""
    if padding is Padding.SAME:
        return -(-sides[0] // stride[0]), -(-sides[1] // stride[1])
    return (sides[0] - window[0]) // stride[0] + 1, (sides[1] - window[1]) // stride[1] + 1


def _apply_windows(read: Row, window: _Pair, stride: _Pair, padding: Padding) -> tuple[_Pair, ReceptiveField]:
    """Return how many windows fit on a map, vertically and horizontally, and the receptive field of a window."""
    height, width, _ = read.shape
    sides = windows((height, width), window, stride, padding)
    zeros = (0, 0)
    if padding is Padding.SAME:
        zeros = (
            _zeros_before(height, sides[0], window[0], stride[0]),
            _zeros_before(width, sides[1], window[1], stride[1]),
        )
    return sides, read.receptive_field.through(window, stride, zeros)


def _zeros_before(side: int, windows: int, window: int, stride: int) -> int:
    """Return how many zeros padding `same` adds before the map: half of all zeros, rounded down."""
    return max((windows - 1) * stride + window - side, 0) // 2


def _maps(row: Row, refuse: Callable[..., RecipeInvalid]) -> Shape:
    if len(row.shape) != 3:
        raise refuse(f"It reads maps, but {row.name!r} gives a vector of {row.shape[0]:,} values.", "inputs")
    return row.shape


def _too_large(name: str, window: _Pair, sides: _Pair) -> str:
    return (
        f"The {name} of {window[0]}×{window[1]} is larger than the map of {sides[0]}×{sides[1]} that it reads. Use "
        f"larger images, a smaller {name}, padding 'same', or less pooling before this layer."
    )


def _border(read: Row, size: _Pair, stride: _Pair) -> str | None:
    """Return a sentence on the last rows and columns that no window reaches; None if windows reach all of them."""
    height, width, _ = read.shape
    rows = (height - size[0]) % stride[0] - read.zeros[0]
    columns = (width - size[1]) % stride[1] - read.zeros[1]
    lost = [
        f"{count} {name}{'s' if count > 1 else ''}" for count, name in ((rows, "row"), (columns, "column")) if count > 0
    ]
    if not lost:
        return None
    return f"Leaves out the last {' and '.join(lost)} of a map of {height}×{width}."


def _joined(layer: Sum | Concatenation, read: Sequence[Row], refuse: Callable[..., RecipeInvalid]) -> Shape:
    first = read[0].shape
    depth = sum(row.shape[-1] for row in read) if isinstance(layer, Concatenation) else first[-1]
    for row in read[1:]:
        fits = row.shape[:-1] == first[:-1] and len(row.shape) == len(first)
        if not fits or (isinstance(layer, Sum) and row.shape != first):
            raise refuse(
                f"Its inputs must have the same {'height and width' if isinstance(layer, Concatenation) else 'shape'}, "
                f"but {read[0].name!r} has {written(first)} and {row.name!r} has {written(row.shape)}.",
                "inputs",
            )
    return (*first[:-1], depth)


def _joined_field(read: Sequence[Row]) -> ReceptiveField:
    field = read[0].receptive_field
    for row in read[1:]:
        field = field.joined(row.receptive_field)
    return field


def written(shape: Shape) -> str:
    """Return a shape as text, such as `32×32×3`."""
    return "×".join(str(side) for side in shape)
