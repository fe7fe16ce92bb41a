from __future__ import annotations

import pytest
from soak.stream import DIVERGES, RECIPES

from recipes.recipe import Recipe


@pytest.mark.parametrize("recipe", [*RECIPES, DIVERGES])
def test_the_soak_asks_for_nothing_that_is_refused(recipe: dict[str, object]) -> None:
    assert Recipe.model_validate(recipe).epochs > 0
