from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from artifacts.images import Pixels
from inference.captions import LINE
from recipes.recipe import Augmentation
from training.data.augmentation import build_augmentation, contact_sheet


def pictures(count: int = 4, size: int = 32) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "change", [{"rotate_degrees": 20}, {"zoom": 0.3}, {"shift": 0.2}, {"brightness": 0.3}, {"contrast": 0.4}]
)
def test_each_kind_varies_images_in_training_alone(change: dict[str, float]) -> None:
    images = pictures().astype(np.float32)
    vary = build_augmentation(Augmentation(**change), 32, seed=0)
    assert np.array_equal(np.asarray(vary(images, training=False)), images)
    one, other = (np.asarray(vary(images, training=True)) for _ in range(2))
    assert one.shape == images.shape
    assert not np.allclose(one, images, atol=1) and not np.allclose(one, other, atol=1)
    assert one.min() >= 0 and one.max() <= 255


def test_flipping_only_exchanges_left_and_right_and_only_if_asked() -> None:
    images = pictures(count=40).astype(np.float32)
    flipped = np.asarray(build_augmentation(Augmentation(flip=True), 32, seed=0)(images, training=True))
    turned = [np.array_equal(one, before[:, ::-1]) for one, before in zip(flipped, images, strict=True)]
    kept = [np.array_equal(one, before) for one, before in zip(flipped, images, strict=True)]
    assert all(one or other for one, other in zip(turned, kept, strict=True)) and any(turned) and any(kept)
    same = np.asarray(build_augmentation(Augmentation(), 32, seed=0)(images, training=True))
    assert np.array_equal(same, images)


def test_the_same_seed_varies_alike() -> None:
    recipe = Augmentation(rotate_degrees=10, zoom=0.1, brightness=0.1)
    images = pictures().astype(np.float32)
    one, same, other = (np.asarray(build_augmentation(recipe, 32, seed)(images, training=True)) for seed in (1, 1, 2))
    assert np.allclose(one, same) and not np.allclose(one, other)


def test_a_contact_sheet_shows_each_image_first_as_it_is() -> None:
    images = pictures(count=3)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(Augmentation(rotate_degrees=30), images, seed=0))))
    side = 3 * 32  # enlarged, so that the labels above and below fit
    assert sheet.shape == (LINE + 3 * side + LINE, 8 * side, 3)
    second = sheet[LINE + side : LINE + 2 * side]
    assert np.array_equal(second[1::3, 1:side:3], images[1])
    assert not np.array_equal(second[1::3, side + 1 : 2 * side : 3], images[1])
    labels = sheet[:LINE, : 3 * side].reshape(LINE, 3, side, 3)
    assert (labels[:, 0] != labels[:, 1]).any() and (labels[:, 1] != labels[:, 2]).any()
