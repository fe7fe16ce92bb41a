"""Checks the recipes in requests and fills in their defaults."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from errors import RecipeInvalid
from models import registry
from models.dataset import DatasetVersion
from recipes.catalogue import BackboneName
from recipes.defaults import fill
from recipes.filled import FilledRecipe
from recipes.recipe import IMAGENET, RANDOM, Recipe

# All recipes of a comparison must agree in these fields, so that they are tested on the same images.
_SHARED_FIELDS = ("seed", "folds.k", "folds.repeats", "task")


def fill_recipe(session: Session, recipe: Recipe, version: DatasetVersion, path: str) -> FilledRecipe:
    """Return a recipe with all defaults filled in, for training on a data set version that is ready.

    `path` is the path of the recipe in the request, such as `recipes[1]`. Raises RecipeInvalid, which names the wrong
    field by its path in the request.
    """
    assert version.task is not None
    try:
        _check_weights(session, recipe)
        return fill(recipe, version.task, version.class_counts, version.groups)
    except RecipeInvalid as error:
        field = error.field if error.field == "dataset" else f"{path}.{error.field}"
        raise RecipeInvalid(field, f"{field}: {error.detail}") from error


def _check_weights(session: Session, recipe: Recipe) -> None:
    """Raise RecipeInvalid if the recipe's weights are neither stored nor downloadable."""
    if recipe.backbone is None or recipe.weights is None:  # `fill` refuses null where it is not allowed
        return
    if not isinstance(recipe.backbone, BackboneName):
        if not registry.find_weights_by_name(session, recipe.weights):
            raise RecipeInvalid(
                "weights",
                f"No backbone has weights named {recipe.weights!r}, and backbone 'auto' chooses among backbones that "
                "have the weights. Import such weights for a backbone, or choose other weights.",
            )
        return
    if recipe.weights in (IMAGENET, RANDOM):
        return
    backbone = recipe.backbone
    if registry.find_weights(session, backbone, recipe.weights):
        return
    raise RecipeInvalid(
        "weights",
        f"Expected 'imagenet', 'random', or weights imported for {backbone.value}. Received "
        f"{recipe.weights!r}. Import them with 'make weights BACKBONE={backbone.value} NAME={recipe.weights} "
        "FILE=…'.",
    )


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """Check that the recipes of a comparison all differ and are tested on the same images.

    Raises RecipeInvalid, which names the wrong field.
    """
    first, *others = [recipe.flat() for recipe in recipes]
    for number, other in enumerate(others, start=1):
        for name in _SHARED_FIELDS:
            if other[name] != first[name]:
                field = f"recipes[{number}].{name}"
                raise RecipeInvalid(
                    field,
                    f"{field}: Expected {first[name]!r}, as in recipes[0], because all recipes must be tested on the "
                    f"same images. Received {other[name]!r}.",
                )
        earlier = recipes.index(recipes[number])
        if earlier < number:
            field = f"recipes[{number}]"
            raise RecipeInvalid(field, f"{field}: This recipe is equal to recipes[{earlier}]. Change it or remove it.")
