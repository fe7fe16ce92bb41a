from __future__ import annotations

from typing import Any

from recipes.defaults import ClassCount, fill
from recipes.recipe import Recipe, Task
from recipes.titles import difference_titles

CLASSES = [ClassCount(name, 9, 9) for name in "abc"]


def titles(*recipes: dict[str, Any]) -> list[str]:
    filled = [fill(Recipe.model_validate(recipe), Task.MULTICLASS, CLASSES) for recipe in recipes]
    return difference_titles([recipe.model_dump(mode="json") for recipe in filled])


def test_a_title_names_what_differs_and_nothing_else() -> None:
    one = {"backbone": "vgg16", "epochs": 3, "features_from": "block3"}
    assert titles(one, one | {"features_from": "block4"}) == ["features_from=block3", "features_from=block4"]
    found = titles(one | {"head": {"l2": 0.006}}, one | {"head": {"hidden": [8]}})
    assert found == ["head.hidden=[], head.l2=0.006", "head.hidden=[8], head.l2=0.0001"]


def test_what_a_mode_brings_along_is_told_only_where_it_differs() -> None:
    tuned = {"backbone": "vgg16", "mode": "fine-tuning", "unfreeze": "block3"}
    found = titles({"backbone": "vgg16"}, tuned, tuned | {"unfreeze": "all", "augmentation": None})
    assert found == [
        "feature-extraction",
        "fine-tuning, unfreeze=block3, augmentation",
        "fine-tuning, unfreeze=all, no augmentation",
    ]


def test_a_part_that_one_recipe_has_not_is_told() -> None:
    assert titles({}, {"early_stopping": None}) == ["early_stopping", "no early_stopping"]


def test_titles_that_would_be_the_same_tell_everything() -> None:
    odd = [{"mode": "a", "weights": None}, {"mode": "a", "weights": "b"}, {"mode": "a", "weights": "b", "seed": 1}]
    assert difference_titles(odd) == ["weights=null", "weights=b", "weights=b, seed=1"]


def test_networks_are_told_apart_by_what_differs_in_their_layers() -> None:
    def cnn(**pooling: Any) -> dict[str, Any]:
        layers = [{"type": "convolution", "filters": 8}, {"type": "pooling", **pooling}, {"type": "flatten"}]
        return {"mode": "from-scratch", "network": {"layers": layers}}

    found = titles(cnn(), cnn(kind="average"), cnn(kind="stochastic"))
    assert found == ["pooling_1.kind=max", "pooling_1.kind=average", "pooling_1.kind=stochastic"]
    found = titles(cnn(), cnn() | {"network": {"kind": "cnn"}})
    assert found[0] == "network.layers=convolution_1(8) pooling_1 flatten_1"
    assert found[1].startswith("network.layers=convolution_1(16) pooling_1 convolution_2(32)")
    wide = cnn()
    wide["network"]["layers"][0]["kernel"] = 5
    assert titles(cnn(), wide) == ["convolution_1.kernel=3", "convolution_1.kernel=5"]


def test_what_a_kind_of_network_decides_is_not_told() -> None:
    scratch = {"mode": "from-scratch"}
    kinds = [scratch | {"network": {"kind": kind}} for kind in ("perceptron", "mlp", "cnn")]
    frozen = {"backbone": "vgg16", "image_size": 32}
    assert titles(*kinds, scratch | {"image_size": 32}, frozen) == [
        "from-scratch, network.kind=perceptron, image_size=32",
        "from-scratch, network.kind=mlp, image_size=32",
        "from-scratch, network.kind=cnn, image_size=64",
        "from-scratch, network.kind=cnn, image_size=32",
        "feature-extraction, image_size=32",
    ]
    rates = [kinds[0] | {"optimizer": {"name": "sgd", "learning_rate": rate}} for rate in (0.1, 0.2)]
    assert len(set(titles(*rates))) == 2
