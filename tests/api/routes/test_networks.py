"""The route that previews the layers of a network."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from recipes.catalogue import CATALOGUE, BackboneName


def preview(client: TestClient, **asked: Any) -> Any:
    return client.post("/api/v1/networks/preview", json=asked)


def cnn(*layers: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "cnn", "layers": list(layers)}


CONVOLUTION = {"type": "convolution", "filters": 8}


def test_a_network_from_scratch_is_shown_layer_by_layer(client: TestClient) -> None:
    network = cnn(
        {**CONVOLUTION, "padding": "same"}, {"type": "pooling", "name": "half"}, {"type": "flatten", "inputs": ["half"]}
    )
    answer = preview(client, network=network, image_size=[5, 4], outputs=2)
    assert answer.status_code == 200, answer.text
    lost = "Leaves out the last 1 row of a map of 5×4."
    assert answer.json() == {
        "input": [5, 4, 3],
        "layers": [
            {
                "name": "convolution_1",
                "type": "convolution",
                "inputs": ["input"],
                "shape": [5, 4, 8],
                "parameters": 224,
                "multiply_adds": 4320,
                "receptive_field": [3, 3],
                "warning": None,
            },
            {
                "name": "half",
                "type": "pooling",
                "inputs": ["convolution_1"],
                "shape": [2, 2, 8],
                "parameters": 0,
                "multiply_adds": 0,
                "receptive_field": [4, 4],
                "warning": lost,
            },
            {
                "name": "flatten_1",
                "type": "flatten",
                "inputs": ["half"],
                "shape": [32],
                "parameters": 0,
                "multiply_adds": 0,
                "receptive_field": [4, 4],
                "warning": None,
            },
            {
                "name": "output",
                "type": "dense",
                "inputs": ["flatten_1"],
                "shape": [2],
                "parameters": 66,
                "multiply_adds": 64,
                "receptive_field": [5, 4],
                "warning": None,
            },
        ],
        "parameters": 290,
        "multiply_adds": 4384,
        "weights_bytes": 1160,
        "warnings": [f"half: {lost}"],
    }


@pytest.mark.parametrize(("kind", "sides", "layers"), [("perceptron", 32, 1), ("mlp", 32, 3), ("cnn", 64, 10)])
def test_layers_and_size_have_defaults(client: TestClient, kind: str, sides: int, layers: int) -> None:
    shown = preview(client, network={"kind": kind}).json()
    assert shown["input"] == [sides, sides, 3]
    assert len(shown["layers"]) == layers and len(shown["layers"][-1]["shape"]) == 1
    grey = preview(client, network={"kind": kind, "channels": 1}, outputs=3).json()
    assert grey["input"] == [sides, sides, 1] and grey["layers"][-1]["name"] == "output"


@pytest.mark.parametrize("name", list(BackboneName))
def test_a_backbone_is_shown_up_to_its_features(client: TestClient, name: BackboneName) -> None:
    entry = CATALOGUE[name]
    shown = preview(client, backbone=name).json()
    assert shown["input"] == [entry.size, entry.size, 3]
    assert shown["layers"][-1] == {
        "name": "features",
        "type": "global_average",
        "inputs": [shown["layers"][-2]["name"]],
        "shape": [entry.cuts[entry.last_cut]],
        "parameters": 0,
        "multiply_adds": 0,
        "receptive_field": [entry.size, entry.size],
        "warning": None,
    }
    assert shown["warnings"] == []
    cut, width = next(iter(entry.cuts.items()))
    short = preview(client, backbone=name, features_from=cut, image_size=entry.minimum_size, outputs=5).json()
    assert [layer["shape"] for layer in short["layers"][-2:]] == [[width], [5]]
    assert short["layers"][-1]["parameters"] == 5 * width + 5
    assert short["parameters"] < shown["parameters"] / 5


def test_a_border_that_a_backbone_loses_is_told(client: TestClient) -> None:
    shown = preview(client, backbone="vgg16", image_size=100).json()
    assert shown["warnings"] == ["block3_pool: Leaves out the last 1 row and 1 column of a map of 25×25."]


@pytest.mark.parametrize(
    ("asked", "field", "said"),
    [
        (
            {"network": cnn(CONVOLUTION, {**CONVOLUTION, "kernel": 7, "name": "large"}, {"type": "flatten"})},
            "network.layers[1].kernel",
            "Layer 'large' (convolution): The kernel of 7×7 is larger than the map of 6×6",
        ),
        (
            {"network": cnn({"type": "pooling", "size": 9}, {"type": "flatten"})},
            "network.layers[0].size",
            "Layer 'pooling_1' (pooling): The window of 9×9 is larger than the map of 8×8",
        ),
        ({"network": cnn(CONVOLUTION)}, "network.layers[0]", "Add a flatten or a global_average layer"),
        (
            {"network": cnn({**CONVOLUTION, "name": "output"}, {"type": "flatten"})},
            "network.layers[0].name",
            "This name is reserved or used by another layer",
        ),
        ({"network": {"kind": "perceptron"}, "image_size": 1024, "outputs": 100}, "network.layers", "'output'"),
        ({"network": cnn({"type": "convolution"})}, "network.layers[0].filters", "Received nothing"),
        ({"network": cnn({**CONVOLUTION, "kernel": 0})}, "network.layers[0].kernel", "Received 0"),
        ({"network": cnn({**CONVOLUTION, "kernel": [3, 0]})}, "network.layers[0].kernel[1]", "Received 0"),
        ({"network": cnn({"type": "separable_convolution", "filters": 8})}, "network.layers[0]", "'convolution'"),
        ({"network": {"kind": "cnn"}, "features_from": "block1"}, "features_from", "only a backbone has cut points"),
        ({"backbone": "vgg16", "features_from": "block6"}, "features_from", "block4, block5"),
        (
            {"backbone": "inception_v3", "image_size": 74},
            "image_size",
            "InceptionV3 needs images of at least 75 pixels",
        ),
        ({"backbone": "vgg16", "image_size": [64, 64]}, "image_size", "Received [64, 64]"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    client: TestClient, asked: dict[str, Any], field: str, said: str
) -> None:
    answer = preview(client, **{"image_size": 8, **asked} if "network" in asked else asked)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"].endswith(":recipe-invalid")
    assert problem["field"] == field
    assert problem["detail"].startswith(f"{field}: ") and said in problem["detail"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Received neither"),
        ({"backbone": None, "network": None}, "Received neither"),
        ({"backbone": "vgg16", "network": {"kind": "mlp"}}, "Received both"),
        ({"backbone": "vgg17"}, "backbone: "),
        ({"backbone": "vgg16", "image_size": 2048}, "image_size: "),
        ({"backbone": "vgg16", "outputs": 0}, "outputs: "),
        ({"backbone": "vgg16", "cut": "block1"}, "cut: "),
    ],
)
def test_either_a_network_or_a_backbone_is_expected(client: TestClient, asked: dict[str, Any], said: str) -> None:
    answer = preview(client, **asked)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith(":request-invalid")
    assert said in answer.json()["detail"]
