"""Works out the shapes of a network layer by layer, before anything is trained. Knows no Keras.

Sides of maps: floor((m - n) / s) + 1 for a window of n pixels every s on m without padding, ceil(m / s) with padding
`same` (Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning"). A receptive field grows by
(n - 1) * jump, and the jump between neighbours by the factor s (Araujo et al. 2019, "Computing Receptive Fields of
Convolutional Neural Networks").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from artifacts.layers import (
    INPUT,
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
    Sum,
    default_layers,
    named,
    pair,
)
from errors import RecipeInvalid

MOST_PARAMETERS = 100_000_000
MOST_VALUES = 64_000_000
"""Of one layer for one image: 256 MB, before it is multiplied by the batch."""

Shape = tuple[int, ...]
"""Height, width and channels of maps, or the number of values in a row."""


@dataclass(frozen=True)
class ReceptiveField:
    """What one value sees: pixels of the image, height and width, and how far apart neighbours look at it."""

    height: int = 1
    width: int = 1
    jump: tuple[int, int] = (1, 1)

    def through(self, window: tuple[int, int], stride: tuple[int, int]) -> ReceptiveField:
        """Return what a value sees behind windows."""
        return ReceptiveField(
            self.height + (window[0] - 1) * self.jump[0],
            self.width + (window[1] - 1) * self.jump[1],
            (self.jump[0] * stride[0], self.jump[1] * stride[1]),
        )

    def joined(self, other: ReceptiveField) -> ReceptiveField:
        """Return what a value sees that depends on two."""
        jump = (max(self.jump[0], other.jump[0]), max(self.jump[1], other.jump[1]))
        return ReceptiveField(max(self.height, other.height), max(self.width, other.width), jump)


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
    """

    name: str
    type: str
    inputs: tuple[str, ...]
    shape: Shape
    parameters: int = 0
    multiply_adds: int = 0
    receptive_field: ReceptiveField = ReceptiveField()
    warning: str | None = None


def filled_network(network: NetworkRecipe, height: int, width: int) -> NetworkRecipe:
    """Return the network with its layers, each named, for images of so many pixels. Raises RecipeInvalid."""
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
    table(network, height, width)
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


def default_size(kind: NetworkKind) -> int:
    """Return the side of the images that a kind of network sees if nobody says otherwise, in pixels."""
    return 64 if kind is NetworkKind.CNN else 32


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


def table(network: NetworkRecipe, height: int, width: int) -> list[Row]:
    """Return the layers of a filled network with their shapes, the pixels first and without the output layer.

    Raises:
        RecipeInvalid: a layer cannot follow what it reads, or the network is too large; it names the layer.
    """
    rows = [Row(INPUT, INPUT, (), (height, width, network.channels))]
    whole = ReceptiveField(height, width)
    at = {INPUT: rows[0]}
    layers = chain(network)
    shift = len(layers) - len(network.layers or ())
    unread = {layer.name for layer in layers[:-1]}
    for number, layer in enumerate(layers):
        place = number - shift
        assert layer.name is not None and layer.inputs is not None
        if layer.name in at or layer.name == INPUT:
            raise _refusal(place, layer, "Expected a name of its own.", "name")
        unknown = [name for name in layer.inputs if name not in at]
        if unknown:
            raise _refusal(
                place, layer, f"Expected layers before it ({', '.join(at)}). Received {unknown[0]!r}.", "inputs"
            )
        unread -= set(layer.inputs)
        row = _row(place, layer, [at[name] for name in layer.inputs], whole)
        if prod(row.shape) > MOST_VALUES:
            raise _refusal(place, layer, f"Expected at most {MOST_VALUES:,} values. It has {prod(row.shape):,}.")
        at[layer.name] = row
        rows.append(row)
    if unread:
        number = next(number for number, layer in enumerate(layers) if layer.name in unread)
        raise _refusal(number - shift, layers[number], "Expected a later layer to read it. None does.", "inputs")
    if len(rows[-1].shape) > 1:
        last = len(layers) - 1
        if last < 0:
            raise RecipeInvalid("network.layers", "Expected at least one layer, ending in values in a row.")
        raise _refusal(
            last - shift, layers[last], "Expected values in a row at the end: add a flatten or a global_average."
        )
    _see_parameters(rows)
    return rows


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


def _refusal(number: int, layer: Layer, detail: str, field: str | None = None) -> RecipeInvalid:
    where = f"network.layers.{number}" + (f".{field}" if field else "")
    return RecipeInvalid(where, f"Layer {layer.name!r} ({layer.type}): {detail}")


def _row(number: int, layer: Layer, read: Sequence[Row], whole: ReceptiveField) -> Row:
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
        case Convolution():
            height, width, channels = _maps(one, refuse)
            kernel, stride = pair(layer.kernel), pair(layer.stride)
            sides = windows((height, width), kernel, stride, layer.padding)
            if min(sides) < 1:
                raise refuse(_too_large("kernel", kernel, (height, width)), "kernel")
            weights = prod(kernel) * channels * layer.filters
            return Row(
                *about,
                (*sides, layer.filters),
                weights + layer.filters,
                prod(sides) * weights,
                field.through(kernel, stride),
            )
        case Pooling():
            height, width, channels = _maps(one, refuse)
            size, stride = pair(layer.size), pair(layer.stride or layer.size)
            sides = windows((height, width), size, stride, layer.padding)
            if min(sides) < 1:
                raise refuse(f"{_too_large('window', size, (height, width))} Nothing would be left.", "size")
            warning = _border((height, width), size, stride) if layer.padding is Padding.VALID else None
            return Row(*about, (*sides, channels), receptive_field=field.through(size, stride), warning=warning)
        case Dropout():
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
            return Row(*about, one.shape, 4 * one.shape[-1], receptive_field=field)
        case Sum() | Concatenation():
            return Row(*about, _joined(layer, read, refuse), receptive_field=_seen(read))


def windows(
    sides: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], padding: Padding
) -> tuple[int, int]:
    """Return how many windows fit down and across; less than one of a window that is larger than what it lies on."""
    if padding is Padding.SAME:
        return -(-sides[0] // stride[0]), -(-sides[1] // stride[1])
    return (sides[0] - window[0]) // stride[0] + 1, (sides[1] - window[1]) // stride[1] + 1


def _maps(row: Row, refuse: Callable[..., RecipeInvalid]) -> Shape:
    if len(row.shape) != 3:
        raise refuse(f"Expected maps. {row.name!r} gives {row.shape[0]:,} values in a row.", "inputs")
    return row.shape


def _too_large(name: str, window: tuple[int, int], sides: tuple[int, int]) -> str:
    return (
        f"Expected a {name} of at most {sides[0]}×{sides[1]}, the map that it lies on. Received "
        f"{window[0]}×{window[1]}. Use larger images, padding 'same', or less pooling before."
    )


def _border(sides: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]) -> str | None:
    """Return what windows without padding leave out at the end, or None."""
    rows, columns = ((side - one) % step for side, one, step in zip(sides, size, stride, strict=True))
    lost = [
        f"{count} {name}{'s' if count > 1 else ''}" for count, name in ((rows, "row"), (columns, "column")) if count
    ]
    if not lost:
        return None
    return f"Leaves out the last {' and '.join(lost)} of a map of {sides[0]}×{sides[1]}."


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
