"""Goes through the epochs of a training: batches in their order, early stopping, and snapshots to go on from.

The order of the batches is a function of (seed, epoch), and layers that draw at random keep their state in variables.
So a training that goes on from a snapshot ends as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from artifacts.bundle import Float32
from errors import TrainingDiverged
from recipes.layers import Sides, sides
from recipes.recipe import EarlyStopping, Target
from training.data.split import Indices
from training.data.targets import Truth
from training.networks import freed_memory
from training.progress import Epoch

LEARNING_RATE = "optimizer.learning_rate"
# Images that are answered at once at most, and their pixels: a layer of 64 channels holds 256 MiB of so many.
_ANSWERED_AT_ONCE, _ANSWERED_PLACES = 256, 2**20

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class EarlyStoppingState:
    """What early stopping has seen: the best value so far, its epoch (from 0), and how many epochs ago that was.

    `weights` are those of the best epoch, in the order of `_learned`.
    """

    best: float
    best_epoch: int
    wait: int
    weights: Arrays


@dataclass(frozen=True)
class Snapshot:
    """A training at the end of an epoch.

    Attributes:
        history: metrics of each epoch that is done.
        variables: what a training changes: its weights, then the states of layers that draw at random.
        optimizer: the optimizer's variables.
        watched: what early stopping has seen; None if nothing is watched.
    """

    history: list[Epoch]
    variables: Arrays
    optimizer: Arrays
    early_stopping_state: EarlyStoppingState | None


Offer = Callable[[Callable[[], Snapshot]], None]
"""Told at the end of an epoch that more follow: calling what it is given takes a snapshot."""


@dataclass(frozen=True)
class FitHooks:
    """How a training stands to the outside: what it goes on from, and who hears how it goes.

    Attributes:
        on_epoch: called with the number of each finished epoch, from 1, and its metrics.
        on_batch: called after each batch, or some of them, with the epochs that are done, the present one in part.
        offer: called at the end of each epoch but the last.
        since: where to go on from; None to begin.
    """

    on_epoch: Callable[[int, Epoch], None]
    on_batch: Callable[[float], None] = lambda epochs: None
    offer: Offer = lambda take: None
    since: Snapshot | None = None


@dataclass(frozen=True)
class FitSummary:
    """What became of a training; the model has the weights of the best epoch.

    Attributes:
        history: loss, accuracy, val_loss and val_accuracy of each epoch; the loss includes the penalty on weights.
        best_epoch: the epoch whose weights were kept, counted from 1.
        stopped: why it ended: `patience`, `target`, or `epochs` when all of them were trained.
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
    """Train a compiled Keras model, from the beginning or from a snapshot of it.

    Args:
        model: compiled; a snapshot is restored into it.
        batches: what it learns from; their epoch is set to the first one that is trained.
        validation: what Keras' `fit` takes as validation data, or None.
        epochs: epochs to train at most.
        early_stopping: when to end before; without validation data it is ignored.
        class_weight: weight of each class.
        hooks: the snapshot to continue from, and the callbacks that report progress.
        rate: the field of a recipe that has the learning rate.
        options: more for Keras' `fit`.

    Raises:
        TrainingDiverged: the loss is not a number any more.
    """
    # Else Keras does it in the middle of the first step, and TensorFlow traces that step a second time.
    model.optimizer.build(model.trainable_variables)
    stopping = Stopping(early_stopping) if validation is not None and early_stopping is not None else None
    since = hooks.since if hooks.since is not None and fits(model, hooks.since) else None
    history = list(since.history) if since else []
    if since is not None:
        restore(model, since)
        if stopping is not None and since.early_stopping_state is not None:
            stopping.go_on_from(since.early_stopping_state)
    batches.begin(len(history))
    callbacks: list[Any] = [EpochRecorder(history, len(batches), hooks, rate), _KeepFreedMemory()]
    if stopping is not None:
        callbacks += stopping.callbacks
    callbacks.append(
        _SnapshotOffer(history, epochs, stopping, hooks.offer)
    )  # last: it must see what the others decided
    model.fit(
        batches,
        validation_data=validation,
        initial_epoch=len(history),
        epochs=epochs,
        shuffle=False,  # the batches shuffle themselves, by seed and epoch
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
    """Batches of rows in an order that is a function of (seed, epoch), or as given without a seed.

    `inputs` is an array [N, ...], which may be mapped from a file; `prepare` is applied to those of each batch.
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
        """Take the order of an epoch, counted from 0."""
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
    """Return how many images to answer at once: those of a training step, or up to four times as many small ones.

    Training keeps what every layer gives and answering does not, so that what fits takes more; and where memory ran
    out all the same, half the batch answers half as many.
    """
    height, width = sides(size)
    return max(batch_size, min(_ANSWERED_AT_ONCE, 4 * batch_size, _ANSWERED_PLACES // (height * width)))


def finite(logits: Float32, rate: str = LEARNING_RATE) -> Float32:
    """Return logits that are numbers all. Raises TrainingDiverged; `rate` is the field that has the learning rate."""
    if not np.isfinite(logits).all():
        raise TrainingDiverged(f"What was learned answers with infinite numbers. Lower {rate}.")
    return logits


def shuffled(rows: Indices, seed: int, epoch: int) -> Indices:
    """Return rows in the order of an epoch, counted from 0; equally many others are shuffled alike."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


# --- snapshots -------------------------------------------------------------------------------------------------------


def snapshot(model: Any, history: Sequence[Epoch], early_stopping_state: EarlyStoppingState | None) -> Snapshot:
    """Return the state of a training, copied."""
    return Snapshot(
        [dict(epoch) for epoch in history],
        _copied(_changing(model)),
        _copied(model.optimizer.variables),
        early_stopping_state,
    )


def fits(model: Any, since: Snapshot) -> bool:
    """Say whether a snapshot is one of this compiled model, by its arrays; one of other code may not be."""
    model.optimizer.build(model.trainable_variables)
    pairs = ((_changing(model), since.variables), (model.optimizer.variables, since.optimizer))
    return all(
        [tuple(variable.shape) for variable in variables] == [value.shape for value in values]
        for variables, values in pairs
    )


def restore(model: Any, since: Snapshot) -> None:
    """Put a compiled model and its optimizer into the state of a snapshot that fits them."""
    _assign(_changing(model), since.variables)
    _assign(model.optimizer.variables, since.optimizer)


def _changing(model: Any) -> list[Any]:
    """Return the variables that a training changes: frozen ones stay as they are, and take the most room."""
    weights = {id(variable) for variable in model.weights}
    return [*_learned(model), *(variable for variable in model.variables if id(variable) not in weights)]


def _learned(model: Any) -> list[Any]:
    """Return the weights that a training changes: the trainable ones, then what BatchNorm counts while it learns."""
    return [*model.trainable_variables, *_counted(model)]


def _counted(layer: Any) -> list[Any]:
    if isinstance(layer, keras.layers.BatchNormalization):
        return list(layer.non_trainable_weights) if layer.trainable else []
    return [variable for inner in getattr(layer, "layers", ()) for variable in _counted(inner)]


def _copied(variables: Sequence[Any]) -> Arrays:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _assign(variables: Sequence[Any], values: Arrays) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# --- callbacks -------------------------------------------------------------------------------------------------------


class PredictProgress(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells after each predicted batch that the work moves: many images take minutes."""

    def __init__(self, hooks: FitHooks, epochs: int) -> None:
        super().__init__()
        self._hooks = hooks
        self._epochs = epochs

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._hooks.on_batch(float(self._epochs))


class EpochRecorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the history, tells each epoch, and ends a training that has diverged."""

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
        if not all(map(np.isfinite, metrics.values())):
            raise TrainingDiverged(f"The loss is no longer a number after epoch {epoch + 1}. Lower {self._rate}.")
        self._history.append(metrics)
        self._hooks.on_epoch(epoch + 1, metrics)


class _KeepFreedMemory(keras.callbacks.Callback):  # type: ignore[misc]
    """Has the process keep freed memory once the first batch was read."""

    is_kept = False

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self.is_kept:
            freed_memory.keep_freed()
            self.is_kept = True


class _SnapshotOffer(keras.callbacks.Callback):  # type: ignore[misc]
    """Offers a snapshot at the end of each epoch that others follow."""

    def __init__(self, history: list[Epoch], epochs: int, stopping: Stopping | None, offer: Offer) -> None:
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


class Stopping:
    """Early stopping by patience and by target, as Keras callbacks and what became of them."""

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
        """Return what was seen so far."""
        return self._patience.early_stopping_state()

    def go_on_from(self, early_stopping_state: EarlyStoppingState) -> None:
        """Begin with what an interrupted training has seen."""
        self._patience.since = early_stopping_state


class _Patience(keras.callbacks.EarlyStopping):  # type: ignore[misc]
    """Keras' early stopping; it forgets everything when a training begins, so what was seen before is told here."""

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
            for place, value in zip(self._learned_places(), self.since.weights, strict=True):
                weights[place] = value
            self.best_weights = weights

    def keep(self, epoch: int) -> None:
        """Keep the present epoch, counted from 0, whatever was better."""
        self.best_epoch, self.best_weights = epoch, self.model.get_weights()

    def early_stopping_state(self) -> EarlyStoppingState:
        weights = [self.best_weights[place] for place in self._learned_places()]
        return EarlyStoppingState(float(self.best), int(self.best_epoch), int(self.wait), weights)

    def _learned_places(self) -> list[int]:
        """Return where the weights that the training changes stand among all."""
        places = {id(variable): place for place, variable in enumerate(self.model.weights)}
        return [places[id(variable)] for variable in _learned(self.model)]


class _TargetReached(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a training at its target and keeps that epoch, though what is monitored may have been better before."""

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
