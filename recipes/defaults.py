"""Fills a recipe: replaces what it leaves open by defaults that suit the data set, and refuses what cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errors import RecipeInvalid
from recipes.catalogue import ALL, CATALOGUE, Backbone, BackboneName
from recipes.filled import FilledRecipe, parse_filled
from recipes.layers import NetworkKind, NetworkRecipe, Threshold, sides
from recipes.recipe import (
    AUTO,
    Augmentation,
    ClassWeights,
    FineTune,
    Loss,
    Mode,
    Monitor,
    OptimizerName,
    OptimizerRecipe,
    Precision,
    Recipe,
    TargetMetric,
    Task,
)
from recipes.shapes import default_size, filled_network, table


@dataclass(frozen=True)
class ClassCount:
    """A class of a data set version, with its number of images and of groups that folds can divide.

    An image without a group is a group of its own. Test and validation images are in no fold and do not count.
    """

    name: str
    images: int
    groups: int


def fill(recipe: Recipe, task: Task, classes: Sequence[ClassCount], groups: int = 0) -> FilledRecipe:
    """Return the recipe with every default filled in for a data set.

    Args:
        recipe: the recipe of the request.
        task: the task of the data set.
        classes: the classes or labels of the data set; none for a regression.
        groups: the number of groups that folds can divide; read only where there are no classes.

    Raises:
        RecipeInvalid: a field contradicts another field or the data set; the error names it.
    """
    chosen = _filled_task(recipe.task, task, classes)
    _check_task_fits(recipe, chosen)
    _check_recalibrate(recipe)
    from_scratch = recipe.mode is Mode.FROM_SCRATCH
    filled = recipe.model_copy(
        update={
            **(_filled_network(recipe, chosen, classes) if from_scratch else _filled_backbone(recipe)),
            "task": chosen,
            "folds": recipe.folds.model_copy(update={"k": _filled_k(recipe.folds.k, classes, groups)}),
        }
    )
    return parse_filled(filled.model_dump())


def _filled_backbone(recipe: Recipe) -> dict[str, object]:
    """Return the fields of a pretrained network, filled in. Raises RecipeInvalid."""
    _see_absent(recipe, ("network",), f"only mode {Mode.FROM_SCRATCH.value!r} has this field")
    if recipe.loss is not Loss.AUTO:
        raise RecipeInvalid("loss", f"Expected 'auto': only mode {Mode.FROM_SCRATCH.value!r} can have another loss.")
    for name in ("backbone", "weights", "head"):
        if getattr(recipe, name) is None:
            raise RecipeInvalid(
                name, f"Expected a value. Received null. Only mode {Mode.FROM_SCRATCH.value!r} leaves out this field."
            )
    if not isinstance(recipe.backbone, BackboneName) or recipe.features_from == AUTO:
        return _left_open(recipe)
    backbone = CATALOGUE[recipe.backbone]
    size = recipe.image_size
    if size is not None and not isinstance(size, int):
        raise RecipeInvalid(
            "image_size", f"Expected one number, since {backbone.title} reads square images. Received {list(size)}."
        )
    cut, size = backbone.fitted(recipe.features_from, size)
    return {"image_size": size, "features_from": cut, **_filled_tuning(recipe, backbone, cut)}


def _left_open(recipe: Recipe) -> dict[str, object]:
    """Return the fields of a pretrained network that a bake-off will choose, filled in as far as they can be now.

    Raises RecipeInvalid.
    """
    field = "backbone" if recipe.backbone == AUTO else "features_from"
    if recipe.mode is Mode.FINE_TUNING:
        raise RecipeInvalid(
            field,
            f"`{field}: auto` is not supported in mode {recipe.mode.value!r}. Run 'feature-extraction' with 'auto' "
            "first, then name what it chose.",
        )
    size, cut = recipe.image_size, recipe.features_from
    if size is not None and not isinstance(size, int):
        raise RecipeInvalid(
            "image_size", f"Expected one number, since backbones read square images. Received {list(size)}."
        )
    if isinstance(recipe.backbone, BackboneName):
        _, size = CATALOGUE[recipe.backbone].fitted(None, size)
    else:
        if cut not in (None, AUTO):
            raise RecipeInvalid(
                "features_from",
                f"Expected null or 'auto' with backbone 'auto'. Received {cut!r}.",
            )
        least = min(backbone.minimum_size for backbone in CATALOGUE.values())
        if size is not None and size < least:
            raise RecipeInvalid("image_size", f"Expected at least {least} pixels. Received {size}.")
    return {"image_size": size, "features_from": cut, **_without_tuning(recipe)}


_OF_BACKBONES = ("backbone", "weights", "features_from", "head", "unfreeze", "fine_tune")
# The learning rate of the delta rule on pixels from -1 to 1.
_DELTA_RATE = 0.01
# Features of an image by which neighbours are found; those of all training images are in memory together.
MOST_COMPARED = 16_384


def _filled_network(recipe: Recipe, task: Task, classes: Sequence[ClassCount]) -> dict[str, object]:
    """Return the fields of a network from scratch, filled in. Raises RecipeInvalid."""
    _see_absent(recipe, _OF_BACKBONES, "a network from scratch has no backbone and no separate head")
    network = recipe.network or NetworkRecipe()
    size = recipe.image_size or default_size(network.kind)
    filled: dict[str, object] = dict.fromkeys(_OF_BACKBONES)
    if network.kind is NetworkKind.PERCEPTRON:
        network = _filled_perceptron(recipe, network, task)
        plain = OptimizerRecipe(name=OptimizerName.SGD, learning_rate=_DELTA_RATE)
        filled |= {"batch_size": 1, "optimizer": recipe.optimizer if _is_given(recipe, "optimizer") else plain}
    elif recipe.loss is not Loss.AUTO and task not in (Task.BINARY, Task.MULTILABEL):
        raise RecipeInvalid(
            "loss",
            f"Expected 'auto' for task {task.value!r}: only tasks binary and multilabel can have another loss.",
        )
    outputs = 1 if task in (Task.BINARY, Task.REGRESSION) else len(classes)
    network = filled_network(network, *sides(size), outputs)
    (features,) = table(network, *sides(size))[-1].shape
    if recipe.neighbours and features > MOST_COMPARED:
        raise RecipeInvalid(
            "neighbours",
            f"Expected false: the last layer has {features:,} values, and neighbours can compare at most "
            f"{MOST_COMPARED:,}. Use layers that end in fewer values.",
        )
    if recipe.precision is not Precision.FLOAT32 and network.kind is NetworkKind.PERCEPTRON:
        raise RecipeInvalid("precision", "Expected 'float32': a perceptron has no layers before its output.")
    return {**filled, "image_size": size, "network": network}


def _filled_perceptron(recipe: Recipe, network: NetworkRecipe, task: Task) -> NetworkRecipe:
    """Return a perceptron, filled in; the delta rule trains it one image at a time. Raises RecipeInvalid."""
    if _is_given(recipe, "batch_size") and recipe.batch_size != 1:
        raise RecipeInvalid(
            "batch_size", f"Expected 1, since a perceptron is trained image by image. Received {recipe.batch_size}."
        )
    if _is_given(recipe, "optimizer") and recipe.optimizer.name is not OptimizerName.SGD:
        raise RecipeInvalid(
            "optimizer.name",
            f"Expected 'sgd', since the delta rule trains a perceptron. Received {recipe.optimizer.name.value!r}.",
        )
    if task is Task.REGRESSION and network.threshold is not None:
        raise RecipeInvalid(
            "network.threshold", "Expected null: the output of a regression is linear and has no threshold."
        )
    threshold = network.threshold or (None if task is Task.REGRESSION else Threshold.SIGMOID)
    if recipe.loss is not Loss.AUTO and threshold is not Threshold.SIGMOID:
        raise RecipeInvalid(
            "loss", "Expected 'auto': only a perceptron with threshold 'sigmoid' can have another loss."
        )
    return network.model_copy(update={"threshold": threshold})


def _see_absent(recipe: Recipe, names: Sequence[str], reason: str) -> None:
    """Check that fields were left out or are null. Raises RecipeInvalid."""
    for name in names:
        if _is_given(recipe, name) and getattr(recipe, name) is not None:
            raise RecipeInvalid(name, f"Expected null: {reason}.")


def _is_given(recipe: Recipe, name: str) -> bool:
    """Return whether the request has a field, even if with the default value."""
    return name in recipe.model_fields_set


def _check_recalibrate(recipe: Recipe) -> None:
    """Check that a recipe that asks for calibration has a network to calibrate. Raises RecipeInvalid."""
    if recipe.recalibrate and recipe.precision not in (Precision.INT8, AUTO):
        raise RecipeInvalid(
            "recalibrate",
            f"Expected false with precision {str(recipe.precision)!r}: only int8 networks are calibrated.",
        )
    if recipe.recalibrate and recipe.mode is not Mode.FEATURE_EXTRACTION:
        raise RecipeInvalid("recalibrate", "Expected false: a trained network is always calibrated anew.")


_LITTLE = Augmentation(rotate_degrees=10.0, zoom=0.1, brightness=0.1)


_OF_TUNING = ("augmentation", "unfreeze", "fine_tune")


def _without_tuning(recipe: Recipe) -> dict[str, object]:
    """Return null for the fields of fine-tuning. Raises RecipeInvalid if the recipe has one of them."""
    _see_absent(recipe, _OF_TUNING, f"only mode {Mode.FINE_TUNING.value!r} has this field")
    return dict.fromkeys(_OF_TUNING)


def _filled_tuning(recipe: Recipe, backbone: Backbone, cut: str) -> dict[str, object]:
    """Return the fields of fine-tuning, filled in; null in another mode. Raises RecipeInvalid."""
    if recipe.mode is not Mode.FINE_TUNING:
        return _without_tuning(recipe)
    cuts = list(backbone.cuts)
    allowed = [*cuts[: cuts.index(cut) + 1], ALL]
    unfreeze = cut if recipe.unfreeze is None else recipe.unfreeze
    if unfreeze not in allowed:
        raise RecipeInvalid(
            "unfreeze",
            f"Expected a cut point of {backbone.title} up to {cut!r}, where features are taken from, or {ALL!r} "
            f"({', '.join(allowed)}). Received {unfreeze!r}.",
        )
    return {
        "augmentation": recipe.augmentation if "augmentation" in recipe.model_fields_set else _LITTLE,
        "unfreeze": unfreeze if backbone.cut_before(unfreeze) else ALL,  # no layer is before the first cut
        "fine_tune": recipe.fine_tune or FineTune(),
    }


_DEFAULT_K = 5


def _filled_task(wanted: Task | Literal["auto"], task: Task, classes: Sequence[ClassCount]) -> Task:
    allowed = {
        Task.BINARY: [Task.BINARY, Task.MULTICLASS, Task.MULTILABEL],
        Task.MULTICLASS: [Task.MULTICLASS, Task.MULTILABEL],
    }.get(task, [task])
    chosen = wanted if isinstance(wanted, Task) else task
    if chosen not in allowed:
        raise RecipeInvalid(
            "task",
            f"Expected {' or '.join(repr(choice.value) for choice in allowed)} for a data set of task {task.value!r} "
            f"with {len(classes)} classes. Received {str(wanted)!r}.",
        )
    return chosen


_ACCURACIES = (TargetMetric.ACCURACY, TargetMetric.VAL_ACCURACY)


def _check_task_fits(recipe: Recipe, task: Task) -> None:
    """Check the fields that only some tasks support. Raises RecipeInvalid."""
    if recipe.class_weights is not ClassWeights.NONE and task not in (Task.BINARY, Task.MULTICLASS):
        raise RecipeInvalid(
            "class_weights",
            f"Expected 'none' for task {task.value!r}, since its images do not have exactly one class. Received "
            f"{recipe.class_weights.value!r}.",
        )
    stopping = recipe.early_stopping
    if stopping is None:
        return
    if stopping.target and stopping.target.metric in _ACCURACIES and stopping.target.value > 1:
        raise RecipeInvalid(
            "early_stopping.target.value",
            f"Expected at most 1, since {stopping.target.metric.value} is a share. Received {stopping.target.value:g}.",
        )
    if task is not Task.REGRESSION:
        return
    if stopping.monitor is Monitor.VAL_ACCURACY:
        raise RecipeInvalid("early_stopping.monitor", "Expected 'val_loss': a regression has no accuracy.")
    if stopping.target and stopping.target.metric in _ACCURACIES:
        raise RecipeInvalid("early_stopping.target.metric", "Expected a loss: a regression has no accuracy.")


def _filled_k(k: int | None, classes: Sequence[ClassCount], groups: int) -> int:
    if not classes:
        return _checked_k(k, groups, "the data set", f"The data set has {groups}. Add images.")
    smallest = min(classes, key=lambda count: count.groups)
    name = f"class {smallest.name!r}"
    has = f"Class {smallest.name!r} has {smallest.groups} (of {smallest.images} images). Add images of it."
    return _checked_k(k, smallest.groups, name, has)


def _checked_k(k: int | None, groups: int, name: str, has: str) -> int:
    if groups < 2:
        raise RecipeInvalid(
            "dataset",
            f"Expected at least 2 groups of images of {name}: one to train on and one to test on. An image without a "
            f"group counts as one. {has}",
        )
    if k is not None and k > groups:
        raise RecipeInvalid(
            "folds.k",
            f"Expected at most {groups} folds, since {name} has {groups} groups of images. Received {k}.",
        )
    return k or min(_DEFAULT_K, groups)
