"""Augments training images with Keras' layers, inside the training step. Augmented images are never cached."""

from __future__ import annotations

import io
from typing import Any

import keras
import numpy as np
from PIL import Image

from artifacts.images import Pixels
from inference.captions import below, caption
from recipes.layers import Sides, sides
from recipes.recipe import Augmentation

_SHEET_SIDE = 8
# The least side of an image on the sheet, so that its label fits.
_LEAST_TILE = 80


def build_augmentation(recipe: Augmentation, size: Sides, seed: int) -> Any:
    """Return a Keras model that augments images [N, H, W, 3] with values from 0 to 255.

    The model changes images only with `training=True`. Areas that a rotation or a shift leaves empty are filled with
    the mirrored image.
    """
    seeds = np.random.SeedSequence(seed).generate_state(6).tolist()
    layers: list[Any] = []
    if recipe.flip:
        layers.append(keras.layers.RandomFlip("horizontal", seed=seeds[0]))
    if recipe.rotate_degrees:
        layers.append(keras.layers.RandomRotation(recipe.rotate_degrees / 360, fill_mode="reflect", seed=seeds[1]))
    if recipe.zoom:
        layers.append(keras.layers.RandomZoom(recipe.zoom, fill_mode="reflect", seed=seeds[2]))
    if recipe.shift:
        layers.append(keras.layers.RandomTranslation(recipe.shift, recipe.shift, fill_mode="reflect", seed=seeds[3]))
    if recipe.contrast:
        layers.append(keras.layers.RandomContrast(recipe.contrast, value_range=(0, 255), seed=seeds[4]))
    if recipe.brightness:
        layers.append(keras.layers.RandomBrightness(recipe.brightness, value_range=(0, 255), seed=seeds[5]))
    x = images = keras.Input((*sides(size), 3))
    for layer in layers:
        x = layer(x)
    return keras.Model(images, x, name="augmentation")


def contact_sheet(recipe: Augmentation, images: Pixels, seed: int) -> bytes:
    """Return a PNG with one row for each image: the original, then several augmented versions. Columns have labels.

    A line at the end says how the images are augmented. Small images are enlarged, so that labels fit.

    Args:
        recipe: how images are augmented.
        images: uint8 [N, H, W, 3].
        seed: the same seed gives the same sheet.
    """
    _, height, width, _ = images.shape
    augment = build_augmentation(recipe, (height, width), seed)
    columns = [images]
    for _ in range(_SHEET_SIDE - 1):
        augmented = keras.ops.convert_to_numpy(augment(images.astype(np.float32), training=True))
        columns.append(np.clip(np.rint(augmented), 0, 255).astype(np.uint8))
    times = -(-_LEAST_TILE // width)
    tiles = [np.concatenate(list(column), axis=0).repeat(times, axis=0).repeat(times, axis=1) for column in columns]
    labels = ["as it is", *(f"augmented {number}" for number in range(1, _SHEET_SIDE))]
    sheet = np.concatenate(
        [
            np.concatenate([np.asarray(caption(width * times, label)), tile])
            for label, tile in zip(labels, tiles, strict=True)
        ],
        axis=1,
    )
    buffer = io.BytesIO()
    Image.fromarray(below(sheet, caption(sheet.shape[1], f"At most: {_described(recipe)}"))).save(buffer, "PNG")
    return buffer.getvalue()


def _described(recipe: Augmentation) -> str:
    """Return the changes of a recipe that are not zero, such as `rotate_degrees 10, zoom 0.1, flip`."""
    values = recipe.model_dump().items()
    return ", ".join(name if value is True else f"{name} {value:g}" for name, value in values if value) or "no change"
