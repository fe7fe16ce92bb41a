"""Short titles of recipes that stand side by side: what tells one from the others, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.recipe import flat

Json = Mapping[str, Any]


def difference_titles(recipes: Sequence[Json]) -> list[str]:
    """Return a title for each filled recipe in JSON, such as `fine-tuning, unfreeze=block3, no augmentation`.

    Recipes that differ have titles that differ.
    """
    titles = [", ".join(parts) for parts in _told(recipes)]
    return titles if len(set(titles)) == len(titles) else [", ".join(parts) for parts in _all_told(recipes)]


def _told(recipes: Sequence[Json]) -> list[list[str]]:
    """Return what differs among the recipes that have it: a mode brings fields along that others have not."""
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


def _all_told(recipes: Sequence[Json]) -> list[list[str]]:
    """Return every value that is not the same in all recipes."""
    every = _values(recipes)
    differing = [
        name
        for name in _names(every)
        if len({_shown(values[name]) if name in values else None for values in every}) > 1
    ]
    return [[f"{name}={_shown(values[name])}" for name in differing if name in values] for values in every]


def _names(every: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for values in every for name in values))


def _values(recipes: Sequence[Json]) -> list[dict[str, Any]]:
    """Return every value of each recipe by its path: of layers their chain, and what each has if all chains are one."""
    every = [flat(recipe) for recipe in recipes]
    layers = [values.pop(_LAYERS, None) for values in every]
    chains = [None if one is None else " ".join(map(_layer, one)) for one in layers]
    is_one = len({chain for chain in chains if chain is not None}) == 1
    for values, chain, one in zip(every, chains, layers, strict=True):
        if chain is not None:
            values[_LAYERS] = chain
        for layer in one or () if is_one else ():
            values |= {
                f"{layer['name']}.{name}": value for name, value in layer.items() if name not in ("name", "type")
            }
    return every


_LAYERS = "network.layers"


def _layer(layer: Json) -> str:
    """Return a layer of a network in a word: its name, and how many filters or units it has."""
    width = layer.get("filters") or layer.get("units")
    return f"{layer['name']}({width})" if width else str(layer["name"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
