"""Works out the shapes of a network layer by layer, before anything is trained. Knows no Keras.

Sides of maps: floor((m - n) / s) + 1 for a window of n pixels every s on m without padding, ceil(m / s) with padding
`same` (Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning"). A receptive field begins
p * jump earlier for p pixels of padding and grows by (n - 1) * jump, and the jump between neighbours by the factor s
(Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks").
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
"""Of one layer for one image: 256 MB, before it is multiplied by the batch."""

MOST_PLACES = 64
"""Of a window that stochastic pooling draws from: each of its places is a copy of the map."""

Shape = tuple[int, ...]
"""Height, width and channels of maps, or the number of values in a row."""
_Pair = tuple[int, int]
"""Down and across."""


@dataclass(frozen=True)
class Span:
    """Pixels that the first value of a map sees along one side of the image, zeros beyond its border included.

    Attributes:
        first: the first of them, negative before the border.
        last: the last of them.
        jump: how many pixels further the value beside it looks.
    """

    first: int = 0
    last: int = 0
    jump: int = 1

    @property
    def pixels(self) -> int:
        """How many they are."""
        return self.last - self.first + 1

    def through(self, window: int, stride: int, padding: int) -> Span:
        """Return what a value sees behind windows, the first of which begins in so many zeros."""
        first = self.first - padding * self.jump
        return Span(first, first + self.last - self.first + (window - 1) * self.jump, self.jump * stride)

    def joined(self, other: Span) -> Span:
        """Return what a value sees that depends on two; where they jump apart, it is that of the first value alone."""
        return Span(min(self.first, other.first), max(self.last, other.last), max(self.jump, other.jump))


@dataclass(frozen=True)
class ReceptiveField:
    """What a value of a map sees of the image, down and across."""

    down: Span = Span()
    across: Span = Span()

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.down.pixels

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.across.pixels

    def through(self, window: _Pair, stride: _Pair, padding: _Pair) -> ReceptiveField:
        """Return what a value sees behind windows, the first of which begins in so many zeros."""
        return ReceptiveField(
            self.down.through(window[0], stride[0], padding[0]), self.across.through(window[1], stride[1], padding[1])
        )

    def joined(self, other: ReceptiveField) -> ReceptiveField:
        """Return what a value sees that depends on two."""
        return ReceptiveField(self.down.joined(other.down), self.across.joined(other.across))


@dataclass(frozen=True)
class Row:
    """One layer of a table.

    Attributes:
        inputs: names of what it reads.
        shape: height, width and channels, or the number of values.
        parameters: that it learns or counts, BatchNorm's running mean and variance among them.
        multiply_adds: of convolutions and dense layers for one image, without biases.
        receptive_field: pixels of the image that one value sees, zeros beyond its border included.
        warning: what is lost here, if anything.
        zeros: rows and columns of zeros in which a map ends, and which are no loss.
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
    """Return the side of the square in pixels that suits a network from scratch."""
    return 64 if kind is NetworkKind.CNN else 32


