"""Builds networks from scratch in Keras: perceptrons, multilayer perceptrons and CNNs with random weights.

The output layer is a separate Keras layer. The layers before it are exported like a backbone, and the output layer
becomes the head. So such a model is served in the same way as a model on a backbone. `training.fitting.from_scratch`
trains these networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from recipes.layers import (
    INPUT,
    BatchNormalization,
    Concatenation,
    Convolution,
    Dropout,
    Flatten,
    FullyConnected,
    GlobalAverage,
    Layer,
    NetworkKind,
    NetworkRecipe,
    Pooling,
    PoolingKind,
    Sides,
    Sum,
    sides,
)
from recipes.recipe import Augmentation
from recipes.shapes import chain
from training.data.augmentation import build_augmentation
from training.networks import backbones
from training.networks.stochastic_pooling import StochasticPooling

# The weights of red, green and blue in the brightness of a pixel (ITU-R BT.601).
_BRIGHTNESS = (0.299, 0.587, 0.114)


def build_body(recipe: NetworkRecipe, size: Sides) -> Any:
    """Return the layers before the output layer as a Keras model with random weights.

    Returns:
        a Keras model from scaled images float32 [N, H, W, channels] to features [N, D] and maps [N, h, w, D].
        The features are the mean of the maps over height and width.
    """
    pixels = keras.Input((*sides(size), recipe.channels), name=INPUT)
    outputs: dict[str, Any] = {INPUT: pixels}
    maps: dict[str, Any] = {}
    last = INPUT
    for layer in chain(recipe):
        assert layer.name is not None and layer.inputs is not None
        inputs = [outputs[name] for name in layer.inputs]
        outputs[layer.name] = _keras_layer(layer)(inputs if len(inputs) > 1 else inputs[0])
        if isinstance(layer, GlobalAverage):
            maps[layer.name] = inputs[0]
        elif isinstance(layer, Dropout) and layer.inputs[0] in maps:
            maps[layer.name] = maps[layer.inputs[0]]
        last = layer.name
    features = outputs[last]
    # No layer of a recipe can be called "Maps": their names are in lower case.
    as_maps = keras.layers.Reshape((1, 1, features.shape[-1]), name="Maps")
    return keras.Model(pixels, [features, maps[last] if last in maps else as_maps(features)], name="body")


def build_output_layer(recipe: NetworkRecipe, outputs: int) -> Any:
    """Return the layer from features [N, D] to logits [N, outputs].

    A perceptron starts with zero weights. Other networks need random ones, so that their hidden units differ.
    """
    initializer = "zeros" if recipe.kind is NetworkKind.PERCEPTRON else "glorot_uniform"
    return keras.layers.Dense(outputs, kernel_initializer=initializer, name="output")


def build_trainable_network(
    recipe: NetworkRecipe, size: Sides, augmentation: Augmentation | None, body: Any, output_layer: Any, seed: int
) -> Any:
    """Return the Keras model to train, from images uint8 [N, H, W, 3] to logits [N, outputs].

    The model shares its layers with `body` and `output_layer`, so that training changes both. `seed` is for the
    augmentation.
    """
    images = keras.Input((*sides(size), 3), dtype="uint8")
    x = images
    if augmentation is not None:
        x = build_augmentation(augmentation, size, seed)(keras.ops.cast(x, "float32"))
    features, _ = body(scale_pixels(x, recipe.channels))
    return keras.Model(images, output_layer(features))


def build_feature_network(recipe: NetworkRecipe, size: Sides, weights: bytes) -> Any:
    """Return the layers before the output layer as the model that is exported for serving.

    `weights` are the weights of these layers, as `backbones.dump_weights` returns them.

    Returns:
        a Keras model from `images` uint8 [N, H, W, 3] to `{"features": float32 [N, D], "maps": float32 [N, h, w, D]}`.
        The features are the mean of the maps over height and width. The maps are the input of the last global average.
        Without a global average, the maps are the features as [N, 1, 1, D].
    """
    body = build_body(recipe, size)
    backbones.load_weights(body, weights)
    body.trainable = False
    images = keras.Input((*sides(size), 3), dtype="uint8", name="images")
    features, maps = body(scale_pixels(images, recipe.channels), training=False)
    model = keras.Model(images, {"features": keras.layers.Identity(name="features")(features), "maps": maps})
    model(np.zeros((1, *sides(size), 3), np.uint8))  # the ONNX export fails for a model that was never called
    return model


def scale_pixels(images: Any, channels: int) -> Any:
    """Scale images [N, H, W, 3] with values from 0 to 255 to float32 from -1 to 1, in colour or greyscale.

    Returns float32 [N, H, W, channels] for 3 or 1 channels. Values around zero make training start faster.
    """
    colours = keras.ops.cast(images, "float32") / 127.5 - 1.0
    if channels == 3:
        return colours
    return keras.ops.sum(colours * np.array(_BRIGHTNESS, np.float32), axis=-1, keepdims=True)


def _keras_layer(layer: Layer) -> Any:
    """Return the Keras layer that corresponds to a layer of a recipe."""
    layers = keras.layers
    match layer:
        case Convolution():
            return layers.Conv2D(
                layer.filters,
                sides(layer.kernel),
                sides(layer.stride),
                layer.padding.value,
                activation=layer.activation.value,
                name=layer.name,
            )
        case Pooling():
            kind = _POOLINGS[layer.kind]
            size = sides(layer.size)
            return kind(size, sides(layer.stride) if layer.stride else size, layer.padding.value, name=layer.name)
        case Dropout():
            return layers.Dropout(layer.rate, name=layer.name)
        case Flatten():
            return layers.Flatten(name=layer.name)
        case GlobalAverage():
            return layers.GlobalAveragePooling2D(name=layer.name)
        case FullyConnected():
            return layers.Dense(layer.units, activation=layer.activation.value, name=layer.name)
        case BatchNormalization():
            return layers.BatchNormalization(name=layer.name)
        case Sum():
            return _ActivatedSum(layer.activation.value, name=layer.name)
        case Concatenation():
            return layers.Concatenate(name=layer.name)


_POOLINGS: Mapping[PoolingKind, Callable[..., Any]] = {
    PoolingKind.MAX: keras.layers.MaxPooling2D,
    PoolingKind.AVERAGE: keras.layers.AveragePooling2D,
    PoolingKind.STOCHASTIC: StochasticPooling,
}


class _ActivatedSum(keras.layers.Layer):  # type: ignore[misc]
    """Adds branches up and applies an activation to the sum."""

    def __init__(self, activation: str, **options: Any) -> None:
        super().__init__(**options)
        self._activation = keras.activations.get(activation)

    def call(self, branches: Sequence[Any]) -> Any:
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        return self._activation(total)
