"""Recipes: the contract's defaults, what is filled in, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from errors import RecipeInvalid
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.filled import (
    FeatureExtractionRecipe,
    FineTuningRecipe,
    FromScratchRecipe,
    UndecidedRecipe,
    parse_filled,
)
from recipes.recipe import FineTune, Recipe, Task

TWO = [ClassCount("daisy", 30, 30), ClassCount("rose", 20, 20)]
THREE = [*TWO, ClassCount("tulip", 40, 40)]

# The table "Recipe" of the HTTP contract, but for what this version cannot train.
DEFAULTS = {
    "mode": "feature-extraction",
    "backbone": "xception",
    "weights": "imagenet",
    "features_from": None,
    "network": None,
    "image_size": None,
    "resize": "squash",
    "task": "auto",
    "head": {"hidden": [], "activation": "relu", "dropout": 0.0, "l2": 1e-4},
    "loss": "auto",
    "optimizer": {"name": "adam", "learning_rate": 0.001},
    "batch_size": 32,
    "epochs": 100,
    "early_stopping": {"monitor": "val_loss", "patience": 5, "min_delta": 0.0, "target": None},
    "folds": {"k": None, "repeats": 1, "validation_fraction": 0.15},
    "augmentation": None,
    "unfreeze": None,
    "fine_tune": None,
    "class_weights": "none",
    "precision": "float32",
    "recalibrate": False,
    "neighbours": False,
    "seed": 0,
}


def test_the_defaults_are_those_of_the_contract() -> None:
    assert Recipe().model_dump(mode="json") == DEFAULTS
    assert Recipe.model_validate({}) == Recipe()


def test_a_filled_recipe_leaves_nothing_to_choose() -> None:
    filled = fill(Recipe(), Task.MULTICLASS, THREE).model_dump(mode="json")
    folds = {"k": 5, "repeats": 1, "validation_fraction": 0.15}
    chosen = {"features_from": "block14", "image_size": 299, "task": "multiclass", "folds": folds}
    assert filled == DEFAULTS | chosen


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, FeatureExtractionRecipe),
        ({"mode": "fine-tuning"}, FineTuningRecipe),
        ({"mode": "from-scratch"}, FromScratchRecipe),
        ({"backbone": "auto"}, UndecidedRecipe),
        ({"features_from": "auto"}, UndecidedRecipe),
    ],
)
def test_a_filled_recipe_has_the_type_of_its_mode_and_the_json_of_a_recipe(
    recipe: dict[str, Any], expected: type[Recipe]
) -> None:
    filled = fill(Recipe.model_validate(recipe), Task.MULTICLASS, THREE)
    assert type(filled) is expected
    stored = filled.model_dump(mode="json")
    assert Recipe.model_validate(stored).model_dump_json() == filled.model_dump_json()
    assert list(stored) == list(DEFAULTS)
    assert parse_filled(stored) == filled


def test_each_value_of_the_contract_that_works_is_taken() -> None:
    for name in ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"):
        assert Recipe.model_validate({"optimizer": {"name": name}}).optimizer.name == name
    for resize in ("squash", "crop", "pad"):
        assert Recipe.model_validate({"resize": resize}).resize == resize
    for backbone in ("vgg16", "vgg19", "resnet50", "inception_v3", "xception"):
        assert Recipe.model_validate({"backbone": backbone}).backbone == backbone
    for task in ("auto", "multiclass", "binary"):
        assert Recipe.model_validate({"task": task}).task == task
    for weights in ("imagenet", "random", "flowers-2.1_b"):
        assert Recipe.model_validate({"weights": weights}).weights == weights
    assert Recipe.model_validate({"early_stopping": None}).early_stopping is None
    target = {"metric": "val_accuracy", "value": 0.9}
    stopping = Recipe.model_validate({"early_stopping": {"target": target}}).early_stopping
    assert stopping is not None and stopping.target is not None and stopping.target.model_dump() == target


# --- filling in ------------------------------------------------------------------------------------------------------

counts = st.integers(2, 60).map(lambda groups: ClassCount("a", groups, groups))
recipes = st.builds(
    Recipe,
    backbone=st.sampled_from(BackboneName),
    image_size=st.none() | st.integers(75, 1024),
    task=st.sampled_from(["auto", Task.MULTICLASS]),
    seed=st.integers(0, 2**32 - 1),
)


@given(recipes, st.lists(counts, min_size=2, max_size=5))
def test_filling_a_filled_recipe_changes_nothing(recipe: Recipe, classes: Sequence[ClassCount]) -> None:
    task = Task.BINARY if len(classes) == 2 else Task.MULTICLASS
    filled = fill(recipe, task, classes)
    assert fill(filled, task, classes) == filled
    assert parse_filled(json.loads(filled.model_dump_json())) == filled
    backbone = CATALOGUE[recipe.backbone]
    assert filled.image_size == (recipe.image_size or backbone.size)
    assert filled.features_from == backbone.last_cut
    assert filled.folds.k == min(5, min(count.groups for count in classes))
    assert filled.seed == recipe.seed


def test_the_task_is_that_of_the_data_set_unless_it_is_said() -> None:
    assert fill(Recipe(), Task.BINARY, TWO).task is Task.BINARY
    assert fill(Recipe(), Task.MULTICLASS, THREE).task is Task.MULTICLASS
    assert fill(Recipe(task=Task.MULTICLASS), Task.BINARY, TWO).task is Task.MULTICLASS
    assert fill(Recipe(task=Task.BINARY), Task.BINARY, TWO).task is Task.BINARY


@pytest.mark.parametrize("backbone", BackboneName)
def test_each_cut_and_each_size_of_a_backbone_can_be_chosen(backbone: BackboneName) -> None:
    facts = CATALOGUE[backbone]
    for cut in facts.cuts:
        recipe = Recipe(backbone=backbone, features_from=cut, image_size=facts.minimum_size)
        filled = fill(recipe, Task.BINARY, TWO)
        assert (filled.features_from, filled.image_size) == (cut, facts.minimum_size)


def test_folds_count_groups_not_images() -> None:
    bursts = [ClassCount("daisy", 300, 4), ClassCount("rose", 20, 20)]
    assert fill(Recipe(), Task.BINARY, bursts).folds.k == 4


def refused(recipe: dict[str, Any], task: Task = Task.BINARY, classes: Sequence[ClassCount] = TWO) -> RecipeInvalid:
    with pytest.raises(RecipeInvalid) as caught:
        fill(Recipe.model_validate(recipe), task, classes)
    assert caught.value.record()["field"] == caught.value.field
    return caught.value


@pytest.mark.parametrize("backbone", BackboneName)
def test_an_image_size_below_the_minimum_is_refused(backbone: BackboneName) -> None:
    minimum = CATALOGUE[backbone].minimum_size
    error = refused({"backbone": backbone, "image_size": minimum - 1})
    assert error.field == "image_size"
    assert f"at least {minimum} pixels" in error.detail and f"Received {minimum - 1}" in error.detail


@pytest.mark.parametrize("cut", ["block6", "conv5", "", "BLOCK5", "block5 "])
def test_a_cut_that_the_backbone_does_not_have_is_refused(cut: str) -> None:
    error = refused({"backbone": "vgg16", "features_from": cut})
    assert error.field == "features_from"
    assert "block1, block2, block3, block4, block5" in error.detail and repr(cut) in error.detail


@pytest.mark.parametrize(
    ("wanted", "task", "classes"),
    [
        ("binary", Task.MULTICLASS, THREE),
        ("regression", Task.MULTICLASS, THREE),
        ("regression", Task.BINARY, TWO),
        ("multiclass", Task.MULTILABEL, THREE),
        ("multiclass", Task.REGRESSION, []),
        ("multilabel", Task.REGRESSION, []),
    ],
)
def test_a_task_that_the_data_set_is_not_for_is_refused(wanted: str, task: Task, classes: Sequence[ClassCount]) -> None:
    error = refused({"task": wanted}, task, classes)
    assert error.field == "task" and f"task {task.value!r}" in error.detail and repr(wanted) in error.detail


def test_classes_may_be_learned_as_labels_that_do_not_exclude_each_other() -> None:
    assert fill(Recipe(task=Task.MULTILABEL), Task.MULTICLASS, THREE).task is Task.MULTILABEL


def test_a_regression_is_folded_by_all_of_its_groups() -> None:
    assert fill(Recipe(), Task.REGRESSION, [], groups=4).folds.k == 4
    with pytest.raises(RecipeInvalid, match="at most 4 folds, since the data set has") as caught:
        fill(Recipe.model_validate({"folds": {"k": 5}}), Task.REGRESSION, [], groups=4)
    assert caught.value.field == "folds.k"
    with pytest.raises(RecipeInvalid, match="at least 2 groups of images of the data set") as caught:
        fill(Recipe(), Task.REGRESSION, [], groups=1)
    assert caught.value.field == "dataset"


def test_an_accuracy_above_one_is_no_target() -> None:
    recipe = Recipe.model_validate({"early_stopping": {"target": {"metric": "accuracy", "value": 90}}})
    with pytest.raises(RecipeInvalid, match="at most 1, since accuracy is a share") as caught:
        fill(recipe, Task.BINARY, TWO)
    assert caught.value.field == "early_stopping.target.value"


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"early_stopping": {"monitor": "val_accuracy"}}, "early_stopping.monitor"),
        ({"early_stopping": {"target": {"metric": "accuracy", "value": 0.9}}}, "early_stopping.target.metric"),
        ({"class_weights": "auto"}, "class_weights"),
    ],
)
def test_what_a_regression_does_not_have_is_refused(recipe: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        fill(Recipe.model_validate(recipe), Task.REGRESSION, [], groups=9)
    assert caught.value.field == field


def test_labels_have_no_class_weights() -> None:
    assert refused({"class_weights": "auto"}, Task.MULTILABEL, THREE).field == "class_weights"


def test_more_folds_than_the_smallest_class_has_groups_are_refused() -> None:
    classes = [ClassCount("daisy", 30, 30), ClassCount("rose", 9, 4)]
    assert fill(Recipe.model_validate({"folds": {"k": 4}}), Task.BINARY, classes).folds.k == 4
    error = refused({"folds": {"k": 5}}, classes=classes)
    assert error.field == "folds.k"
    assert "at most 4 folds, since class 'rose'" in error.detail and "Received 5" in error.detail


@pytest.mark.parametrize("groups", [0, 1])
def test_a_class_that_cannot_be_split_is_refused(groups: int) -> None:
    error = refused({}, classes=[ClassCount("daisy", 30, 30), ClassCount("rose", 7, groups)])
    assert error.field == "dataset"
    assert f"Class 'rose' has {groups} (of 7 images)" in error.detail


# --- the door --------------------------------------------------------------------------------------------------------


def field_of(recipe: dict[str, Any]) -> str:
    """Return the field that the refusal of a recipe names."""
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe)
    (error,) = caught.value.errors()
    return ".".join(map(str, error["loc"]))


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"mode": "distillation"}, "mode"),
        ({"precision": "int4"}, "precision"),
        ({"teacher": {"backbone": "vgg16"}}, "teacher"),
    ],
)
def test_what_is_not_built_is_refused_by_name(recipe: dict[str, Any], field: str) -> None:
    assert field_of(recipe) == field


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"batchsize": 32}, "batchsize"),
        ({"head": {"units": 3}}, "head.units"),
        ({"optimizer": {"lr": 0.1}}, "optimizer.lr"),
        ({"early_stopping": {"wait": 3}}, "early_stopping.wait"),
        ({"early_stopping": {"target": {"metric": "loss", "value": 1, "below": True}}}, "early_stopping.target.below"),
        ({"folds": {"n": 3}}, "folds.n"),
        ({"backbone": "resnet18"}, "backbone"),
        ({"backbone": "Xception"}, "backbone"),
        ({"weights": "../../etc/passwd"}, "weights"),
        ({"weights": "ImageNet"}, "weights"),
        ({"weights": "imagenet\n"}, "weights"),
        ({"weights": ""}, "weights"),
        ({"image_size": 0}, "image_size.side"),
        ({"image_size": 1025}, "image_size.side"),
        ({"image_size": 64.5}, "image_size.side"),
        ({"image_size": [32, 0]}, "image_size.sides.1"),
        ({"network": {"kind": "rnn"}}, "network.kind"),
        ({"network": {"channels": 4}}, "network.channels"),
        ({"network": {"layers": [{"type": "attention"}]}}, "network.layers.0"),
        ({"network": {"layers": [{"type": "dense"}]}}, "network.layers.0.dense.units"),
        ({"resize": "stretch"}, "resize"),
        ({"head": {"hidden": [0]}}, "head.hidden.0"),
        ({"head": {"hidden": [64, 4097]}}, "head.hidden.1"),
        ({"head": {"hidden": [8] * 5}}, "head.hidden"),
        ({"head": {"activation": "softmax"}}, "head.activation"),
        ({"head": {"dropout": 1.0}}, "head.dropout"),
        ({"head": {"dropout": -0.1}}, "head.dropout"),
        ({"head": {"l2": -1}}, "head.l2"),
        ({"head": {"l2": 11}}, "head.l2"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
        ({"optimizer": {"learning_rate": 11}}, "optimizer.learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 8193}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 10_001}, "epochs"),
        ({"early_stopping": {"monitor": "loss"}}, "early_stopping.monitor"),
        ({"early_stopping": {"patience": -1}}, "early_stopping.patience"),
        ({"early_stopping": {"min_delta": -0.1}}, "early_stopping.min_delta"),
        ({"early_stopping": {"min_delta": 1e39}}, "early_stopping.min_delta"),
        ({"early_stopping": {"target": {"metric": "loss", "value": 1e300}}}, "early_stopping.target.value"),
        ({"early_stopping": {"target": {"metric": "loss", "value": -1}}}, "early_stopping.target.value"),
        ({"early_stopping": {"target": {"metric": "f1", "value": 0.9}}}, "early_stopping.target.metric"),
        ({"early_stopping": {"target": {"metric": "loss"}}}, "early_stopping.target.value"),
        ({"folds": {"k": 1}}, "folds.k"),
        ({"folds": {"k": 21}}, "folds.k"),
        ({"folds": {"repeats": 0}}, "folds.repeats"),
        ({"folds": {"repeats": 21}}, "folds.repeats"),
        ({"folds": {"validation_fraction": 0}}, "folds.validation_fraction"),
        ({"folds": {"validation_fraction": 0.6}}, "folds.validation_fraction"),
        ({"class_weights": "balanced"}, "class_weights"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": "now"}, "seed"),
    ],
)
def test_every_refusal_names_its_field(recipe: dict[str, Any], field: str) -> None:
    assert field_of(recipe) == field


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ('{"early_stopping": {"min_delta": %s}}', "early_stopping.min_delta"),
        ('{"early_stopping": {"target": {"metric": "loss", "value": %s}}}', "early_stopping.target.value"),
        ('{"optimizer": {"learning_rate": %s}}', "optimizer.learning_rate"),
        ('{"head": {"l2": %s}}', "head.l2"),
        ('{"head": {"dropout": %s}}', "head.dropout"),
        ('{"folds": {"validation_fraction": %s}}', "folds.validation_fraction"),
    ],
)
def test_numbers_without_bounds_are_refused(recipe: str, field: str, number: str) -> None:
    assert field_of(json.loads(recipe % number)) == field


def test_a_recipe_does_not_change_on_its_way() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]  # this is the point
    fill(recipe, Task.BINARY, TWO)
    assert recipe == Recipe()


def words(schema: Any) -> Iterator[str]:
    """Yield every value that a JSON schema offers and every field that it names."""
    if isinstance(schema, dict):
        yield from schema.get("enum", [])
        yield from [schema["const"]] if "const" in schema else []
        yield from schema.get("properties", {})
        for part in schema.values():
            yield from words(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from words(part)


def test_what_is_not_built_is_not_in_the_schema() -> None:
    offered = set(words(Recipe.model_json_schema()))
    assert {
        "feature-extraction",
        "fine-tuning",
        "from-scratch",
        "bfloat16",
        "multiclass",
        "adamw",
        "features_from",
    } <= offered
    assert not offered & {"distillation", "int4", "teacher"}
    assert set(Recipe.model_json_schema()["properties"]) == set(DEFAULTS)


def tuned(**change: object) -> Recipe:
    given = {"mode": "fine-tuning", "backbone": "vgg16", **change}
    return fill(Recipe.model_validate(given), Task.MULTICLASS, [ClassCount(name, 9, 9) for name in "abc"])


def test_fine_tuning_starts_at_the_last_block_slowly_and_varies_images_a_little() -> None:
    recipe = tuned()
    assert recipe.unfreeze == "block5"
    assert recipe.fine_tune == FineTune(learning_rate=1e-5, epochs=20, warmup_epochs=1)
    assert recipe.augmentation is not None and recipe.augmentation.rotate_degrees > 0
    assert not recipe.augmentation.flip


def test_only_a_shared_quantised_network_is_calibrated_anew() -> None:
    def filled(**change: object) -> Recipe:
        return fill(Recipe.model_validate(change), Task.MULTICLASS, THREE)

    for precision in ("int8", "auto"):
        assert filled(precision=precision, recalibrate=True).recalibrate
    with pytest.raises(RecipeInvalid, match="only int8 networks are calibrated") as caught:
        filled(recalibrate=True)
    assert caught.value.field == "recalibrate"
    with pytest.raises(RecipeInvalid, match="always calibrated anew"):
        tuned(precision="int8", recalibrate=True)


def test_null_leaves_images_as_they_are() -> None:
    assert tuned(augmentation=None).augmentation is None


def test_the_last_block_is_where_features_are_taken_from() -> None:
    assert tuned(features_from="block3").unfreeze == "block3"


@pytest.mark.parametrize("unfreeze", ["block2", "block5", "all"])
def test_a_network_may_learn_from_any_cut_on(unfreeze: str) -> None:
    assert tuned(unfreeze=unfreeze).unfreeze == unfreeze


@pytest.mark.parametrize(("backbone", "first"), [("vgg16", "block1"), ("xception", "block2"), ("resnet50", "conv2")])
def test_from_the_first_cut_on_is_all(backbone: str, first: str) -> None:
    assert tuned(backbone=backbone, unfreeze=first).unfreeze == "all"


@pytest.mark.parametrize(("unfreeze", "features_from"), [("block9", None), ("block5", "block4")])
def test_a_network_cannot_learn_after_its_end(unfreeze: str, features_from: str | None) -> None:
    with pytest.raises(RecipeInvalid, match=f"or 'all'.*Received '{unfreeze}'") as refused:
        tuned(unfreeze=unfreeze, features_from=features_from)
    assert refused.value.field == "unfreeze"


@pytest.mark.parametrize(
    ("field", "value"), [("unfreeze", "block5"), ("fine_tune", {}), ("augmentation", {"zoom": 0.1})]
)
def test_a_frozen_network_is_not_tuned(field: str, value: object) -> None:
    with pytest.raises(RecipeInvalid, match="fine-tuning") as refused:
        tuned(mode="feature-extraction", **{field: value})
    assert refused.value.field == field


def test_a_filled_recipe_is_filled_as_it_is() -> None:
    recipe = tuned(augmentation=None)
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert fill(again, Task.MULTICLASS, [ClassCount(name, 9, 9) for name in "abc"]) == recipe


def test_a_recipe_is_flat_by_the_paths_of_its_values() -> None:
    values = Recipe(augmentation=None).flat()
    assert (values["head.l2"], values["folds.repeats"], values["augmentation"]) == (1e-4, 1, None)
    assert "head" not in values


# --- from scratch -----------------------------------------------------------------------------------------------------

SCRATCH: dict[str, Any] = {"mode": "from-scratch"}


def test_a_network_from_scratch_is_a_small_cnn_by_default() -> None:
    filled = fill(Recipe.model_validate(SCRATCH), Task.MULTICLASS, THREE)
    assert filled.network is not None and filled.network.kind == "cnn" and filled.image_size == 64
    assert [layer.type for layer in filled.network.layers or ()][-4:] == ["convolution", "flatten", "dropout", "dense"]
    absent = ("backbone", "weights", "features_from", "head", "unfreeze", "fine_tune")
    assert [getattr(filled, name) for name in absent] == [None] * len(absent)
    assert fill(filled, Task.MULTICLASS, THREE) == filled
    assert parse_filled(json.loads(filled.model_dump_json())) == filled


@pytest.mark.parametrize("kind", ["perceptron", "mlp", "cnn"])
def test_filling_a_filled_network_changes_nothing(kind: str) -> None:
    filled = fill(Recipe.model_validate(SCRATCH | {"network": {"kind": kind}}), Task.BINARY, TWO)
    again = Recipe.model_validate_json(filled.model_dump_json())
    assert fill(again, Task.BINARY, TWO) == filled
    assert filled.batch_size == (1 if kind == "perceptron" else 32)


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"backbone": "vgg16"}, "backbone"),
        ({"weights": "random"}, "weights"),
        ({"features_from": "block1"}, "features_from"),
        ({"head": {"l2": 0}}, "head"),
        ({"unfreeze": "all"}, "unfreeze"),
        ({"fine_tune": {"epochs": 3}}, "fine_tune"),
        ({"precision": "int8", "recalibrate": True}, "recalibrate"),
        ({"network": {"kind": "perceptron"}, "batch_size": 8}, "batch_size"),
        ({"network": {"kind": "perceptron"}, "optimizer": {"name": "adam"}}, "optimizer.name"),
        ({"network": {"kind": "perceptron", "threshold": "step"}, "loss": "mean_squared_error"}, "loss"),
        ({"network": {"kind": "perceptron", "layers": [{"type": "flatten"}]}}, "network.layers"),
        ({"network": {"kind": "mlp", "threshold": "step"}}, "network.threshold"),
        ({"network": {"layers": [{"type": "convolution", "filters": 2}]}}, "network.layers[0]"),
        ({"loss": "mean_squared_error"}, "loss"),
        ({"network": {"kind": "perceptron"}, "precision": "int8"}, "precision"),
        ({"network": {"kind": "perceptron"}, "image_size": 128, "neighbours": True}, "neighbours"),
    ],
)
def test_what_a_network_from_scratch_has_not_is_refused(recipe: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeInvalid) as refused:
        fill(Recipe.model_validate(SCRATCH | recipe), Task.MULTICLASS, THREE)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"network": {"kind": "cnn"}}, "network"),
        ({"loss": "mean_squared_error"}, "loss"),
        ({"backbone": None}, "backbone"),
        ({"weights": None}, "weights"),
        ({"head": None}, "head"),
        ({"image_size": [224, 200]}, "image_size"),
    ],
)
def test_what_only_a_network_from_scratch_has_is_refused(recipe: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeInvalid) as refused:
        fill(Recipe.model_validate(recipe), Task.MULTICLASS, THREE)
    assert refused.value.field == field


def test_the_output_layer_counts_among_the_parameters() -> None:
    many = [ClassCount(str(number), 9, 9) for number in range(1000)]
    recipe = Recipe.model_validate(SCRATCH | {"network": {"kind": "perceptron"}, "image_size": 1024})
    fill(recipe, Task.MULTICLASS, THREE)
    with pytest.raises(RecipeInvalid, match="parameters"):
        fill(recipe, Task.MULTICLASS, many)


def test_stochastic_pooling_has_windows_that_can_be_drawn_from() -> None:
    layers = [{"type": "pooling", "kind": "stochastic", "size": 9}, {"type": "flatten"}]
    with pytest.raises(RecipeInvalid) as refused:
        fill(Recipe.model_validate(SCRATCH | {"network": {"layers": layers}}), Task.MULTICLASS, THREE)
    assert refused.value.field == "network.layers[0].size"


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": True},
        {"seed": False},
        {"optimizer": {"learning_rate": True}},
        {"head": {"hidden": [True]}},
        {"folds": {"k": True}},
        {"early_stopping": {"target": {"metric": "accuracy", "value": True}}},
    ],
)
def test_true_and_false_are_no_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="no true or false"):
        Recipe(**wrong)
    assert Recipe(neighbours=True).neighbours
