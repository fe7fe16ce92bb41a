from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from networks import FILTERS, layered
from PIL import Image

from inference import explain
from inference.captions import LINE
from inference.layer_maps import CHANNELS, Layer, LayerReader

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def insight(tmp_path: Path) -> LayerReader:
    path = tmp_path / "network.onnx"
    path.write_bytes(layered())
    return LayerReader(path, 1)


def test_layers_are_named_as_they_were_when_the_network_was_built(insight: LayerReader) -> None:
    assert insight.layers == [Layer("first", 8, 8, 4), Layer("pool", 4, 4, 4)]


def test_maps_are_what_a_layer_makes_of_the_image_channels_last(insight: LayerReader) -> None:
    first = np.maximum(PIXELS.astype(np.float32) @ FILTERS.T, 0)
    np.testing.assert_allclose(insight.maps(PIXELS, "first"), first, rtol=1e-5)
    pool = first.reshape(4, 2, 4, 2, 4).max(axis=(1, 3))
    np.testing.assert_allclose(insight.maps(PIXELS, "pool"), pool, rtol=1e-5)
    np.testing.assert_allclose(insight.maps(PIXELS, "first"), first, rtol=1e-5, err_msg="asked again")


def test_a_layer_that_is_not_there_has_no_maps(insight: LayerReader) -> None:
    with pytest.raises(KeyError):
        insight.maps(PIXELS, "features")


def test_the_picture_has_the_strongest_channels_first_each_with_its_own_scale() -> None:
    random = np.random.default_rng(0)
    strengths = 1.05 ** random.permutation(100)
    maps = (random.choice([-1, 1], 100) * strengths * random.uniform(0.9, 1, (8, 8, 100))).astype(np.float32)
    sheet = np.asarray(Image.open(io.BytesIO(explain.grid(maps, CHANNELS))))
    high = 98 + 2 * LINE  # a tile of 96 pixels and two lines of text
    assert sheet.shape == (8 * high, 8 * 98) and CHANNELS == 64
    strongest = np.argsort(strengths)[::-1]
    for place in range(CHANNELS):
        top, left = place // 8 * high, place % 8 * 98
        tile = sheet[top : top + 96, left : left + 96]
        assert tile.min() == 0 and tile.max() >= 254
        values = maps[:, :, strongest[place]]
        level = 255 * (values - values.min()) / (values.max() - values.min())
        np.testing.assert_allclose(tile[6::12, 6::12], level, atol=1)
