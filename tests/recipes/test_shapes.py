from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from errors import RecipeInvalid
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.layers import Layer, NetworkKind, NetworkRecipe
from recipes.shapes import backbone_table, default_size, filled_network, table

_LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])


def _cnn(*layers: dict) -> NetworkRecipe:
    return NetworkRecipe(layers=_LAYERS.validate_python(layers))


def _refusal(network: NetworkRecipe, height: int = 16, width: int = 16) -> RecipeInvalid:
    with pytest.raises(RecipeInvalid) as refused:
        filled_network(network, height, width)
    return refused.value


@pytest.mark.parametrize("kind", list(NetworkKind))
@pytest.mark.parametrize("sides", [(1, 1), (1, 2), (7, 5), (32, 32), (64, 64), (256, 200)])
def test_layers_that_were_left_out_fit_images_of_any_size(kind: NetworkKind, sides: tuple[int, int]) -> None:
    network = filled_network(NetworkRecipe(kind=kind), *sides)
    assert len(table(network, *sides)[-1].shape) == 1
    assert filled_network(network, *sides) == network


def test_shapes_follow_the_formulas() -> None:
    network = filled_network(
        _cnn(
            {"type": "convolution", "filters": 4, "kernel": [5, 3], "stride": [2, 1]},
            {"type": "convolution", "filters": 6, "kernel": 3, "stride": 2, "padding": "same"},
            {"type": "pooling", "size": 2},
            {"type": "flatten"},
            {"type": "dense", "units": 10},
        ),
        28,
        20,
    )
    rows = table(network, 28, 20)
    assert [row.shape for row in rows] == [(28, 20, 3), (12, 18, 4), (6, 9, 6), (3, 4, 6), (72,), (10,)]
    assert [row.parameters for row in rows] == [0, 5 * 3 * 3 * 4 + 4, 3 * 3 * 4 * 6 + 6, 0, 0, 730]
    assert [row.multiply_adds for row in rows] == [0, 12 * 18 * 180, 6 * 9 * 216, 0, 0, 720]
    fields = [(row.receptive_field.height, row.receptive_field.width) for row in rows]
    assert fields == [(1, 1), (5, 3), (9, 5), (13, 7), (13, 7), (28, 20)]
    assert [row.warning for row in rows if row.warning] == ["Leaves out the last 1 column of a map of 6×9."]


def test_branches_are_joined_by_name() -> None:
    network = filled_network(
        _cnn(
            {"type": "convolution", "filters": 4, "name": "wide", "padding": "same"},
            {"type": "convolution", "filters": 4, "kernel": 1, "inputs": ["input"]},
            {"type": "add", "inputs": ["wide", "convolution_1"]},
            {"type": "concatenate", "inputs": ["wide", "add_1", "input"]},
            {"type": "global_average"},
        ),
        8,
        8,
    )
    assert [row.shape for row in table(network, 8, 8)][-3:] == [(8, 8, 4), (8, 8, 11), (11,)]


def test_a_layer_that_cannot_follow_is_named() -> None:
    conv = {"type": "convolution", "filters": 4}
    large = {**conv, "name": "large", "kernel": 9}
    refused = _refusal(_cnn({"type": "pooling", "size": 3}, large, {"type": "flatten"}))
    assert refused.field == "network.layers[1].kernel"
    assert "'large'" in refused.detail and "9×9" in refused.detail and "5×5" in refused.detail
    assert "The window of 17×17" in _refusal(_cnn({"type": "pooling", "size": 17}, {"type": "flatten"})).detail
    assert "flatten or global_average" in _refusal(_cnn(conv, {"type": "dense", "units": 3})).detail
    assert "at the end" in _refusal(_cnn(conv)).detail
    assert "at least one layer" in _refusal(_cnn()).detail
    assert _refusal(_cnn({"type": "flatten"}, conv)).field == "network.layers[1].inputs"
    here = {**conv, "name": "a"}
    assert _refusal(_cnn(here, {"type": "flatten", "inputs": ["b"]})).field == "network.layers[1].inputs"
    assert _refusal(_cnn(here, {"type": "flatten", "name": "a"})).field == "network.layers[1].name"
    assert _refusal(_cnn({**here, "name": "output"}, {"type": "flatten"})).field == "network.layers[0].name"
    assert "No later layer reads" in _refusal(_cnn(conv, {"type": "flatten", "inputs": ["input"]})).detail
    joined = _refusal(_cnn(conv, {"type": "add", "inputs": ["convolution_1", "input"]}, {"type": "flatten"}))
    assert "14×14×4" in joined.detail and "16×16×3" in joined.detail
    assert "at least two input layers" in _refusal(_cnn(conv, {"type": "add"}, {"type": "flatten"})).detail
    twice = _cnn(conv, {**conv, "inputs": ["input", "convolution_1"]}, {"type": "flatten"})
    assert "one input layer" in _refusal(twice).detail


