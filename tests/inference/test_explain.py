from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from artifacts.bundle import Dense
from errors import RequestInvalid
from inference import heads
from inference.captions import LINE
from inference.explain import CHANNELS, check_side, gradient, grid, heat, overlay
from recipes.layers import Activation

RANDOM = np.random.default_rng(5)
BELOW = LINE // 2 + 2 * LINE  # the scale and two lines of text


def dense(inputs: int, units: int, activation: Activation, has_offset: bool = False) -> Dense:
    offset = RANDOM.normal(size=inputs).astype(np.float32) if has_offset else None
    kernel, bias = RANDOM.normal(size=(inputs, units)), RANDOM.normal(size=units)
    return Dense(kernel.astype(np.float32), bias.astype(np.float32), activation, offset)


@pytest.mark.parametrize("activation", list(Activation))
def test_the_gradient_is_that_of_small_steps(activation: Activation) -> None:
    layers = (dense(6, 5, activation, has_offset=True), dense(5, 4, activation), dense(4, 3, Activation.LINEAR))
    features = RANDOM.normal(size=6).astype(np.float32)
    step = np.float32(1e-3)
    steps = features + step * np.eye(6, dtype=np.float32), features - step * np.eye(6, dtype=np.float32)
    for output in range(3):
        up, down = (heads.logits(layers, rows)[:, output] for rows in steps)
        assert gradient(layers, features, output) == pytest.approx((up - down) / (2 * step), abs=2e-2)


def test_the_places_of_a_linear_head_add_up_to_its_logit() -> None:
    layers = (dense(6, 3, Activation.LINEAR, has_offset=True),)
    maps = RANDOM.normal(size=(5, 5, 6)).astype(np.float32)
    features = maps.mean(axis=(0, 1))
    logits = heads.logits(layers, features[None])[0]
    assert layers[0].offset is not None
    constant = layers[0].bias - layers[0].offset @ layers[0].kernel
    for output in range(3):
        assert heat(layers, features, maps, output).mean() + constant[output] == pytest.approx(logits[output], abs=1e-4)


def test_what_speaks_for_the_answer_glows() -> None:
    pixels = np.full((40, 40, 3), 128, np.uint8)
    places = np.full((4, 4), -1.0, np.float32)
    places[0, 3] = 2.0
    picture = np.asarray(Image.open(io.BytesIO(overlay(pixels, places, "rose"))))
    assert picture.shape == (256 + BELOW, 256, 3)
    assert picture[20, 236, 0] > 170 and picture[20, 236, 2] < 80, "yellow at the top right"
    assert (picture[200, 40] < 90).all(), "dark elsewhere"
    nothing = np.asarray(Image.open(io.BytesIO(overlay(pixels, np.zeros((4, 4), np.float32), "rose"))))
    assert (nothing[:256] == nothing[0, 0]).all() and (nothing[256:264] == nothing[256, 0]).all(), "no scale either"
    wide = np.asarray(Image.open(io.BytesIO(overlay(np.zeros((40, 80, 3), np.uint8), places, "rose"))))
    assert wide.shape == (256 + BELOW, 512, 3), "as wide as the image is"


def test_a_heat_map_says_what_it_explains_and_on_which_scale() -> None:
    pixels, places = np.full((40, 40, 3), 128, np.uint8), np.eye(4, dtype=np.float32)
    pictures = [
        np.asarray(Image.open(io.BytesIO(overlay(pixels, places * most, title))))
        for title, most in (("rose", 1), ("daisy", 1), ("rose", 2))
    ]
    rose, daisy, larger = (picture[256:] for picture in pictures)
    bar = rose[4]
    assert bar[-1, 0] > bar[0, 0] and bar[-1, 2] < bar[0, 2], "from dark to yellow"
    assert (rose != daisy).any() and (rose != larger).any(), "the title and the most that a place contributes"
    assert (pictures[0][:256] == pictures[2][:256]).all()


def test_the_strongest_channels_come_first() -> None:
    maps = np.zeros((4, 4, 20), np.float32)
    for channel in range(20):
        maps[channel % 4, channel // 4 % 4, channel] = channel
    sheet = np.asarray(Image.open(io.BytesIO(grid(maps))))
    high = 98 + 2 * LINE  # a tile with two lines of text
    assert sheet.shape == (4 * high, 4 * 98)
    tile = 24
    for place in range(CHANNELS):
        channel = 19 - place
        top, left = place // 4 * high + channel % 4 * tile, place % 4 * 98 + channel // 4 % 4 * tile
        assert sheet[top + 8, left + 8] == 255
    texts = {
        sheet[place // 4 * high + 96 : place // 4 * high + 112, place % 4 * 98 :][:, :96].tobytes()
        for place in range(16)
    }
    assert len(texts) == 16, "each channel has its number"


def test_tiles_are_as_wide_as_their_numbers_and_keep_the_proportions_of_the_maps() -> None:
    maps = np.linspace(-123456, 234567, 8 * 16 * 4, dtype=np.float32).reshape(8, 16, 4)
    sheet = np.asarray(Image.open(io.BytesIO(grid(maps))))
    high, wide = (side // 2 for side in sheet.shape)
    tall = high - 2 - 2 * LINE
    assert wide - 2 == 2 * tall == 2 * 96, "enlarged until the shorter side is 96"
    wider = np.asarray(Image.open(io.BytesIO(grid(maps[:, :4] * np.float32(1.2345e-9)))))
    assert wider.shape[1] // 2 > 98, "both numbers fit"


def test_maps_of_too_few_places_are_told_with_the_size_that_is_enough() -> None:
    check_side(np.zeros((1, 4, 4, 8), np.float32), 128)
    with pytest.raises(RequestInvalid, match=r"1×1 positions at 32 pixels.* Train with image_size 128 or more"):
        check_side(np.zeros((1, 1, 1, 8), np.float32), 32)
