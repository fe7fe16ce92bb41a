"""Fits networks that begin with random weights: all their layers learn from pixels.

What they are built of is in `training.networks.scratch_networks`.
"""

from __future__ import annotations

import keras
import numpy as np

from artifacts.bundle import Dense, Float32
from artifacts.images import Pixels
from recipes.filled import FromScratchRecipe
from recipes.layers import Activation, NetworkKind
from recipes.recipe import Task
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting.compile_options import accuracy_metrics, build_optimizer, class_weights, recipe_loss
from training.fitting.fit_task import FittedNetwork
from training.fitting.head_fit import Scaler
from training.fitting.training_loop import Beat, Passage, Rows, predict_batch
from training.fitting.training_loop import train as epoch_by_epoch
from training.networks import backbones
from training.networks.scratch_networks import build_body, build_output_layer, build_trainable_network

# A step without convolutions takes a fraction of what it costs to leave the compiled graph after each.
_STEPS_PER_EXECUTION = 64


def fit_from_scratch(
    recipe: FromScratchRecipe,
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
) -> FittedNetwork:
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
    keras.utils.set_random_seed(seed)
    target_scaler = Scaler.fit(targets, train) if task is Task.REGRESSION else None
    learned = target_scaler(targets) if target_scaler else targets
    size = recipe.image_size
    body = build_body(recipe.network, size)
    output_layer = build_output_layer(recipe.network, outputs)
    model = build_trainable_network(recipe.network, size, recipe.augmentation, body, output_layer, seed)
    at_once = predict_batch(size, recipe.batch_size)
    batches = Rows(pixels, learned, train, recipe.batch_size, seed)
    model.compile(
        optimizer=build_optimizer(recipe.optimizer),
        loss=recipe_loss(recipe, task),
        metrics=accuracy_metrics(task),
        jit_compile=False,  # compiling for a processor takes longer than it saves
        steps_per_execution=1 if recipe.network.kind is NetworkKind.CNN else min(len(batches), _STEPS_PER_EXECUTION),
    )
    trained = epoch_by_epoch(
        model,
        batches,
        Rows(pixels, learned, validation, at_once, None) if len(validation) else None,
        epochs=epochs,
        early_stopping=recipe.early_stopping,
        class_weight=class_weights(targets[train], recipe.class_weights),
        passage=passage,
    )

    def logits(rows: Indices) -> Float32:
        asked = Rows(pixels, learned, rows, at_once, None)
        found: Float32 = model.predict(asked, callbacks=[Beat(passage, len(trained.history))], verbose=0)
        return target_scaler.inverse_transform(found) if target_scaler else found.astype(np.float32)

    kernel, bias = (np.asarray(weights, np.float32) for weights in output_layer.get_weights())
    layer = Dense(kernel, bias, Activation.LINEAR)
    layers = (target_scaler.merge_into_last_layer(layer) if target_scaler else layer,)
    return FittedNetwork(trained, layers, lambda: backbones.dump_weights(body), logits)
