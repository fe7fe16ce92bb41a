"""Networks that begin with random weights: a perceptron, layers of units, or convolutions, learning from pixels.

Pixels are scaled to numbers from -1 to 1: around zero, learning begins at once. The output layer stands apart: with the
layers before it exported as a network and it as the head, what was learned is served as every other model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from artifacts.bundle import Dense, Float32
from artifacts.images import Pixels
from recipes.layers import (
    INPUT,
    Activation,
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
    Threshold,
    sides,
)
from recipes.recipe import Loss, Recipe, Task
from recipes.shapes import chain
from training.data.augmentation import augmenter
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting import head_fit
from training.fitting.head_fit import Scaler
from training.fitting.training_loop import Beat, Passage, Rows, Trained, predict_batch
from training.fitting.training_loop import train as epoch_by_epoch
from training.networks import backbones
from training.networks.network_files import size_of
from training.networks.stochastic_pooling import StochasticPooling

# How much of each colour the eye sees (ITU-R BT.601).
_BRIGHTNESS = (0.299, 0.587, 0.114)
# A step without convolutions takes a fraction of what it costs to leave the compiled graph after each.
_STEPS_PER_EXECUTION = 64


@dataclass(frozen=True)
class Grown:
    """A network that has learned from nothing.

    Attributes:
        trained: how it went.
        layers: its output layer, on what the layers before it give.
        network: the weights of all layers before it, as `backbones.dump_weights` returns them.
        logits: float32 [n, outputs] for rows of the pixels, by Keras and without augmentation.
    """

    trained: Trained
    layers: tuple[Dense, ...]
    network: Callable[[], bytes]
    logits: Callable[[Indices], Float32]


def grow(
    recipe: Recipe,
    task: Task,
    outputs: int,
    pixels: Pixels,
    targets: Truth,
    train: Indices,
    validation: Indices,
    *,
    epochs: int,
    seed: int,
    passage: Passage,
) -> Grown:
    """Let a network learn all its layers.

    Args:
        recipe: filled, with mode from-scratch.
        task: what is predicted.
        outputs: number of logits: one for binary and regression, else one per class or label.
        pixels: uint8 [N, H, W, 3], which may be mapped from a file.
        targets: what is to be learned of each row, as `training.data.targets` has it.
        train: rows to learn from.
        validation: rows that early stopping watches; if empty, every epoch is trained.
        epochs: epochs to train at most.
        seed: the same seed gives the same network on the same machine.
        passage: what to go on from, and who hears how it goes.

    Raises:
        TrainingDiverged: the loss is not a number any more.
    """
    assert recipe.network is not None
    keras.utils.set_random_seed(seed)
    unit = Scaler.of(targets, train) if task is Task.REGRESSION else None
    learned = unit(targets) if unit else targets
    body = _body(recipe.network, size_of(recipe))
    top = _output(recipe.network, outputs)
    model = _learner(recipe, body, top, seed)
    at_once = predict_batch(size_of(recipe), recipe.batch_size)
    batches = Rows(pixels, learned, train, recipe.batch_size, seed)
    model.compile(
        optimizer=head_fit.optimizer(recipe.optimizer),
        loss=loss(recipe, task),
        metrics=head_fit.accuracy(task),
        jit_compile=False,  # compiling for a processor takes longer than it saves
        steps_per_execution=1 if recipe.network.kind is NetworkKind.CNN else min(len(batches), _STEPS_PER_EXECUTION),
    )
    trained = epoch_by_epoch(
        model,
        batches,
        Rows(pixels, learned, validation, at_once, None) if len(validation) else None,
        epochs=epochs,
        early_stopping=recipe.early_stopping,
        class_weight=head_fit.class_weights(targets[train], recipe.class_weights),
        passage=passage,
    )

    def logits(rows: Indices) -> Float32:
        asked = Rows(pixels, learned, rows, at_once, None)
        found: Float32 = model.predict(asked, callbacks=[Beat(passage, len(trained.history))], verbose=0)
        return unit.undone(found) if unit else found.astype(np.float32)

    kernel, bias = (np.asarray(weights, np.float32) for weights in top.get_weights())
    layer = Dense(kernel, bias, Activation.LINEAR)
    layers = (unit.undo_after(layer) if unit else layer,)
    return Grown(trained, layers, lambda: backbones.dump_weights(body), logits)


def network(recipe: NetworkRecipe, size: Sides, weights: bytes) -> Any:
    """Return the layers before the output, with weights of `backbones.dump_weights`, as they are exported.

    Returns:
        a Keras model from `images` uint8 [N, H, W, 3] to `{"features": float32 [N, D], "maps": float32 [N, h, w, D]}`.
        Features are the mean of maps over height and width: what the last global average reads, or 1 × 1 without one.
    """
    body = _body(recipe, size)
    backbones.load_weights(body, weights)
    body.trainable = False
    images = keras.Input((*sides(size), 3), dtype="uint8", name="images")
    features, maps = body(scaled(images, recipe.channels), training=False)
    model = keras.Model(images, {"features": keras.layers.Identity(name="features")(features), "maps": maps})
    model(np.zeros((1, *sides(size), 3), np.uint8))  # an ONNX export of a model that was never called fails
    return model


def loss(recipe: Recipe, task: Task) -> Any:
    """Return the Keras loss of logits that a recipe asks for."""
    assert recipe.network is not None
    if recipe.network.kind is NetworkKind.PERCEPTRON:
        return DeltaRule(recipe.network.threshold, wants_slope=recipe.loss is Loss.MEAN_SQUARED_ERROR)
    return SquaredErrorOfSigmoid() if recipe.loss is Loss.MEAN_SQUARED_ERROR else head_fit.loss(task)


class DeltaRule(keras.losses.Loss):  # type: ignore[misc]
    """What a perceptron makes small: one step of plain gradient descent on one image is the delta rule.

    That is W += rate * (target - output) * x and b += rate * (target - output), since the gradient by a logit is
    output - target. With a step it is the perceptron criterion (Rosenblatt 1958; Bishop 2006, "Pattern Recognition and
    Machine Learning", 4.1.7), with a sigmoid the cross-entropy, and without a threshold half the squared error (Widrow
    & Hoff 1960). `wants_slope` takes half the squared error of the sigmoid, whose step has its slope as another factor.
    Of several outputs it is the sum.
    """

    def __init__(self, threshold: Threshold | None, *, wants_slope: bool = False) -> None:
        super().__init__(reduction="sum_over_batch_size", name="delta_rule")
        self._threshold = threshold
        self._wants_slope = wants_slope

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N], for classes [N] or values [N, outputs], and logits [N, outputs]."""
        wanted = _wanted(truth, logits)
        match self._threshold:
            case Threshold.STEP:
                fires = keras.ops.cast(logits >= 0, logits.dtype)
                each = (fires - wanted) * logits
            case Threshold.SIGMOID if not self._wants_slope:
                each = keras.ops.softplus(logits) - wanted * logits
            case Threshold.SIGMOID:
                each = keras.ops.square(keras.ops.sigmoid(logits) - wanted) / 2
            case None:
                each = keras.ops.square(logits - wanted) / 2
        return keras.ops.sum(each, axis=-1)


