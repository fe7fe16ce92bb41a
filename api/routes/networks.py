"""The route that previews the layers of a network without training it. `recipes.shapes` computes the shapes."""

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
def preview_network(body: NetworkPreviewRequest) -> NetworkPreviewOut:
    """Show the layers of a network: shapes, parameters, multiply-adds, receptive fields and warnings."""
    try:
        return _preview_out(_rows(body))
    except RecipeInvalid as error:
        raise RecipeInvalid(error.field, f"{error.field}: {error.detail}") from error


def _rows(body: NetworkPreviewRequest) -> list[Row]:
    match body.network, body.backbone:
        case NetworkRecipe() as network, None:
            return _network_rows(network, body)
        case None, BackboneName() as backbone:
            return _backbone_rows(backbone, body)
        case None, None:
            raise RequestInvalid("Expected 'network' or 'backbone'. Received neither.", field="network")
        case _:
            raise RequestInvalid("Expected 'network' or 'backbone'. Received both.", field="network")


def _network_rows(network: NetworkRecipe, body: NetworkPreviewRequest) -> list[Row]:
    if body.features_from is not None:
        raise RecipeInvalid(
            "features_from",
            f"Expected null, because only a backbone has cut points. Received {body.features_from!r}.",
        )
    size = default_size(network.kind) if body.image_size is None else body.image_size
    height, width = sides(size)
    return table(filled_network(network, height, width), height, width, body.outputs)


def _backbone_rows(backbone: BackboneName, body: NetworkPreviewRequest) -> list[Row]:
    size = body.image_size
    if isinstance(size, tuple):
        raise RecipeInvalid(
            "image_size", f"Expected one number, because images for a backbone are squares. Received {list(size)}."
        )
    return backbone_table(backbone, body.features_from, size, body.outputs)


def _preview_out(rows: Sequence[Row]) -> NetworkPreviewOut:
    """Return the response for a table of layers. The first row of the table is the network's input."""
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
