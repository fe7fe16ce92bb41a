"""Fine-tunes a backbone: trains the layers after a cut point, together with a head that was already fitted.

The head is fitted on frozen features first; the layers of the backbone then learn at a small learning rate. Training
both from the start would destroy the pretrained features (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained
Features"). The learning rate rises from zero and then falls along a cosine (Loshchilov & Hutter 2017, "SGDR").
BatchNorm layers stay frozen and run as in inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from artifacts.bundle import Logits
from recipes.catalogue import CATALOGUE
from recipes.filled import FineTuningRecipe
from recipes.recipe import FineTune
from training.data.augmentation import build_augmentation
from training.data.split import Indices
from training.fitting import head_fit
from training.fitting.compile_options import accuracy_metrics, build_optimizer, class_weights, task_loss
from training.fitting.fit_task import FitData, FitTask, FittedNetwork
from training.fitting.head_fit import FittedHead, Scaler
from training.fitting.training_loop import PredictProgress, Rows, predict_batch
from training.fitting.training_loop import train as epoch_by_epoch
from training.networks import backbones

# A gradient with a larger norm is scaled down to this norm, so that no early step destroys the pretrained weights.
CLIP_NORM = 1.0
FINE_TUNE_LEARNING_RATE = "fine_tune.learning_rate"


@dataclass(frozen=True)
class FineTuningData(FitData):
    """The inputs of fine-tuning: pixels, or (with `are_maps`) the cached output of the frozen layers."""

    are_maps: bool


def fine_tune(
    recipe: FineTuningRecipe, data: FineTuningData, weights: bytes, head: FittedHead, fit: FitTask
) -> FittedNetwork:
    """Fine-tune a network, starting at the cut point `unfreeze` of the recipe.

    Args:
        recipe: which layers to train, and how.
        data: its inputs are pixels uint8 [N, size, size, 3], or the output of the frozen layers float32 [N, h, w, C].
        weights: the network's weights before fine-tuning, as `backbones.dump_weights` returns them.
        head: the head that was fitted on frozen features.
        fit: rows, epochs and seed. The schedule of the learning rate always spans all epochs of the recipe, even if
            `fit` has fewer epochs.

    Raises:
        TrainingDiverged: the loss became infinite or NaN.
    """
    keras.utils.set_random_seed(fit.seed)
    network, model, top = build_model(recipe, data, weights, head, fit.seed)
    fit_targets = head.target_scaler(data.targets) if head.target_scaler else data.targets
    batches = Rows(data.inputs, fit_targets, fit.train, recipe.batch_size, fit.seed)

    def in_order(rows: Indices) -> Rows:
        batch_size = predict_batch(recipe.image_size, recipe.batch_size)
        return Rows(data.inputs, fit_targets, rows, batch_size, None)

    rate = learning_rate_schedule(recipe.fine_tune, len(batches))
    model.compile(
        optimizer=build_optimizer(recipe.optimizer, rate, global_clipnorm=CLIP_NORM),
        loss=task_loss(data.task),
        metrics=accuracy_metrics(data.task),
        jit_compile="auto" if _has_gpu() else False,  # compiling for a processor takes longer than it saves
    )
    trained = epoch_by_epoch(
        model,
        batches,
        in_order(fit.validation) if len(fit.validation) else None,
        epochs=fit.epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(data.targets[fit.train], recipe.class_weights),
        hooks=fit.hooks,
        rate=FINE_TUNE_LEARNING_RATE,
    )

    def logits(rows: Indices) -> Logits:
        progress = PredictProgress(fit.hooks, len(trained.history))
        values: Logits = model.predict(in_order(rows), callbacks=[progress], verbose=0)
        return head.target_scaler.inverse_transform(values) if head.target_scaler else values.astype(np.float32)

    activation = recipe.head.activation
    return FittedNetwork(
        trained=trained,
        layers=head_fit.dense_layers(top.get_weights(), activation, head.scaler, head.target_scaler),
        network=lambda: backbones.dump_weights(network),
        logits=logits,
    )


def build_model(
    recipe: FineTuningRecipe, data: FineTuningData, weights: bytes, head: FittedHead, seed: int
) -> tuple[Any, Any, Any]:
    """Build the Keras models of fine-tuning, which share their layers.

    Returns:
        the whole backbone, the model from the inputs of `data` to logits, and the head of this model.
    """
    backbone = CATALOGUE[recipe.backbone]
    boundary = backbone.cut_before(recipe.unfreeze)
    with _mixed_precision():
        parts = backbones.split_network(backbone.name, boundary, recipe.features_from, recipe.image_size, weights)
    if data.are_maps:
        x = inputs = keras.Input(data.inputs.shape[1:])
    else:
        inputs = keras.Input(data.inputs.shape[1:], dtype="uint8")
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
    """A Keras layer that standardises features [N, D] with the fixed mean and scale of a scaler."""

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
    # Called without an argument, because JAX raises an error if a GPU is requested and there is none.
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
