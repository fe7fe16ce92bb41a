"""Networks for benchmarks without pretrained weights, and their cost. Uses Keras only, on any backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from artifacts.features import Features
from artifacts.images import Pixels
from recipes.catalogue import CATALOGUE, BackboneName
from recipes.defaults import ClassCount, fill
from recipes.filled import FineTuningRecipe, HeadedRecipe
from recipes.recipe import FineTune, Mode, Recipe, Task
from training.data.split import Indices
from training.fitting.fit_task import FitData, FitTask
from training.fitting.head_fit import FittedHead, fit_head
from training.fitting.training_loop import FitHooks
from training.networks import backbones

NONE = np.array([], dtype=np.intp)
# So small that rounding errors do not grow, although the weights are random.
_LEARNING_RATE = 1e-6
_HEAD_EPOCHS = 3


def calibrated(name: BackboneName, pixels: Pixels) -> bytes:
    """Return random weights whose BatchNorm statistics match the given images, as in a trained network.

    With other statistics, the features of a deep random network are as small as 1e-10, and its gradients overflow.
    """
    network = backbones.build_network(name, pixels.shape[1])
    backbones.load_weights(network, backbones.random_weights(name))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    network(backbones.preprocess(pixels, CATALOGUE[name].preprocessing), training=True)
    return backbones.dump_weights(network)


def fine_tuning_case(name: BackboneName, unfreeze: str, size: int, batch_size: int, epochs: int) -> FineTuningRecipe:
    """Return a recipe that fine-tunes without augmentation and without early stopping."""
    recipe = Recipe(
        mode=Mode.FINE_TUNING,
        backbone=name,
        image_size=size,
        unfreeze=unfreeze,
        batch_size=batch_size,
        augmentation=None,
        early_stopping=None,
        fine_tune=FineTune(learning_rate=_LEARNING_RATE, epochs=epochs),
    )
    filled = fill(recipe, Task.MULTICLASS, [ClassCount(label, 100, 100) for label in ("one", "other")])
    assert isinstance(filled, FineTuningRecipe)
    return filled


def first_head(recipe: HeadedRecipe, features: Features, targets: Indices) -> FittedHead:
    """Fit a head for a few epochs and return it, as the start of fine-tuning."""
    data = FitData(Task.MULTICLASS, int(targets.max()) + 1, features, targets)
    hooks = FitHooks(lambda number, metrics: None)
    return fit_head(recipe, data, FitTask(np.arange(len(targets)), NONE, _HEAD_EPOCHS, 0, hooks))


def multiply_adds(model: Any) -> int:
    """Return the multiply-adds of a model's forward pass for one image, in dense and convolution layers.

    Each value of a kernel is multiplied once for each position of the layer's output. Other layers cost almost nothing.
    """
    return sum(
        int(np.prod(layer.output.shape[1:-1])) * sum(int(np.prod(kernel.shape)) for kernel in _kernels(layer))
        for layer in model.layers
    )


def _kernels(layer: Any) -> list[Any]:
    return [variable for variable in layer.weights if len(variable.shape) > 1]
