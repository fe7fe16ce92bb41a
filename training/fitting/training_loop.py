"""The training loop of Keras models: order of batches, early stopping, snapshots, and the report of each epoch.

The order of the batches depends only on seed and epoch, and random layers keep their state in variables. So a training
that continues from a snapshot gives the same result as a training without an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from artifacts.bundle import Logits
from errors import TrainingDiverged
from inference import freed_memory
from recipes.layers import Sides, sides
from recipes.recipe import EarlyStopping, Target
from training.data.split import Indices
from training.data.targets import Truth
from training.progress import Epoch

LEARNING_RATE = "optimizer.learning_rate"
_GREATEST = float(np.finfo(np.float32).max)
# The most images, and the most pixels, in one batch of predictions. With 64 channels, a layer of so many pixels takes
# 256 MiB.
_MOST_IMAGES, _MOST_PIXELS = 256, 2**20

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class EarlyStoppingState:
    """The state of early stopping at the end of an epoch.

    Attributes:
        best: the best value so far.
        best_epoch: the epoch of that value, counted from 0.
        wait: number of epochs since the best one.
        weights: the weights of the best epoch, in the order of `_learned`.
    """

    best: float
    best_epoch: int
    wait: int
    weights: Arrays


@dataclass(frozen=True)
class Snapshot:
    """The state of a training at the end of an epoch.

    Attributes:
        history: metrics of each finished epoch.
        variables: the variables that training changes: weights, then the states of random layers.
        optimizer: the variables of the optimizer.
        early_stopping_state: the state of early stopping; None without early stopping.
    """

    history: list[Epoch]
    variables: Arrays
    optimizer: Arrays
    early_stopping_state: EarlyStoppingState | None


Offer = Callable[[Callable[[], Snapshot]], None]
"""Called at the end of each epoch but the last, with a function that takes a snapshot."""


@dataclass(frozen=True)
class FitHooks:
    """The snapshot that a fit continues from, and its callbacks.

    Attributes:
        on_epoch: called after each epoch with its number, counted from 1, and its metrics.
        on_batch: called after a batch (not always each one) with the number of epochs done, such as 2.4.
        offer: called at the end of each epoch but the last, with a function that takes a snapshot.
        since: the snapshot to continue from; None to start at the first epoch.
    """

    on_epoch: Callable[[int, Epoch], None]
    on_batch: Callable[[float], None] = lambda epochs: None
    offer: Offer = lambda take: None
    since: Snapshot | None = None


@dataclass(frozen=True)
class FitSummary:
    """The summary of a finished fit, after which the model has the weights of the best epoch.

    Attributes:
        history: loss, accuracy, val_loss and val_accuracy of each epoch; the loss includes the penalty on weights.
        best_epoch: the epoch whose weights were kept, counted from 1.
        stopped: why the fit ended: `patience`, `target`, or `epochs` if all epochs were trained.
    """

    history: list[Epoch]
    best_epoch: int
    stopped: str


def train(
    model: Any,
    batches: Rows,
    validation: Any,
    *,
    epochs: int,
    early_stopping: EarlyStopping | None,
    class_weight: Mapping[int, float] | None,
    hooks: FitHooks,
    rate: str = LEARNING_RATE,
    **options: Any,
) -> FitSummary:
    """Train a compiled Keras model, from the start or from a snapshot.

    Args:
        model: the compiled model; a snapshot is restored into it.
        batches: the training data; this function sets them to the first epoch that is to be trained.
        validation: the validation data of Keras' `fit`, or None.
        epochs: largest number of epochs.
        early_stopping: when to stop early; ignored without validation data.
        class_weight: weight of each class.
        hooks: the snapshot to continue from, and the callbacks that report progress.
        rate: the recipe field of the learning rate, or several fields, for the error message.
        options: further arguments of Keras' `fit`.

    Raises:
        TrainingDiverged: the loss is not finite.
    """
    # Build the optimizer now. Otherwise Keras builds it during the first step, and TensorFlow traces that step twice.
    model.optimizer.build(model.trainable_variables)
    stopping = EarlyStoppingMonitor(early_stopping) if validation is not None and early_stopping is not None else None
    since = hooks.since if hooks.since is not None and fits(model, hooks.since) else None
    history = list(since.history) if since else []
    if since is not None:
        restore(model, since)
        if stopping is not None and since.early_stopping_state is not None:
            stopping.continue_from(since.early_stopping_state)
    batches.begin(len(history))
    callbacks: list[Any] = [EpochRecorder(history, len(batches), hooks, rate), _KeepFreedMemory()]
    if stopping is not None:
        callbacks += stopping.callbacks
    # The last callback, because it needs to know whether another callback has stopped the training.
    callbacks.append(_SnapshotOffer(history, epochs, stopping, hooks.offer))
    model.fit(
        batches,
        validation_data=validation,
        initial_epoch=len(history),
        epochs=epochs,
        shuffle=False,  # `Rows` shuffles by seed and epoch
        callbacks=callbacks,
        class_weight=class_weight,
        verbose=0,
        **options,
    )
    freed_memory.give_back_freed()
    return FitSummary(
        history=history,
        best_epoch=stopping.best_epoch if stopping else len(history),
        stopped=stopping.reason if stopping else "epochs",
    )


class Rows(keras.utils.PyDataset):  # type: ignore[misc]
    """A Keras data set of batches. With a seed, the rows are shuffled anew for each epoch.

    `inputs` is an array [N, ...], which may be mapped from a file. `prepare` is applied to the inputs of each batch.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Truth,
        rows: Indices,
        batch_size: int,
        seed: int | None,
        prepare: Callable[[Any], Any] = lambda inputs: inputs,
    ) -> None:
        super().__init__()
        self._inputs = inputs
        self._targets = targets
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._prepare = prepare
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Put the rows in the order of an epoch, counted from 0."""
        self._epoch = epoch
        self._order = self._rows if self._seed is None else shuffled(self._rows, self._seed, epoch)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, Truth]:
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._prepare(self._inputs[rows]), self._targets[rows]

    def on_epoch_end(self) -> None:
        self.begin(self._epoch + 1)


def predict_batch(size: Sides, batch_size: int) -> int:
    """Return how many images to predict at once: at least the training batch size, and up to four times as many.

    Prediction needs less memory per image than training, which keeps the output of every layer. The number follows the
    batch size because a training that runs out of memory tries again with half the batch size.
    """
    height, width = sides(size)
    return max(batch_size, min(_MOST_IMAGES, 4 * batch_size, _MOST_PIXELS // (height * width)))


def finite(logits: Logits, rate: str = LEARNING_RATE) -> Logits:
    """Return the logits unchanged if all of them are finite.

    Raises:
        TrainingDiverged: a logit is infinite or NaN; the message names `rate`, the recipe field to lower.
    """
    if not np.isfinite(logits).all():
        raise TrainingDiverged(f"The trained model predicts infinite values or NaN. Lower {rate}.")
    return logits


def shuffled(rows: Indices, seed: int, epoch: int) -> Indices:
    """Return the rows in their random order for an epoch, counted from 0.

    The permutation depends only on the seed, the epoch and the number of rows.
    """
    return np.random.default_rng((seed, epoch)).permutation(rows)


# --- snapshots -------------------------------------------------------------------------------------------------------


def snapshot(model: Any, history: Sequence[Epoch], early_stopping_state: EarlyStoppingState | None) -> Snapshot:
    """Return a copy of the current state of a training."""
    return Snapshot(
        [dict(epoch) for epoch in history],
        _copied(_changing_variables(model)),
        _copied(model.optimizer.variables),
        early_stopping_state,
    )


def fits(model: Any, since: Snapshot) -> bool:
    """Return whether the arrays of a snapshot have the shapes of this compiled model and its optimizer."""
    model.optimizer.build(model.trainable_variables)
    pairs = ((_changing_variables(model), since.variables), (model.optimizer.variables, since.optimizer))
    return all(
        [tuple(variable.shape) for variable in variables] == [value.shape for value in values]
        for variables, values in pairs
    )


def restore(model: Any, since: Snapshot) -> None:
    """Set a compiled model and its optimizer to the state of a snapshot. `fits` must be true for both."""
    _assign(_changing_variables(model), since.variables)
    _assign(model.optimizer.variables, since.optimizer)


def _changing_variables(model: Any) -> list[Any]:
    """Return the variables that training changes. Frozen ones are left out because they take most of the memory."""
    weights = {id(variable) for variable in model.weights}
    return [*_learned(model), *(variable for variable in model.variables if id(variable) not in weights)]


def _learned(model: Any) -> list[Any]:
    """Return the weights that training changes: the trainable ones, then BatchNorm's moving statistics."""
    return [*model.trainable_variables, *_moving_statistics(model)]