def test_a_network_holds_what_its_kind_has() -> None:
    dense = _LAYERS.validate_python([{"type": "dense", "units": 2}])
    assert _refusal(NetworkRecipe(kind=NetworkKind.PERCEPTRON, layers=dense)).field == "network.layers"
    flatten = _LAYERS.validate_python([{"type": "flatten"}])
    assert _refusal(NetworkRecipe(kind=NetworkKind.MLP, layers=flatten)).field == "network.layers[0]"
    assert _refusal(NetworkRecipe.model_validate({"kind": "mlp", "threshold": "step"})).field == "network.threshold"


def test_a_network_that_is_too_large_is_refused() -> None:
    dense = _LAYERS.validate_python([{"type": "dense", "units": 4096}])
    refused = _refusal(NetworkRecipe(kind=NetworkKind.MLP, layers=dense), 512, 512)
    assert "'dense_1'" in refused.detail and "parameters" in refused.detail
    wide = _cnn({"type": "convolution", "filters": 4096, "padding": "same"}, {"type": "global_average"})
    assert "values" in _refusal(wide, 512, 512).detail


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds", "sees"),
    [
        # Parameters as Keras counts them; multiply-adds in thousands of millions, near what their papers say; receptive
        # fields of VGG16, ResNet50 and InceptionV3 as in Araujo et al. 2019.
        (BackboneName.VGG16, 14_714_688, 15.3, 212),
        (BackboneName.VGG19, 20_024_384, 19.5, 268),
        (BackboneName.RESNET50, 23_587_712, 3.9, 483),
        (BackboneName.INCEPTION_V3, 21_802_784, 5.7, 1311),
        (BackboneName.XCEPTION, 20_861_480, 8.4, None),
    ],
)
def test_backbones_are_as_large_as_they_are_known_to_be(
    name: BackboneName, parameters: int, multiply_adds: float, sees: int | None
) -> None:
    *rows, features = backbone_table(name, None, None)
    assert sum(row.parameters for row in rows) == parameters
    assert round(sum(row.multiply_adds for row in rows) / 1e9, 1) == multiply_adds
    field = rows[-1].receptive_field
    assert field.height == field.width and sees in (None, field.height)
    assert features.receptive_field.height == CATALOGUE[name].size


@pytest.mark.parametrize("name", list(BackboneName))
def test_every_cut_is_shown_for_every_size_that_a_recipe_may_ask_for(name: BackboneName) -> None:
    entry = CATALOGUE[name]
    for cut, width in entry.cuts.items():
        for size in (entry.minimum_size, entry.minimum_size + 1, 1024):
            assert backbone_table(name, cut, size)[-1].shape == (width,)


def test_zeros_around_a_map_are_no_border_to_lose() -> None:
    rows = {row.name: row for row in backbone_table(BackboneName.RESNET50, "conv2", 224)}
    assert rows["pool1_pad"].shape == (114, 114, 64) and rows["pool1_pool"].shape == (56, 56, 64)
    assert rows["pool1_pool"].warning is None


def test_branches_that_look_to_different_sides_see_what_both_see() -> None:
    """Padding of an even kernel is wider at the end: three of 2 look one to three further, one of 3 to either side."""
    even = {"type": "convolution", "filters": 1, "kernel": 2, "padding": "same"}
    network = filled_network(
        _cnn(
            *(even for _ in range(3)),
            {**even, "kernel": 3, "name": "odd", "inputs": ["input"]},
            {"type": "add", "inputs": ["convolution_3", "odd"]},
            {"type": "global_average"},
        ),
        8,
        8,
    )
    joined = table(network, 8, 8)[-2].receptive_field
    assert (joined.down.first, joined.down.last, joined.height, joined.width) == (-1, 3, 5, 5)


def test_convolutions_are_shown_on_larger_images() -> None:
    assert {kind: default_size(kind) for kind in NetworkKind} == {
        NetworkKind.PERCEPTRON: 32,
        NetworkKind.MLP: 32,
        NetworkKind.CNN: 64,
    }
