"""Trains networks from scratch: all layers learn from pixels, starting with random weights.

`training.networks.scratch_networks` builds these networks.
"""

from __future__ import annotations

import keras
import numpy as np

from artifacts.bundle import Dense, Logits
from recipes.filled import FromScratchRecipe
from recipes.layers import Activation, NetworkKind
from recipes.recipe import Task
from training.data.split import Indices
from training.fitting.compile_options import accuracy_metrics, build_optimizer, class_weights, recipe_loss
from training.fitting.fit_task import FitData, FitTask, FittedNetwork
from training.fitting.head_fit import Scaler
from training.fitting.training_loop import PredictProgress, Rows, predict_batch
from training.fitting.training_loop import train as epoch_by_epoch
from training.networks import backbones
from training.networks.scratch_networks import build_body, build_output_layer, build_trainable_network

# Without convolutions a step is so short that leaving the compiled graph after each one would take most of the time.
_STEPS_PER_EXECUTION = 64


def fit_from_scratch(recipe: FromScratchRecipe, data: FitData, fit: FitTask) -> FittedNetwork:
    """Train all layers of a network.

    Args:
        recipe: the layers of the network, and how to train them.
        data: its inputs are pixels uint8 [N, H, W, 3].
        fit: rows, epochs and seed.

    Raises:
        TrainingDiverged: the loss became infinite or NaN.
    """
    keras.utils.set_random_seed(fit.seed)
    targets = data.targets
    target_scaler = Scaler.fit(targets, fit.train) if data.task is Task.REGRESSION else None
    fit_targets = target_scaler(targets) if target_scaler else targets
    size = recipe.image_size
    body = build_body(recipe.network, size)
    output_layer = build_output_layer(recipe.network, data.outputs)
    model = build_trainable_network(recipe.network, size, recipe.augmentation, body, output_layer, fit.seed)
    batches = Rows(data.inputs, fit_targets, fit.train, recipe.batch_size, fit.seed)

    def in_order(rows: Indices) -> Rows:
        return Rows(data.inputs, fit_targets, rows, predict_batch(size, recipe.batch_size), None)

    model.compile(
        optimizer=build_optimizer(recipe.optimizer),
        loss=recipe_loss(recipe, data.task),
        metrics=accuracy_metrics(data.task),
        jit_compile=False,  # compiling for a processor takes longer than it saves
        steps_per_execution=1 if recipe.network.kind is NetworkKind.CNN else min(len(batches), _STEPS_PER_EXECUTION),
    )
    trained = epoch_by_epoch(
        model,
        batches,
        in_order(fit.validation) if len(fit.validation) else None,
        epochs=fit.epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(targets[fit.train], recipe.class_weights),
        hooks=fit.hooks,
    )

    def logits(rows: Indices) -> Logits:
        progress = PredictProgress(fit.hooks, len(trained.history))
        values: Logits = model.predict(in_order(rows), callbacks=[progress], verbose=0)
        return target_scaler.inverse_transform(values) if target_scaler else values.astype(np.float32)

    kernel, bias = (np.asarray(weights, np.float32) for weights in output_layer.get_weights())
    layer = Dense(kernel, bias, Activation.LINEAR)
    layers = (target_scaler.add_unit(layer) if target_scaler else layer,)
    return FittedNetwork(trained, layers, lambda: backbones.dump_weights(body), logits)
