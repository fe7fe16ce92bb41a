"""Tables of layers (`recipes.shapes`) against networks of Keras."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from errors import RecipeInvalid
from recipes.backbone_layers import backbone_layers
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.layers import INPUT, Layer, NetworkKind, NetworkRecipe, Padding, named, sides
from recipes.shapes import Row, backbone_table, chain, filled_network, table
from training.networks import backbones

TYPES = {
    "Conv2D": "convolution",
    "SeparableConv2D": "separable_convolution",
    "MaxPooling2D": "pooling",
    "AveragePooling2D": "pooling",
    "BatchNormalization": "batch_normalization",
    "Activation": "activation",
    "ZeroPadding2D": "zero_padding",
    "Add": "add",
    "Concatenate": "concatenate",
}
POOLINGS = {"MaxPooling2D": "max", "AveragePooling2D": "average"}
# What Keras calls a layer that was given no name, and a name that it gives to a part of two blocks.
COUNTED = r"(conv2d|batch_normalization|activation|add|concatenate|(max|average)_pooling2d)(_\d+)?|mixed9_[01]"

SIZES = {
    BackboneName.VGG16: (32, 75),
    BackboneName.VGG19: (32, 75),
    BackboneName.RESNET50: (32, 97),
    BackboneName.INCEPTION_V3: (75, 139),
    BackboneName.XCEPTION: (71, 131),
}


def _kernels(layer: Any) -> int:
    """Return how many weights of a layer are multiplied at each place: those of kernels."""
    return sum(prod(weight.shape) for weight in layer.weights if "kernel" in weight.name)


def _read_by(layer: Any) -> list[Any]:
    tensors = layer.input if isinstance(layer.input, list) else [layer.input]
    return [tensor._keras_history.operation for tensor in tensors]


def _assert_same(layer: Any, row: Row, described: Any) -> None:
    kind = type(layer).__name__
    assert row.type == TYPES[kind]
    assert row.shape == layer.output.shape[1:], row
    assert row.parameters == layer.count_params(), row
    assert row.multiply_adds == prod(row.shape[:2]) * _kernels(layer), row
    assert row.name == layer.name or re.fullmatch(COUNTED, layer.name)
    match described.type:
        case "convolution" | "separable_convolution":
            found = sides(described.kernel), sides(described.stride), described.padding
            assert found == (layer.kernel_size, layer.strides, layer.padding)
        case "pooling":
            found = sides(described.size), sides(described.stride or described.size), described.padding
            assert found == (layer.pool_size, layer.strides, layer.padding)
            assert described.kind == POOLINGS[kind]
        case "activation":
            assert layer.activation is keras.activations.relu


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in SIZES.items() for size in sizes])
def test_every_layer_of_a_backbone_is_that_of_keras(name: BackboneName, size: int) -> None:
    full = backbones.build_network(name, size)
    entry = CATALOGUE[name]
    rows = {row.name: row for row in backbone_table(name, None, size)}
    described = {layer.name: layer for layer in backbone_layers(name, entry.last_cut)}
    last = list(rows)[-2]
    met, open_ends = {full.layers[-1].name: last}, [(full.layers[-1], last)]
    while open_ends:
        layer, mine = open_ends.pop()
        if mine == INPUT:
            assert isinstance(layer, keras.layers.InputLayer)
            continue
        _assert_same(layer, rows[mine], described[mine])
        for read, my_read in zip(_read_by(layer), rows[mine].inputs, strict=True):
            if read.name not in met:
                met[read.name] = my_read
                open_ends.append((read, my_read))
            assert met[read.name] == my_read
    assert len(set(met.values())) == len(met) == len(full.layers) == len(rows) - 1
    assert sum(row.parameters for row in rows.values()) == full.count_params()
    for cut, width in entry.cuts.items():
        *before, features = backbone_table(name, cut, size)
        assert before == list(rows.values())[: len(before)]
        assert before[-1].name == met[backbones.cut_layer(full, name, cut).name]
        assert (features.name, features.shape) == ("features", (width,))


# --- networks from scratch -----------------------------------------------------------------------------------------


def _keras_layer(layer: Layer, *, is_bare: bool) -> Any:
    """Return a layer in Keras; a bare one is linear with weights above zero, so that all that it reads shows."""
    name = layer.name
    weighs = {"kernel_initializer": "ones"} if is_bare else {}
    match layer.type:
        case "convolution":
            activation = "linear" if is_bare else layer.activation.value
            return keras.layers.Conv2D(
                layer.filters,
                sides(layer.kernel),
                strides=sides(layer.stride),
                padding=layer.padding.value,
                activation=activation,
                name=name,
                **weighs,
            )
        case "pooling":
            kind = keras.layers.AveragePooling2D if is_bare else keras.layers.MaxPooling2D
            stride = sides(layer.stride or layer.size)
            return kind(sides(layer.size), strides=stride, padding=layer.padding.value, name=name)
        case "dropout":
            return keras.layers.Dropout(layer.rate, name=name)
        case "flatten":
            return keras.layers.Flatten(name=name)
        case "global_average":
            return keras.layers.GlobalAveragePooling2D(name=name)
        case "dense":
            return keras.layers.Dense(layer.units, name=name)
        case "batch_normalization":
            return keras.layers.BatchNormalization(name=name)
        case "add":
            return keras.layers.Add(name=name)
        case "concatenate":
            return keras.layers.Concatenate(name=name)


def _keras_network(network: NetworkRecipe, height: int, width: int, *, is_bare: bool = False) -> dict[str, Any]:
    """Return the output of every layer by its name. Raises ValueError, as Keras does, if one cannot follow."""
    outputs = {INPUT: keras.Input((height, width, network.channels))}
    for layer in chain(network):
        read = [outputs[name] for name in layer.inputs or ()]
        outputs[layer.name or ""] = _keras_layer(layer, is_bare=is_bare)(read if len(read) > 1 else read[0])
    return outputs


_LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])
_window = st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.integers(1, 5)
_stride = st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.integers(1, 3)
_filters = st.integers(1, 4)
_padding = st.sampled_from([padding.value for padding in Padding])


def _convolution(**given: Any) -> st.SearchStrategy[dict[str, Any]]:
    asked = {"filters": _filters, "kernel": _window, "stride": _stride, "padding": _padding, **given}
    return st.fixed_dictionaries({"type": st.just("convolution"), **asked})


_pooling = st.fixed_dictionaries(
    {"type": st.just("pooling"), "kind": st.sampled_from(["max", "average", "stochastic"]), "size": _window},
    optional={"stride": _stride, "padding": _padding},
)
_other = st.sampled_from([{"type": "dropout"}, {"type": "batch_normalization"}])


@st.composite
def _branches(draw: st.DrawFn, name: str, before: str) -> list[dict[str, Any]]:
    """Branches that end in maps of one shape, and the layer that joins them."""
    stride, filters = draw(_stride), draw(_filters)
    layers, ends = [], []
    for number in range(draw(st.integers(2, 3))):
        same = {"padding": st.just("same")}
        first = draw(_convolution(stride=st.just(stride), filters=st.just(filters), **same))
        end = f"{name}_{number}"
        if draw(st.booleans()):
            layers.append({**draw(_convolution(stride=st.just(1), **same)), "name": f"{end}_0", "inputs": [before]})
            layers.append({**first, "name": end})
        else:
            layers.append({**first, "name": end, "inputs": [before]})
        ends.append(end)
    return [*layers, {"type": draw(st.sampled_from(["add", "concatenate"])), "name": name, "inputs": ends}]


@st.composite
def _cnns(draw: st.DrawFn) -> NetworkRecipe:
    layers: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 5))):
        if draw(st.integers(0, 3)) == 0:
            before = layers[-1]["name"] if layers else INPUT
            layers += draw(_branches(f"join{number}", before))
        else:
            layers.append({**draw(_convolution() | _pooling | _other), "name": f"layer{number}"})
    layers.append(draw(st.sampled_from([{"type": "flatten"}, {"type": "global_average"}])))
    layers += draw(st.lists(_other | st.fixed_dictionaries({"type": st.just("dense"), "units": _filters}), max_size=2))
    return NetworkRecipe(layers=_LAYERS.validate_python(layers), channels=draw(st.sampled_from([1, 3])))


_side = st.integers(1, 40)
_often = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_often
@given(_cnns(), _side, _side)
def test_a_cnn_has_the_shapes_of_keras_or_is_refused_by_both(asked: NetworkRecipe, height: int, width: int) -> None:
    network = asked.model_copy(update={"layers": named(asked.layers or ())})
    try:
        outputs = _keras_network(network, height, width)
    except ValueError:
        with pytest.raises(RecipeInvalid, match=r"The (kernel|window) of .* is larger than the map"):
            filled_network(asked, height, width)
        return
    assert filled_network(asked, height, width) == network
    for row in table(network, height, width):
        assert row.shape == outputs[row.name].shape[1:], row
        layer = outputs[row.name]._keras_history.operation
        assert row.parameters == layer.count_params(), row
        assert row.multiply_adds == _kernels(layer) * (prod(row.shape[:2]) if len(row.shape) == 3 else 1), row


@_often
@given(_cnns(), st.integers(12, 40), st.integers(12, 40), st.data())
def test_a_value_sees_the_pixels_of_its_receptive_field(
    asked: NetworkRecipe, height: int, width: int, data: st.DataObject
) -> None:
    try:
        network = filled_network(asked, height, width)
    except RecipeInvalid:
        reject()
    row = [row for row in table(network, height, width) if len(row.shape) == 3][-1]
    outputs = _keras_network(network, height, width, is_bare=True)
    model = keras.Model(outputs[INPUT], outputs[row.name])
    whole = (height, width)
    for axis, span in enumerate((row.receptive_field.down, row.receptive_field.across)):
        place = data.draw(st.integers(0, row.shape[axis] - 1))
        # One image for each row of pixels (or column), in which it alone is not zero.
        images = np.zeros((whole[axis], height, width, network.channels), np.float32)
        np.moveaxis(images, 1 + axis, 1)[np.arange(whole[axis]), np.arange(whole[axis])] = 1
        answers = np.moveaxis(keras.ops.convert_to_numpy(model(images, training=False)), 1 + axis, 1)
        seen = np.flatnonzero(answers[:, place].any(axis=(1, 2)))
        first, last = span.first + place * span.jump, span.last + place * span.jump
        assert first <= seen[0] and seen[-1] <= last
        if first >= 0 and last < whole[axis]:
            assert (seen[0], seen[-1]) == (first, last)


@pytest.mark.parametrize("kind", list(NetworkKind))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_defaults_is_that_of_keras(kind: NetworkKind, channels: int) -> None:
    network = filled_network(NetworkRecipe.model_validate({"kind": kind, "channels": channels}), 33, 50)
    outputs = _keras_network(network, 33, 50)
    *rows, output = table(network, 33, 50, outputs=10)
    assert [row.shape for row in rows] == [outputs[row.name].shape[1:] for row in rows]
    last = keras.layers.Dense(10)
    model = keras.Model(outputs[INPUT], last(outputs[rows[-1].name]))
    assert (output.name, output.inputs, output.shape) == ("output", (rows[-1].name,), (10,))
    assert (output.parameters, output.multiply_adds) == (last.count_params(), _kernels(last))
    assert sum(row.parameters for row in [*rows, output]) == model.count_params()
