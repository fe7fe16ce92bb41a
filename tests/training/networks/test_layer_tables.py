from __future__ import annotations

from recipes.backbone_layers import FILE
from training.networks.layer_tables import layer_tables


def test_the_stored_layers_of_backbones_are_those_that_keras_builds() -> None:
    assert FILE.read_text() == layer_tables(), "Run: python -m training.networks.layer_tables"
