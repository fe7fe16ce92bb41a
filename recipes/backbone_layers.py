"""The layers of each backbone without its top, read from `backbone_layers.json`. Knows no Keras.

`training.networks.layer_tables` writes that file from `keras.applications`, and a test compares the two. Layers have
the names that Keras gives them. A layer that Keras only numbers (`conv2d_17`) is named by its block and branch
(`mixed0_5x5_1_conv`). `recipes.shapes` computes the shapes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from recipes.catalogue import BackboneName
from recipes.layers import (
    AnyLayer,
    BareConvolution,
    BatchNormalization,
    Concatenation,
    Convolution,
    OffsetNormalization,
    Pooling,
    Rectifier,
    SeparableConvolution,
    Sum,
    ZeroPadding,
)

FILE = Path(__file__).with_suffix(".json")

_CLASSES: dict[str, type[AnyLayer]] = {
    layer_class.__name__: layer_class
    for layer_class in (
        BareConvolution,
        BatchNormalization,
        Concatenation,
        Convolution,
        OffsetNormalization,
        Pooling,
        Rectifier,
        SeparableConvolution,
        Sum,
        ZeroPadding,
    )
}


def backbone_layers(name: BackboneName, cut: str) -> tuple[AnyLayer, ...]:
    """Return the layers of a network from the pixels to a cut point. A layer comes after the layers that it reads."""
    layers = _layers(name)
    last = _tables()[name]["cuts"][cut]
    end = next(number for number, layer in enumerate(layers, start=1) if layer.name == last)
    return layers[:end]


@cache
def _layers(name: BackboneName) -> tuple[AnyLayer, ...]:
    described = (dict(layer) for layer in _tables()[name]["layers"])
    return tuple(_CLASSES[layer.pop("class")].model_validate(layer) for layer in described)


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(FILE.read_text())
    return tables