class SquaredErrorOfSigmoid(keras.losses.Loss):  # type: ignore[misc]
    """The mean over outputs of (target - sigmoid(logit))²."""

    def call(self, truth: Any, logits: Any) -> Any:
        """Return the loss of each image, [N], for values [N] or [N, outputs] and logits [N, outputs]."""
        return keras.ops.mean(keras.ops.square(keras.ops.sigmoid(logits) - _wanted(truth, logits)), axis=-1)


def _wanted(truth: Any, logits: Any) -> Any:
    """Return what each output should be, [N, outputs]: classes [N] as ones among zeros, all else as it is."""
    outputs = logits.shape[-1]
    if len(truth.shape) == 1 and outputs > 1:
        return keras.ops.one_hot(keras.ops.cast(truth, "int32"), outputs, dtype=logits.dtype)
    return keras.ops.reshape(keras.ops.cast(truth, logits.dtype), keras.ops.shape(logits))


def scaled(images: Any, channels: int) -> Any:
    """Return images [N, H, W, 3] of values from 0 to 255 as float32 from -1 to 1, in colours or [N, H, W, 1]."""
    colours = keras.ops.cast(images, "float32") / 127.5 - 1.0
    if channels == 3:
        return colours
    return keras.ops.sum(colours * np.array(_BRIGHTNESS, np.float32), axis=-1, keepdims=True)


# --- building ---------------------------------------------------------------------------------------------------------


def _learner(recipe: Recipe, body: Any, top: Any, seed: int) -> Any:
    """Return the model that learns, from uint8 images to logits."""
    assert recipe.network is not None
    images = keras.Input((*sides(size_of(recipe)), 3), dtype="uint8")
    x = images
    if recipe.augmentation is not None:
        x = augmenter(recipe.augmentation, size_of(recipe), seed)(keras.ops.cast(x, "float32"))
    return keras.Model(images, top(body(scaled(x, recipe.network.channels))[0]))


def _output(recipe: NetworkRecipe, outputs: int) -> Any:
    """Return the output layer; a perceptron begins at zero, for want of layers that would have to differ."""
    initial = "zeros" if recipe.kind is NetworkKind.PERCEPTRON else "glorot_uniform"
    return keras.layers.Dense(outputs, kernel_initializer=initial, name="output")


def _body(recipe: NetworkRecipe, size: Sides) -> Any:
    """Return a Keras model from scaled images to features [N, D] and the maps that they are the mean of."""
    pixels = keras.Input((*sides(size), recipe.channels), name=INPUT)
    found: dict[str, Any] = {INPUT: pixels}
    maps: dict[str, Any] = {}
    last = INPUT
    for layer in chain(recipe):
        assert layer.name is not None and layer.inputs is not None
        read = [found[name] for name in layer.inputs]
        found[layer.name] = _keras_layer(layer)(read if len(read) > 1 else read[0])
        if isinstance(layer, GlobalAverage):
            maps[layer.name] = read[0]
        elif isinstance(layer, Dropout) and layer.inputs[0] in maps:
            maps[layer.name] = maps[layer.inputs[0]]
        last = layer.name
    features = found[last]
    one_place = keras.layers.Reshape((1, 1, features.shape[-1]), name="Maps")  # no name of a recipe's
    return keras.Model(pixels, [features, maps[last] if last in maps else one_place(features)], name="body")


def _keras_layer(layer: Layer) -> Any:
    """Return the Keras layer of a recipe's."""
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
            return _Sum(layer.activation.value, name=layer.name)
        case Concatenation():
            return layers.Concatenate(name=layer.name)


_POOLINGS: Mapping[PoolingKind, Callable[..., Any]] = {
    PoolingKind.MAX: keras.layers.MaxPooling2D,
    PoolingKind.AVERAGE: keras.layers.AveragePooling2D,
    PoolingKind.STOCHASTIC: StochasticPooling,
}


class _Sum(keras.layers.Layer):  # type: ignore[misc]
    """The sum of branches, and what follows it."""

    def __init__(self, activation: str, **options: Any) -> None:
        super().__init__(**options)
        self._activation = keras.activations.get(activation)

    def call(self, branches: Sequence[Any]) -> Any:
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        return self._activation(total)
