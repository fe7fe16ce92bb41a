"""Filled recipes, as `recipes.defaults.fill` returns them: one type for each mode, with all defaults filled in.

Training code uses these types because their fields have no optional values that the mode excludes. Their JSON has the
same fields as `Recipe`. It is stored with a run and returned to clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, TypeAdapter

from recipes.catalogue import BackboneName
from recipes.layers import Layer, NetworkRecipe, Sides
from recipes.recipe import AUTO, FineTune, Folds, HeadRecipe, Loss, Mode, Recipe, Task


class FilledFolds(Folds):
    """The cross-validation of a filled recipe, whose number of folds is no longer optional."""

    k: int


class FilledNetwork(NetworkRecipe):
    """A network from scratch in which every layer has a name and the names of its inputs."""

    layers: tuple[Layer, ...]


class _Filled(Recipe):
    """The fields of a filled recipe that all modes share."""

    task: Task
    folds: FilledFolds

    @property
    def validation_fraction(self) -> float:
        """Share of a fold's training images that early stopping monitors; 0 without early stopping."""
        return self.folds.validation_fraction if self.early_stopping else 0.0


class HeadedRecipe(_Filled):
    """A filled recipe that trains a head on the features of a backbone."""

    weights: str
    network: None = None
    head: HeadRecipe
    loss: Literal[Loss.AUTO] = Loss.AUTO


class UndecidedRecipe(HeadedRecipe):
    """A feature extraction recipe whose backbone or cut point is `auto`, so that a bake-off must choose it."""

    mode: Literal[Mode.FEATURE_EXTRACTION]
    backbone: BackboneName | Literal["auto"]
    image_size: int | None

    def decided(self, backbone: BackboneName, features_from: str, image_size: int) -> FeatureExtractionRecipe:
        """Return the recipe with the backbone, the cut point and the image size that the bake-off chose."""
        chosen = {"backbone": backbone, "features_from": features_from, "image_size": image_size}
        return FeatureExtractionRecipe.model_validate(self.model_dump() | chosen)


class BackboneRecipe(HeadedRecipe):
    """A filled recipe that names its backbone and its cut point."""

    backbone: BackboneName
    features_from: str
    image_size: int


class FeatureExtractionRecipe(BackboneRecipe):
    """A recipe that trains a head on the features of a frozen backbone."""

    mode: Literal[Mode.FEATURE_EXTRACTION]
    augmentation: None = None
    unfreeze: None = None
    fine_tune: None = None


class FineTuningRecipe(BackboneRecipe):
    """A recipe that trains a head, and then the later layers of the backbone together with the head."""

    mode: Literal[Mode.FINE_TUNING]
    unfreeze: str
    fine_tune: FineTune


class FromScratchRecipe(_Filled):
    """A recipe that trains all layers of a network, starting with random weights."""

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
"""A filled recipe without `auto`: all that a training needs to begin."""
FilledRecipe = UndecidedRecipe | DecidedRecipe
"""Any filled recipe, as it is stored with a run."""


def parse_filled(recipe: Mapping[str, Any]) -> FilledRecipe:
    """Return a filled recipe from its JSON, as the type of its mode.

    Raises:
        ValueError: the recipe was not filled by `recipes.defaults.fill`. This is a bug.
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
