"""Writes recipes/backbone_layers.json from `keras.applications`. Run as `python -m training.networks.layer_tables`.

The API shows the layers of a backbone from that file, without Keras (`recipes.backbone_layers`). A test compares the
file with what this module writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from recipes.backbone_layers import FILE
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.layers import (
    INPUT,
    Activation,
    AnyLayer,
    BareConvolution,
    BatchNormalization,
    Concatenation,
    Convolution,
    OffsetNormalization,
    Padding,
    Pooling,
    PoolingKind,
    Rectifier,
    SeparableConvolution,
    Sides,
    Sum,
    ZeroPadding,
)
from training.networks import backbones

_Names = Mapping[str, str]
"""Maps the name of a layer in Keras to its name in the tables."""


def layer_tables() -> str:
    """Return the content of `backbone_layers.json`: for each backbone its layers, and the last layer of each cut."""
    tables = []
    for name in BackboneName:
        cuts, layers = _table(name)
        lines = ",\n".join(f"    {json.dumps(layer)}" for layer in layers)
        tables.append(f'  "{name.value}": {{\n   "cuts": {json.dumps(cuts)},\n   "layers": [\n{lines}\n   ]\n  }}')
    return "{\n" + ",\n".join(tables) + "\n}\n"


def _table(name: BackboneName) -> tuple[dict[str, str], list[dict[str, Any]]]:
    network = backbones.build_network(name, CATALOGUE[name].minimum_size)
    layers = sorted(network.layers, key=_created)
    names = {layers[0].name: INPUT, **_NAMES.get(name, _own_names)(layers[1:])}
    described = [_described(layer, names) for layer in layers[1:]]
    cuts = {cut: names[backbones.cut_layer(network, name, cut).name] for cut in CATALOGUE[name].cuts}
    return cuts, [
        {"class": type(layer).__name__, **layer.model_dump(mode="json", exclude_defaults=True)} for layer in described
    ]


def _created(layer: Any) -> int:
    """Return a number that grows in the order in which layers were built: that of the output (`keras_tensor_17`)."""
    return int(re.sub(r"\D", "", layer.output.name) or 0)


# --- names ---------------------------------------------------------------------------------------------------------


def _own_names(layers: Sequence[Any]) -> _Names:
    """Return the names that the authors of a network gave to its layers. Raises ValueError for a layer without one."""
    for layer in layers:
        if _is_numbered(layer):
            raise ValueError(
                f"Layer {layer.name!r} has only the automatic name from Keras, which can change. Add a rule for its "
                "network to training/networks/layer_tables.py."
            )
    return {layer.name: layer.name for layer in layers}


def _is_numbered(layer: Any) -> bool:
    """Return whether a layer has a default name of Keras, such as `conv2d_17`. It depends on what was built before."""
    return re.fullmatch(rf"{backbones.snake_case(type(layer).__name__)}(_\d+)?", layer.name) is not None


def _xception_names(layers: Sequence[Any]) -> _Names:
    """Return names for the layers of Xception. Two kinds of layers have no names of their own.

    The residual branch of a block was built before the other layers of the block. The sum at the end of the block was
    built after them.
    """
    names: dict[str, str] = {}
    for position, layer in enumerate(layers):
        if not _is_numbered(layer):
            names[layer.name] = layer.name
        elif isinstance(layer, keras.layers.Add):
            names[layer.name] = f"{_block(names[layers[position - 1].name])}_add"
        else:
            following = next(other for other in layers[position:] if not _is_numbered(other))
            kind = "conv" if isinstance(layer, keras.layers.Conv2D) else "bn"
            names[layer.name] = f"{_block(following.name)}_residual_{kind}"
    return names


def _block(name: str) -> str:
    return name.partition("_")[0]


# How the authors of InceptionV3 call its branches, by the kernels of their convolutions.
_BRANCHES: Mapping[tuple[tuple[int, int], ...], str] = {
    ((1, 1),): "1x1",
    ((3, 3),): "3x3",
    ((1, 1), (3, 3)): "3x3",
    ((1, 1), (1, 3), (3, 1)): "3x3",
    ((1, 1), (3, 3), (3, 3)): "3x3dbl",
    ((1, 1), (3, 3), (1, 3), (3, 1)): "3x3dbl",
    ((1, 1), (5, 5)): "5x5",
    ((1, 1), (1, 7), (7, 1)): "7x7",
    ((1, 1), (7, 1), (1, 7), (7, 1), (1, 7)): "7x7dbl",
    ((1, 1), (1, 7), (7, 1), (3, 3)): "7x7x3",
}


def _inception_names(layers: Sequence[Any]) -> _Names:
    """Return names for the layers of InceptionV3. Only the ends of its blocks have names (`mixed0` to `mixed10`)."""
    pool = next(layer for layer in layers if isinstance(layer, keras.layers.AveragePooling2D))
    start = [layer.name for layer in layers].index(_read(pool)[0]) + 1  # the first block reads the end of the stem
    names = dict(_stem_names(layers[:start]))
    block: list[Any] = []
    for layer in layers[start:]:
        if not re.fullmatch(r"mixed\d+", layer.name):
            block.append(layer)
            continue
        for branch in _branches(block):
            names |= _branch_names(layer.name, branch)
        names[layer.name] = layer.name
        block = []
    return names


def _branches(block: Sequence[Any]) -> list[list[Any]]:
    """Return the branches of a block. The first layer of each branch reads the input of the block."""
    branches: list[list[Any]] = []
    for layer in block:
        if _read(layer) == _read(block[0]):
            branches.append([])
        branches[-1].append(layer)
    return branches


def _stem_names(layers: Sequence[Any]) -> _Names:
    """Return names for the layers before the first block: `conv1_conv`, `conv1_bn`, `conv1_relu`, …, `pool1`."""
    names: dict[str, str] = {}
    convolutions = pools = 0
    for layer in layers:
        if isinstance(layer, keras.layers.MaxPooling2D):
            pools += 1
            names[layer.name] = f"pool{pools}"
        else:
            convolutions += isinstance(layer, keras.layers.Conv2D)
            names[layer.name] = f"conv{convolutions}_{_part(layer)}"
    return names


def _branch_names(block: str, layers: Sequence[Any]) -> _Names:
    """Return names for one branch of a block, such as `mixed0_5x5_1_conv`."""
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    is_pool = not isinstance(layers[0], keras.layers.Conv2D)
    branch = f"{block}_{'pool' if is_pool else _BRANCHES[tuple(layer.kernel_size for layer in convolutions)]}"
    names: dict[str, str] = {}
    step = ""
    for layer in layers:
        if isinstance(layer, keras.layers.Conv2D):
            number = convolutions.index(layer) + 1
            # A branch that forks ends in two convolutions: one over three pixels in a row, one over three in a column.
            step = {(1, 3): "row", (3, 1): "column"}.get(layer.kernel_size, str(number))
        has_step = isinstance(layer, keras.layers.Conv2D | keras.layers.BatchNormalization | keras.layers.Activation)
        names[layer.name] = f"{branch}_{step}_{_part(layer)}" if has_step else branch
    return names


def _part(layer: Any) -> str:
    """Return `conv`, `bn` or `relu`, the function of a layer in a convolution with BatchNorm and ReLU."""
    match layer:
        case keras.layers.Conv2D():
            return "conv"
        case keras.layers.BatchNormalization():
            return "bn"
        case _:
            return "relu"


_NAMES: Mapping[BackboneName, Callable[[Sequence[Any]], _Names]] = {
    BackboneName.INCEPTION_V3: _inception_names,
    BackboneName.XCEPTION: _xception_names,
}


# --- layers --------------------------------------------------------------------------------------------------------


def _described(layer: Any, names: _Names) -> AnyLayer:
    """Return a Keras layer as a type of `recipes.layers`. Raises ValueError if there is no such type."""
    where: dict[str, Any] = {"name": names[layer.name], "inputs": tuple(names[read] for read in _read(layer))}
    match layer:
        case keras.layers.SeparableConv2D():
            return SeparableConvolution(**where, filters=layer.filters, **_window(layer, "kernel", layer.kernel_size))
        case keras.layers.Conv2D():
            kind = Convolution if layer.use_bias else BareConvolution
            activation = Activation(keras.activations.serialize(layer.activation))
            window = _window(layer, "kernel", layer.kernel_size)
            return kind(**where, filters=layer.filters, **window, activation=activation)
        case keras.layers.MaxPooling2D():
            return Pooling(**where, kind=PoolingKind.MAX, **_window(layer, "size", layer.pool_size))
        case keras.layers.AveragePooling2D():
            return Pooling(**where, kind=PoolingKind.AVERAGE, **_window(layer, "size", layer.pool_size))
        case keras.layers.BatchNormalization():
            return BatchNormalization(**where) if layer.scale else OffsetNormalization(**where)
        case keras.layers.Activation() if layer.activation is keras.activations.relu:
            return Rectifier(**where)
        case keras.layers.ZeroPadding2D():
            ((width, *_), *_) = layer.padding
            return ZeroPadding(**where, width=width)
        case keras.layers.Add():
            return Sum(**where)
        case keras.layers.Concatenate():
            return Concatenation(**where)
        case _:
            raise ValueError(f"recipes.layers has no type for the Keras layer {layer!r}.")


def _window(layer: Any, name: str, size: tuple[int, int]) -> dict[str, Any]:
    return {name: _sides(size), "stride": _sides(layer.strides), "padding": Padding(layer.padding)}


def _sides(size: tuple[int, int]) -> Sides:
    height, width = size
    return height if height == width else size


def _read(layer: Any) -> list[str]:
    """Return the Keras names of the layers that a layer reads."""
    tensors = layer.input if isinstance(layer.input, list) else [layer.input]
    return [tensor._keras_history.operation.name for tensor in tensors]


if __name__ == "__main__":
    FILE.write_text(layer_tables())
