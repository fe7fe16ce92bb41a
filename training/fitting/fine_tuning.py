"""Fine-tunes a network: its layers from a cut on learn together with a head that was fitted on frozen features.

The head is fitted first, and the network then learns at a small learning rate. Training both at once from the start
destroys pretrained features (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features"). The learning rate rises
from zero and then falls along a cosine (Loshchilov & Hutter 2017, "SGDR"). BatchNorm layers stay frozen and run as in
inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from artifacts.bundle import Float32
from artifacts.images import Pixels
from recipes.catalogue import CATALOGUE
from recipes.filled import FineTuningRecipe
from recipes.recipe import FineTune, Task
from training.data.arrays import Maps
from training.data.augmentation import build_augmentation
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting import head_fit
from training.fitting.compile_options import accuracy_metrics, build_optimizer, class_weights, task_loss
from training.fitting.fit_task import FittedNetwork
from training.fitting.head_fit import FittedHead, Scaler
from training.fitting.training_loop import Beat, Passage, Rows, predict_batch
from training.fitting.training_loop import train as epoch_by_epoch
from training.networks import backbones

# Gradients with a larger norm are scaled down to it, so that the first steps do not destroy the pretrained weights.
CLIP_NORM = 1.0
FINE_TUNE_LEARNING_RATE = "fine_tune.learning_rate"


@dataclass(frozen=True)
class FineTuningInputs:
    """The inputs of the part of a network that learns.

    Attributes:
        array: uint8 pixels [N, size, size, 3], or float32 maps [N, h, w, C] that the frozen part gives for them.
        are_maps: whether `array` holds maps.
    """

    array: Pixels | Maps
    are_maps: bool


def fine_tune(
    recipe: FineTuningRecipe,
    task: Task,
    weights: bytes,
    material: FineTuningInputs,
    head: FittedHead,
    targets: Truth,
    train: Indices,
    validation: Indices,
    *,
    epochs: int,
    seed: int,
    passage: Passage,
) -> FittedNetwork:
    """Fine-tune a network from the recipe's cut on.

    Args:
        recipe: what to fit.
        task: what is predicted.
        weights: the network's weights before, from `backbones.dump_weights`.
        material: what the learning part reads, row by row.
        head: the head that has learned on frozen features.
        targets: what is to be learned of each row, as `training.data.targets` has it.
        train: rows to learn from.
        validation: rows that early stopping watches; if empty, every epoch is trained.
        epochs: epochs to train at most; the learning rate falls as if for all of the recipe's.
        seed: the same seed gives the same network on the same machine.
        passage: what to go on from, and who hears how it goes.

    Raises:
        TrainingDiverged: the loss is not a number any more.
    """
    activation = recipe.head.activation
    keras.utils.set_random_seed(seed)
    network, model, served = build(recipe, weights, material, head, seed)
    learned = head.target_scaler(targets) if head.target_scaler else targets
    at_once = predict_batch(recipe.image_size, recipe.batch_size)
    batches = Rows(material.array, learned, train, recipe.batch_size, seed)
    model.compile(
        optimizer=build_optimizer(
            recipe.optimizer, learning_rate_schedule(recipe.fine_tune, len(batches)), global_clipnorm=CLIP_NORM
        ),
        loss=task_loss(task),
        metrics=accuracy_metrics(task),
        jit_compile="auto" if _has_gpu() else False,  # compiling for a processor takes longer than it saves
    )
    trained = epoch_by_epoch(
        model,
        batches,
        Rows(material.array, learned, validation, at_once, None) if len(validation) else None,
        epochs=epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(targets[train], recipe.class_weights),
        passage=passage,
        rate=FINE_TUNE_LEARNING_RATE,
    )

    def logits(rows: Indices) -> Float32:
        asked = Rows(material.array, learned, rows, at_once, None)
        found: Float32 = model.predict(asked, callbacks=[Beat(passage, len(trained.history))], verbose=0)
        return head.target_scaler.inverse_transform(found) if head.target_scaler else found.astype(np.float32)

    return FittedNetwork(
        trained=trained,
        layers=head_fit.dense_layers(served.get_weights(), activation, head.scaler, head.target_scaler),
        network=lambda: backbones.dump_weights(network),
        logits=logits,
    )


def build(
    recipe: FineTuningRecipe, weights: bytes, material: FineTuningInputs, head: FittedHead, seed: int
) -> tuple[Any, Any, Any]:
    """Return the whole network, the model that learns (from the inputs to logits), and its head. They share layers."""
    backbone = CATALOGUE[recipe.backbone]
    boundary = backbone.cut_before(recipe.unfreeze)
    with _mixed_precision():
        parts = backbones.split_network(backbone.name, boundary, recipe.features_from, recipe.image_size, weights)
    if material.are_maps:
        x = inputs = keras.Input(material.array.shape[1:])
    else:
        inputs = keras.Input(material.array.shape[1:], dtype="uint8")
        x = keras.ops.cast(inputs, "float32")
        if recipe.augmentation is not None:
            x = build_augmentation(recipe.augmentation, recipe.image_size, seed)(x)
        x = backbones.preprocess(x, backbone.preprocessing)
        if parts.frozen is not None:
            x = parts.frozen(x)
    x = parts.trainable(x)
    features = FixedNormalization(head.scaler)(x)
    top = head_fit.build_head(recipe.head, features.shape[1], head.layers[-1].bias.shape[0])
    top.set_weights(head.weights)
    return parts.full, keras.Model(inputs, top(features)), top


class FixedNormalization(keras.layers.Layer):  # type: ignore[misc]
    """Standardises features [N, D] with the constants of a scaler, which do not learn."""

    def __init__(self, scaler: Scaler, **options: Any) -> None:
        super().__init__(**options)
        self._mean = scaler.mean.astype(np.float32)
        self._scale = scaler.scale.astype(np.float32)

    def call(self, features: Any) -> Any:
        return (keras.ops.cast(features, "float32") - self._mean) * self._scale

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def learning_rate_schedule(recipe: FineTune, steps_per_epoch: int) -> Any:
    """Return the Keras schedule of the learning rate: a rise from zero, then a cosine to zero at the last epoch."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * steps_per_epoch
    falling = recipe.epochs * steps_per_epoch - warmup
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(recipe.learning_rate, falling)
    return keras.optimizers.schedules.CosineDecay(0.0, falling, warmup_target=recipe.learning_rate, warmup_steps=warmup)


def _has_gpu() -> bool:
    # Without an argument this lists the best devices; asking for "gpu" raises on JAX if there is none.
    return not all(device.lower().startswith("cpu") for device in keras.distribution.list_devices())


@contextmanager
def _mixed_precision() -> Iterator[None]:
    """Make layers that are built inside the block compute in bfloat16 on a GPU. Their weights stay float32."""
    before = keras.config.dtype_policy()
    if _has_gpu():
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
