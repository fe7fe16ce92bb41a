"""The route that shows a network before anything is trained. Works out no shapes: `recipes.shapes` does."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter

from api.bodies import JsonRoute
from api.schemas import LayerOut, NetworkPreviewOut, NetworkPreviewRequest
from errors import RecipeInvalid, RequestInvalid
from recipes.catalogue import BackboneName
from recipes.layers import NetworkRecipe, sides
from recipes.shapes import Row, backbone_table, default_size, filled_network, table

router = APIRouter(prefix="/api/v1", tags=["networks"], route_class=JsonRoute)

_FLOAT32_BYTES = 4


@router.post("/networks/preview")
def preview_network(wanted: NetworkPreviewRequest) -> NetworkPreviewOut:
    """Show the layers of a network: shapes, parameters, multiply-adds, receptive fields, and what is lost where."""
    try:
        return _shown(_rows(wanted))
    except RecipeInvalid as error:
        raise RecipeInvalid(error.field, f"{error.field}: {error.detail}") from error


def _rows(wanted: NetworkPreviewRequest) -> list[Row]:
    match wanted.network, wanted.backbone:
        case NetworkRecipe() as network, None:
            return _network_rows(network, wanted)
        case None, BackboneName() as backbone:
            return _backbone_rows(backbone, wanted)
        case None, None:
            raise RequestInvalid("Expected 'network' or 'backbone'. Received neither.", field="network")
        case _:
            raise RequestInvalid("Expected 'network' or 'backbone'. Received both.", field="network")


def _network_rows(network: NetworkRecipe, wanted: NetworkPreviewRequest) -> list[Row]:
    if wanted.features_from is not None:
        raise RecipeInvalid(
            "features_from",
            f"Expected null: only a backbone has cut points. Received {wanted.features_from!r}.",
        )
    size = default_size(network.kind) if wanted.image_size is None else wanted.image_size
    height, width = sides(size)
    return table(filled_network(network, height, width), height, width, wanted.outputs)


def _backbone_rows(backbone: BackboneName, wanted: NetworkPreviewRequest) -> list[Row]:
    size = wanted.image_size
    if isinstance(size, tuple):
        raise RecipeInvalid(
            "image_size", f"Expected one number: images for a backbone are squares. Received {list(size)}."
        )
    return backbone_table(backbone, wanted.features_from, size, wanted.outputs)


def _shown(rows: Sequence[Row]) -> NetworkPreviewOut:
    """Return rows as an answer; the first one is that of the pixels."""
    pixels, *layers = rows
    height, width, channels = pixels.shape
    parameters = sum(row.parameters for row in layers)
    return NetworkPreviewOut(
        input=(height, width, channels),
        layers=[_layer_out(row) for row in layers],
        parameters=parameters,
        multiply_adds=sum(row.multiply_adds for row in layers),
        weights_bytes=parameters * _FLOAT32_BYTES,
        warnings=[f"{row.name}: {row.warning}" for row in layers if row.warning],
    )


def _layer_out(row: Row) -> LayerOut:
    return LayerOut(
        name=row.name,
        type=row.type,
        inputs=list(row.inputs),
        shape=list(row.shape),
        parameters=row.parameters,
        multiply_adds=row.multiply_adds,
        receptive_field=(row.receptive_field.height, row.receptive_field.width),
        warning=row.warning,
    )