def _moving_statistics(layer: Any) -> list[Any]:
    if isinstance(layer, keras.layers.BatchNormalization):
        return list(layer.non_trainable_weights) if layer.trainable else []
    return [variable for inner in getattr(layer, "layers", ()) for variable in _moving_statistics(inner)]


def _copied(variables: Sequence[Any]) -> Arrays:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _assign(variables: Sequence[Any], values: Arrays) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# --- callbacks -------------------------------------------------------------------------------------------------------


class PredictProgress(keras.callbacks.Callback):  # type: ignore[misc]
    """Reports progress after each predicted batch, because predicting many images takes minutes."""

    def __init__(self, hooks: FitHooks, epochs: int) -> None:
        super().__init__()
        self._hooks = hooks
        self._epochs = epochs

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._hooks.on_batch(float(self._epochs))


class EpochRecorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Records the history, reports each batch and epoch, and raises TrainingDiverged if the loss is not finite."""

    def __init__(self, history: list[Epoch], batches: int, hooks: FitHooks, rate: str = LEARNING_RATE) -> None:
        super().__init__()
        self._history = history
        self._batches = batches
        self._hooks = hooks
        self._rate = rate

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._hooks.on_batch(len(self._history) + (batch + 1) / self._batches)

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._hooks.on_batch(len(self._history) + 1.0)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        # Linear heads sum their loss in float64; Keras compares it in float32.
        if not all(abs(value) <= _GREATEST for value in metrics.values()):
            raise TrainingDiverged(f"The loss is infinite or NaN after epoch {epoch + 1}. Lower {self._rate}.")
        self._history.append(metrics)
        self._hooks.on_epoch(epoch + 1, metrics)


class _KeepFreedMemory(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes the allocator reuse freed memory from the second batch on, since returning it to the system costs time."""

    is_kept = False

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self.is_kept:
            freed_memory.keep_freed()
            self.is_kept = True


