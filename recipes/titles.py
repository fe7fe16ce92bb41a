"""Short titles for the recipes of a comparison, made from the values that differ between them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.layers import NetworkKind
from recipes.recipe import flat

Json = Mapping[str, Any]


def difference_titles(recipes: Sequence[Json]) -> list[str]:
    """Return a title for each filled recipe in JSON, such as `fine-tuning, unfreeze=block3, no augmentation`.

    Recipes that differ have titles that differ.
    """
    titles = [", ".join(parts) for parts in _differing_values(recipes)]
    return titles if len(set(titles)) == len(titles) else [", ".join(parts) for parts in _all_differing_values(recipes)]


def _differing_values(recipes: Sequence[Json]) -> list[list[str]]:
    """Return the differing values of each recipe. A field is compared only among recipes whose mode has the field."""
    every = _values(recipes)
    titles: list[list[str]] = [[] for _ in recipes]
    for name in _names(every):
        if len({_shown(values[name]) for values in every if values.get(name) is not None}) > 1:
            for title, values in zip(titles, every, strict=True):
                if values.get(name) is not None:
                    title.append(_shown(values[name]) if name == "mode" else f"{name}={_shown(values[name])}")
    for part in (name for name in recipes[0] if any(isinstance(recipe[name], Mapping) for recipe in recipes)):
        for title, recipe in zip(titles, recipes, strict=True):
            has = {other[part] is not None for other in recipes if other["mode"] == recipe["mode"]}
            if len(has) > 1:
                title.append(part if recipe[part] is not None else f"no {part}")
    return titles


def _all_differing_values(recipes: Sequence[Json]) -> list[list[str]]:
    """Return the values that differ between the recipes. A missing field differs from every value."""
    every = [flat(recipe) for recipe in recipes]
    differing = [
        name
        for name in _names(every)
        if len({_shown(values[name]) if name in values else None for values in every}) > 1
    ]
    return [[f"{name}={_shown(values[name])}" for name in differing if name in values] for values in every]


def _names(every: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for values in every for name in values))


def _values(recipes: Sequence[Json]) -> list[dict[str, Any]]:
    """Return for each recipe a flat {path of a field: value}, to find the fields in which the recipes differ.

    Values that follow from the kind of network are left out. Networks of the same kind and image size but with other
    layers have their list of layers as one value. If all networks have one kind, one image size and one list of layers,
    each field of each layer is a value. If kinds or sizes differ, the layers are left out.
    """
    every = [flat(recipe) for recipe in recipes]
    layers = [values.pop(_LAYERS, None) for values in every]
    chains: dict[tuple[str, str], set[str]] = {}
    for values, one in zip(every, layers, strict=True):
        if one is not None:
            chains.setdefault(_alike(values), set()).add(_chain(one))
    for values, one in zip(every, layers, strict=True):
        if one is None:
            continue
        if len(chains[_alike(values)]) > 1:
            values[_LAYERS] = _chain(one)
        elif len(chains) == 1:
            for layer in one:
                fields = {name: value for name, value in layer.items() if name not in ("name", "type")}
                values |= {f"{layer['name']}.{name}": value for name, value in fields.items()}
        if values["network.kind"] == NetworkKind.PERCEPTRON:
            for name in _DECIDED:
                values.pop(name)
    return every


# Fields that are the same for every perceptron, because the delta rule trains it image by image.
_DECIDED = ("batch_size", "optimizer.name", "optimizer.learning_rate")


def _alike(values: Json) -> tuple[str, str]:
    """Return the two values that determine the default layers: kind of network and image size."""
    return values["network.kind"], str(values["image_size"])


def _chain(layers: Sequence[Json]) -> str:
    return " ".join(map(_layer, layers))


_LAYERS = "network.layers"


def _layer(layer: Json) -> str:
    """Return a layer as one word: its name, and its number of filters or units."""
    width = layer.get("filters") or layer.get("units")
    return f"{layer['name']}({width})" if width else str(layer["name"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
