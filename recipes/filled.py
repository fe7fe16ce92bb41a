"""Filled recipes: what `recipes.defaults.fill` makes of a recipe, one type for each mode, with nothing left to choose.

Code that trains reads these types, whose fields are as narrow as the mode allows. Their JSON is that of `Recipe`: it is
stored with a run and returned to clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, TypeAdapter

from recipes.catalogue import BackboneName
from recipes.layers import Layer, NetworkRecipe, Sides
from recipes.recipe import AUTO, FineTune, Folds, HeadRecipe, Loss, Mode, Recipe, Task


class FilledFolds(Folds):
    """How the score is measured, with the number of folds."""

    k: int


class FilledNetwork(NetworkRecipe):
    """A network from scratch with its layers, each of which has a name and the names of its inputs."""

    layers: tuple[Layer, ...]


class _Filled(Recipe):
    """A recipe with everything that does not depend on the mode."""

    task: Task
    folds: FilledFolds

    @property
    def validation_fraction(self) -> float:
        """Share of a fold's training images that early stopping watches; 0 without early stopping."""
        return self.folds.validation_fraction if self.early_stopping else 0.0


class HeadedRecipe(_Filled):
    """A filled recipe whose head learns on the features of a backbone."""

    weights: str
    network: None = None
    head: HeadRecipe
    loss: Literal[Loss.AUTO] = Loss.AUTO


class UndecidedRecipe(HeadedRecipe):
    """Feature extraction that leaves its backbone or its cut point to a bake-off."""

    mode: Literal[Mode.FEATURE_EXTRACTION]
    backbone: BackboneName | Literal["auto"]
    image_size: int | None

    def decided(self, backbone: BackboneName, features_from: str, image_size: int) -> FeatureExtractionRecipe:
        """Return the recipe with what the bake-off chose."""
        chosen = {"backbone": backbone, "features_from": features_from, "image_size": image_size}
        return FeatureExtractionRecipe.model_validate(self.model_dump() | chosen)


class BackboneRecipe(HeadedRecipe):
    """A filled recipe that says which features of which backbone its head learns on."""

    backbone: BackboneName
    features_from: str
    image_size: int


class FeatureExtractionRecipe(BackboneRecipe):
    """A head on the features of a frozen backbone."""

    mode: Literal[Mode.FEATURE_EXTRACTION]
    augmentation: None = None
    unfreeze: None = None
    fine_tune: None = None


class FineTuningRecipe(BackboneRecipe):
    """A head on a backbone whose later layers learn as well."""

    mode: Literal[Mode.FINE_TUNING]
    unfreeze: str
    fine_tune: FineTune


class FromScratchRecipe(_Filled):
    """A network that begins with random weights."""

    mode: Literal[Mode.FROM_SCRATCH]
    backbone: None = None
    weights: None = None
    features_from: None = None
    network: FilledNetwork
    image_size: Sides
    head: None = None
    unfreeze: None = None
    fine_tune: None = None


DecidedRecipe = FeatureExtractionRecipe | FineTuningRecipe | FromScratchRecipe
"""What a network can be trained by."""
FilledRecipe = UndecidedRecipe | DecidedRecipe
"""What is stored with a run."""


def parse_filled(recipe: Mapping[str, Any]) -> FilledRecipe:
    """Return a filled recipe of the type that fits, from its JSON or its values by field.

    Raises:
        ValueError: a value is missing, which `recipes.defaults.fill` would have filled in. This is a bug.
    """
    return _FILLED.validate_python(recipe)


def _tag(recipe: Mapping[str, Any]) -> str:
    if AUTO in (recipe.get("backbone"), recipe.get("features_from")):
        return AUTO
    return str(recipe["mode"])


_FILLED: TypeAdapter[FilledRecipe] = TypeAdapter(
    Annotated[
        Annotated[UndecidedRecipe, Tag(AUTO)]
        | Annotated[FeatureExtractionRecipe, Tag(Mode.FEATURE_EXTRACTION)]
        | Annotated[FineTuningRecipe, Tag(Mode.FINE_TUNING)]
        | Annotated[FromScratchRecipe, Tag(Mode.FROM_SCRATCH)],
        Discriminator(_tag),
    ]
)