def filled_network(network: NetworkRecipe, height: int, width: int, outputs: int | None = None) -> NetworkRecipe:
    """Return the network with its layers, each named, for images of so many pixels.

    With `outputs`, the values of its output layer, that counts among its parameters. Raises RecipeInvalid.
    """
    if network.kind is NetworkKind.PERCEPTRON and network.layers:
        raise RecipeInvalid(
            "network.layers", "Expected none: a perceptron is one layer from pixels to output. Use kind 'mlp' or 'cnn'."
        )
    if network.kind is not NetworkKind.PERCEPTRON and network.threshold is not None:
        raise RecipeInvalid("network.threshold", "Expected null: only a perceptron has it.")
    layers = named(network.layers if network.layers is not None else default_layers(network.kind, height, width))
    allowed = _ALLOWED[network.kind]
    for number, layer in enumerate(layers):
        if layer.type not in allowed:
            raise _refusal(number, layer, f"Expected {', '.join(allowed)} in a network of kind {network.kind.value!r}.")
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
    """Return the layers of a filled network from its pixels on: all but a CNN begin by laying them in a row."""
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
        height: of its images in pixels.
        width: of its images in pixels.
        outputs: values of the output layer, which closes the table; by default it is left out.

    Raises:
        RecipeInvalid: a layer cannot follow what it reads, or the network is too large; it names the layer.
    """
    layers = chain(network)
    own = len(network.layers or ())
    pixels = Row(INPUT, INPUT, (), (height, width, network.channels))
    rows = _rows(layers, pixels, own)
    for number, (layer, row) in enumerate(zip(layers, rows[1:], strict=True), start=own - len(layers)):
        if prod(row.shape) > MOST_VALUES:
            raise _refusal(number, layer, f"Expected at most {MOST_VALUES:,} values. It has {prod(row.shape):,}.")
    if len(rows[-1].shape) > 1:
        if not layers:
            raise RecipeInvalid("network.layers", "Expected at least one layer, ending in values in a row.")
        raise _refusal(own - 1, layers[-1], "Expected values in a row at the end: add a flatten or a global_average.")
    rows += _output(rows, outputs)
    _see_parameters(rows)
    return rows


def backbone_table(name: BackboneName, cut: str | None, size: int | None, outputs: int | None = None) -> list[Row]:
    """Return the layers of a backbone with their shapes, the pixels first, then up to its features.

    Args:
        name: the backbone.
        cut: the cut point that features are taken from; by default the last.
        size: side of the images in pixels; by default the backbone's own.
        outputs: values of an output layer on the features, which closes the table; by default it is left out.

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
    """Return a row for each layer behind that of the pixels; the last `own` layers are those that a recipe counts.

    Raises RecipeInvalid, naming the layer.
    """
    rows = [pixels]
    at = {INPUT: pixels}
    unread = {layer.name for layer in layers[:-1]}
    for number, layer in enumerate(layers, start=own - len(layers)):
        assert layer.name is not None and layer.inputs is not None
        if layer.name in at or layer.name == OUTPUT:
            raise _refusal(number, layer, "Expected a name of its own.", "name")
        unknown = [name for name in layer.inputs if name not in at]
        if unknown:
            raise _refusal(
                number, layer, f"Expected layers before it ({', '.join(at)}). Received {unknown[0]!r}.", "inputs"
            )
        unread -= set(layer.inputs)
        row = _row(number, layer, [at[name] for name in layer.inputs], _whole(pixels))
        at[layer.name] = row
        rows.append(row)
    if unread:
        numbered = enumerate(layers, start=own - len(layers))
        number, layer = next((number, layer) for number, layer in numbered if layer.name in unread)
        raise _refusal(number, layer, "Expected a later layer to read it. None does.", "inputs")
    return rows


def _whole(pixels: Row) -> ReceptiveField:
    height, width, _ = pixels.shape
    return ReceptiveField(Span(last=height - 1), Span(last=width - 1))


def _output(rows: Sequence[Row], outputs: int | None) -> list[Row]:
    """Return the row of an output layer behind others, or none if there is none."""
    if outputs is None:
        return []
    layer = FullyConnected(name=OUTPUT, inputs=(rows[-1].name,), units=outputs)
    return [_row(len(rows), layer, [rows[-1]], _whole(rows[0]))]


def _see_parameters(rows: Sequence[Row]) -> None:
    """See that a network is not too large. Raises RecipeInvalid."""
    total = sum(row.parameters for row in rows)
    if total > MOST_PARAMETERS:
        largest = max(rows, key=lambda row: row.parameters)
        raise RecipeInvalid(
            "network.layers",
            f"Expected at most {MOST_PARAMETERS:,} parameters. This network has {total:,}, {largest.parameters:,} of "
            f"them in layer {largest.name!r}. Use smaller images, or pooling before it.",
        )


def _refusal(number: int, layer: AnyLayer, detail: str, field: str | None = None) -> RecipeInvalid:
    where = f"network.layers[{number}]" + (f".{field}" if field else "")
    return RecipeInvalid(where, f"Layer {layer.name!r} ({layer.type}): {detail}")