class _SnapshotOffer(keras.callbacks.Callback):  # type: ignore[misc]
    """Offers a snapshot at the end of each epoch except the last one."""

    def __init__(self, history: list[Epoch], epochs: int, stopping: EarlyStoppingMonitor | None, offer: Offer) -> None:
        super().__init__()
        self._history = history
        self._epochs = epochs
        self._stopping = stopping
        self._offer = offer

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if epoch + 1 < self._epochs and not self.model.stop_training:
            self._offer(self._take)

    def _take(self) -> Snapshot:
        return snapshot(self.model, self._history, self._stopping.early_stopping_state() if self._stopping else None)


class EarlyStoppingMonitor:
    """Early stopping by patience and by target: the Keras callbacks, and the reason why they stopped."""

    def __init__(self, recipe: EarlyStopping) -> None:
        self._patience = _Patience(recipe)
        self._target = _TargetReached(recipe.target, self._patience) if recipe.target else None

    @property
    def callbacks(self) -> list[Any]:
        return [self._patience] + ([self._target] if self._target else [])

    @property
    def best_epoch(self) -> int:
        return int(self._patience.best_epoch) + 1

    @property
    def reason(self) -> str:
        if self._target and self._target.was_reached:
            return "target"
        return "patience" if self._patience.stopped_epoch else "epochs"

    def early_stopping_state(self) -> EarlyStoppingState:
        """Return the current state of early stopping."""
        return self._patience.early_stopping_state()

    def continue_from(self, early_stopping_state: EarlyStoppingState) -> None:
        """Set the state with which early stopping starts, if an interrupted training continues."""
        self._patience.since = early_stopping_state


class _Patience(keras.callbacks.EarlyStopping):  # type: ignore[misc]
    """Keras' early stopping with a state that can be restored.

    Keras resets the callback when a training begins. If `since` is set, the callback then restores that state.
    """

    def __init__(self, recipe: EarlyStopping) -> None:
        super().__init__(
            monitor=recipe.monitor.value,
            patience=recipe.patience,
            min_delta=recipe.min_delta,
            mode="max" if recipe.monitor.value.endswith("accuracy") else "min",
            restore_best_weights=True,
        )
        self.since: EarlyStoppingState | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        if self.since is not None:
            self.best, self.best_epoch, self.wait = self.since.best, self.since.best_epoch, self.since.wait
            weights = self.model.get_weights()
            for index, value in zip(self._learned_indices(), self.since.weights, strict=True):
                weights[index] = value
            self.best_weights = weights

    def keep(self, epoch: int) -> None:
        """Make the current epoch, counted from 0, the one whose weights are kept, even if an earlier one was better."""
        self.best_epoch, self.best_weights = epoch, self.model.get_weights()

    def early_stopping_state(self) -> EarlyStoppingState:
        weights = [self.best_weights[index] for index in self._learned_indices()]
        return EarlyStoppingState(float(self.best), int(self.best_epoch), int(self.wait), weights)

    def _learned_indices(self) -> list[int]:
        """Return the indices, among all weights of the model, of those that training changes."""
        indices = {id(variable): index for index, variable in enumerate(self.model.weights)}
        return [indices[id(variable)] for variable in _learned(self.model)]


class _TargetReached(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a training when it reaches its target, and keeps the weights of that epoch.

    The weights are kept even if an earlier epoch had a better value of the monitored metric.
    """

    def __init__(self, target: Target, patience: _Patience) -> None:
        super().__init__()
        self._target = target
        self._patience = patience
        self.was_reached = False

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        value = (logs or {})[self._target.metric.value]
        is_accuracy = self._target.metric.value.endswith("accuracy")
        if value >= self._target.value if is_accuracy else value <= self._target.value:
            self.was_reached = True
            self._patience.keep(epoch)
            self.model.stop_training = True