def _row(number: int, layer: AnyLayer, read: Sequence[Row], whole: ReceptiveField) -> Row:
    """Return the row of a layer. Raises RecipeInvalid."""

    def refuse(detail: str, field: str | None = None) -> RecipeInvalid:
        return _refusal(number, layer, detail, field)

    is_joining = isinstance(layer, Sum | Concatenation)
    if is_joining != (len(read) > 1):
        expected = (
            "at least two layers to join" if is_joining else "one layer to read: join branches by add or concatenate"
        )
        raise refuse(f"Expected {expected}. Received {len(read)}.", "inputs")
    one = read[0]
    about = (layer.name or "", layer.type, tuple(row.name for row in read))
    field = one.receptive_field
    match layer:
        case Convolution() | SeparableConvolution():
            height, width, channels = _maps(one, refuse)
            kernel, stride = sides(layer.kernel), sides(layer.stride)
            left, seen = _slid(one, kernel, stride, layer.padding)
            if min(left) < 1:
                raise refuse(_too_large("kernel", kernel, (height, width)), "kernel")
            if isinstance(layer, Convolution):
                weights = prod(kernel) * channels * layer.filters
                biases = layer.filters if layer.has_bias else 0
            else:
                weights = prod(kernel) * channels + channels * layer.filters
                biases = 0
            return Row(*about, (*left, layer.filters), weights + biases, prod(left) * weights, seen)
        case Pooling():
            height, width, channels = _maps(one, refuse)
            size, stride = sides(layer.size), sides(layer.stride or layer.size)
            left, seen = _slid(one, size, stride, layer.padding)
            if min(left) < 1:
                raise refuse(f"{_too_large('window', size, (height, width))} Nothing would be left.", "size")
            places = prod(size) * prod(left) * channels
            if layer.kind is PoolingKind.STOCHASTIC and (prod(size) > MOST_PLACES or places > MOST_VALUES):
                raise refuse(
                    f"Expected windows of at most {MOST_PLACES} pixels, and {MOST_VALUES:,} values in all of them, to "
                    f"draw from. Received {prod(size)} and {places:,}.",
                    "size",
                )
            warning = _border(one, size, stride) if layer.padding is Padding.VALID else None
            return Row(*about, (*left, channels), receptive_field=seen, warning=warning)
        case ZeroPadding():
            height, width, channels = _maps(one, refuse)
            added = (layer.width, layer.width)
            shape = (height + 2 * layer.width, width + 2 * layer.width, channels)
            return Row(*about, shape, receptive_field=field.through((1, 1), (1, 1), added), zeros=added)
        case Dropout() | Rectifier():
            return Row(*about, one.shape, receptive_field=field)
        case Flatten():
            # a value in a row still sees what it saw in its map
            return Row(*about, (prod(one.shape),), receptive_field=field)
        case GlobalAverage():
            _maps(one, refuse)
            return Row(*about, one.shape[-1:], receptive_field=whole)
        case FullyConnected():
            if len(one.shape) > 1:
                raise refuse(f"Expected values in a row. {one.name!r} has maps: put flatten or global_average between.")
            weights = one.shape[0] * layer.units
            return Row(*about, (layer.units,), weights + layer.units, weights, whole)
        case BatchNormalization():
            return Row(*about, one.shape, layer.numbers_per_channel * one.shape[-1], receptive_field=field)
        case Sum() | Concatenation():
            return Row(*about, _joined(layer, read, refuse), receptive_field=_seen(read))


def windows(sides: _Pair, window: _Pair, stride: _Pair, padding: Padding) -> _Pair:
    """Return how many windows fit down and across; less than one of a window that is larger than what it lies on."""
    if padding is Padding.SAME:
        return -(-sides[0] // stride[0]), -(-sides[1] // stride[1])
    return (sides[0] - window[0]) // stride[0] + 1, (sides[1] - window[1]) // stride[1] + 1


def _slid(read: Row, window: _Pair, stride: _Pair, padding: Padding) -> tuple[_Pair, ReceptiveField]:
    """Return how many windows fit on maps, and what each of them sees."""
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
    """Return how many of the zeros that `same` needs come before the map; an odd one more comes after it."""
    return max((windows - 1) * stride + window - side, 0) // 2


def _maps(row: Row, refuse: Callable[..., RecipeInvalid]) -> Shape:
    if len(row.shape) != 3:
        raise refuse(f"Expected maps. {row.name!r} gives {row.shape[0]:,} values in a row.", "inputs")
    return row.shape


def _too_large(name: str, window: _Pair, sides: _Pair) -> str:
    return (
        f"Expected a {name} of at most {sides[0]}×{sides[1]}, the map that it lies on. Received "
        f"{window[0]}×{window[1]}. Use larger images, padding 'same', or less pooling before."
    )


def _border(read: Row, size: _Pair, stride: _Pair) -> str | None:
    """Return what windows without padding leave out at the end, or None."""
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
                f"Expected the shape of {read[0].name!r}, {written(first)}"
                f"{' in all but channels' if isinstance(layer, Concatenation) else ''}. "
                f"{row.name!r} has {written(row.shape)}.",
                "inputs",
            )
    return (*first[:-1], depth)


def _seen(read: Sequence[Row]) -> ReceptiveField:
    field = read[0].receptive_field
    for row in read[1:]:
        field = field.joined(row.receptive_field)
    return field


def written(shape: Shape) -> str:
    """Return a shape as people write it."""
    return "×".join(str(side) for side in shape)
