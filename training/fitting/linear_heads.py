"""Fits many linear heads at once in NumPy, such as the heads of all folds. Supports no hidden layers and no dropout.

A training step of a linear head is two small matrix products and a dozen sums. The overhead of Keras takes many times
as long as this step. Here the weights of several heads are in one array, called a stack, and NumPy computes a step of
all heads at once. Except for rounding, the result is the same as that of `training.fitting.head_fit.fit_head`. Each
head has the same initial weights, the same order of rows, its own standardisation, the same update rule and its own
early stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from artifacts.bundle import Float32
from artifacts.features import Features
from recipes.filled import HeadedRecipe
from recipes.layers import Activation
from recipes.recipe import HeadRecipe, Task
from training.data.split import Indices
from training.data.targets import Float64, Truth
from training.fitting.compile_options import class_weights
from training.fitting.fit_task import FitData, FitTask
from training.fitting.head_fit import FittedHead, Scaler, build_head, dense_layers, what_to_lower
from training.fitting.training_loop import Arrays, EarlyStoppingMonitor, EpochRecorder, FitSummary, Snapshot, shuffled
from training.fitting.update_rules import StepCounts, UpdateRule, update_rule
from training.progress import Epoch

# The weights and batches of a stack should fit into a processor's own cache.
_STACK_BYTES = 2**20
# The standardised rows of folds are kept in memory up to this size. Beyond it, each batch is standardised when needed.
_KEPT_BYTES = 2**30
_VALIDATION_BATCH = 1024
# Reporting a batch takes about as long as training on one.
_BATCHES_PER_REPORT = 64

LossFunction = Callable[[Float32, Truth], tuple[Float32, npt.NDArray[np.bool_] | None]]
"""The loss of k heads on a batch of B rows each.

Takes logits float32 [k, B, outputs] and the true answers. Returns the loss of each row, float32 [k, B], and whether the
prediction of each row is right, bool [k, B] (None for a regression). Overwrites the logits with the loss gradient.
"""


@dataclass(frozen=True)
class LinearHeadTask(FitTask):
    """The fit of one linear head.

    Attributes:
        l2: the L2 penalty of this head, the factor of its squared weights in the loss. It replaces `head.l2` of the
            recipe, so that heads with different penalties can be fitted together.
    """

    l2: float


def l2_grid(tasks: Sequence[LinearHeadTask], strengths: Sequence[float]) -> list[LinearHeadTask]:
    """Return a copy of each task for each L2 penalty in `strengths`. Copies of one task are adjacent."""
    return [replace(one, l2=l2) for one in tasks for l2 in strengths]


def is_linear(recipe: HeadRecipe) -> bool:
    """Return whether `fit_linear_heads` can fit the heads of a recipe."""
    return not recipe.hidden and not recipe.dropout


def fit_linear_heads(
    recipe: HeadedRecipe, data: FitData, tasks: Sequence[LinearHeadTask]
) -> Iterator[tuple[int, FittedHead]]:
    """Fit linear heads. Yield the index of a task and its head as soon as the head is fitted.

    Args:
        recipe: optimizer, batch size, class weights and early stopping.
        data: its inputs are features float32 [N, D], not standardised.
        tasks: one task for each head.

    Raises:
        TrainingDiverged: the loss of a head became infinite or NaN.
    """
    if not is_linear(recipe.head):
        raise ValueError(f"Expected a linear head without dropout. Received {recipe.head}. This is a bug.")

    @cache
    def first_weights(seed: int) -> Float32:
        keras.utils.set_random_seed(seed)
        kernel, bias = build_head(recipe.head, data.inputs.shape[1], data.outputs).get_weights()
        return np.concatenate([kernel, bias[None]])

    loss, update = _LOSSES[data.task], update_rule(recipe.optimizer)
    folds = _FoldDataCache(recipe, data)
    heads: list[_HeadInTraining] = []
    for number, one in enumerate(tasks):
        heads.append(_HeadInTraining(number, one, folds.of(one), first_weights(one.seed), update.initial_state, recipe))
        heads[-1].report_batches(0)  # standardising a million rows takes a while
    stacks = _make_stacks(heads, recipe.batch_size, loss, update)
    libraries = ThreadpoolController()
    while heads:
        # One thread for BLAS: the products are so small that several threads would mostly wait for each other, which
        # took 10 times as long on a busy machine. Overflow is ignored here, because EpochRecorder checks the loss.
        with libraries.limit(limits=1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
            for stack in stacks:
                stack.train()
        ended = [head for head in heads if head.has_ended]
        if ended:
            heads = [head for head in heads if not head.has_ended]
            stacks = _make_stacks(heads, recipe.batch_size, loss, update)
        for head in ended:
            yield head.number, head.result()


# --- the rows of a fold -----------------------------------------------------------------------------------------------


class _FoldDataCache:
    """Prepares the rows of each fold once. Heads that train on the same rows share the prepared rows."""

    def __init__(self, recipe: HeadedRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self._made: dict[tuple[bytes, bytes], _FoldData] = {}
        self._left_bytes = _KEPT_BYTES

    def of(self, task: LinearHeadTask) -> _FoldData:
        """Return the prepared rows of a task."""
        key = (task.train.tobytes(), task.validation.tobytes())
        if key not in self._made:
            self._made[key] = self._make(task.train, task.validation)
        return self._made[key]

    def _make(self, train: Indices, validation: Indices) -> _FoldData:
        task, targets, features = self._data.task, self._data.targets, self._data.inputs
        scaler = Scaler.fit(features, train)
        target_scaler = Scaler.fit(targets, train) if task is Task.REGRESSION else None
        weights = class_weights(targets[train], self._recipe.class_weights)
        size_bytes = 4 * (len(train) + len(validation)) * (features.shape[1] + 1)
        is_kept = size_bytes <= self._left_bytes
        self._left_bytes -= size_bytes * is_kept

        def targets_of(rows: Indices) -> Truth:
            values = target_scaler(targets[rows]) if target_scaler else targets[rows]
            return values[:, None].astype(np.float32) if task is Task.BINARY else values

        return _FoldData(
            scaler,
            target_scaler,
            _StandardisedRows(features, train, scaler, is_kept),
            _StandardisedRows(features, validation, scaler, is_kept),
            targets_of(train),
            targets_of(validation),
            _row_weights(targets[train], weights),
        )


def _row_weights(classes: Truth, weights: Mapping[int, float] | None) -> Float32:
    """Return the weight of the class of each row, float32 [n]; 1 if classes have no weights."""
    if weights is None:
        return np.ones(len(classes), dtype=np.float32)
    return np.array([weights[one] for one in classes.tolist()], dtype=np.float32)


@dataclass(frozen=True)
class _FoldData:
    """The prepared rows of one fold, which all heads of the fold share.

    Attributes:
        scaler: the standardisation of the features.
        target_scaler: the standardisation of the target numbers of a regression; None for other tasks.
        train: rows to train on.
        validation: rows that early stopping monitors.
        train_targets: targets of the rows in `train`.
        validation_targets: targets of the rows in `validation`.
        row_weights: float32 [n], the weight of each row in `train`.
    """

    scaler: Scaler
    target_scaler: Scaler | None
    train: _StandardisedRows
    validation: _StandardisedRows
    train_targets: Truth
    validation_targets: Truth
    row_weights: Float32


class _StandardisedRows:
    """Standardised rows of features. Each row ends with an additional 1, which is the factor of the bias."""

    def __init__(self, features: Features, rows: Indices, scaler: Scaler, is_kept: bool) -> None:
        self._features = features
        self._rows = rows
        self._scaler = scaler
        self._kept: Float32 | None = None
        if is_kept:
            kept = np.ones((len(rows), features.shape[1] + 1), dtype=np.float32)
            self._write(np.arange(len(rows)), kept)
            self._kept = kept

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, positions: Indices, into: Float32) -> None:
        """Copy the rows at `positions` into `into`, float32 [n, D + 1]. The caller fills the last column with ones."""
        if self._kept is None:
            self._write(positions, into)
        else:
            np.take(self._kept, positions, axis=0, out=into, mode="clip")  # other modes make a copy first

    def _write(self, positions: Indices, into: Float32) -> None:
        for start in range(0, len(positions), _VALIDATION_BATCH):
            chunk = positions[start : start + _VALIDATION_BATCH]
            into[start : start + len(chunk), :-1] = self._scaler(self._features[self._rows[chunk]])


# --- heads ------------------------------------------------------------------------------------------------------------


class _HeadInTraining:
    """A head during its fit. It has those methods of a Keras model that the callbacks call.

    Attributes:
        number: index of the head's task.
        fold: the prepared rows of the head's fold.
        l2: factor of the squared weights in the loss.
        batches: number of batches in an epoch.
        state: the head's weights, float32 [D + 1, outputs] with the bias in the last row, then the optimizer's arrays
            of the same shape. They are views into the arrays of the head's stack.
        steps: number of training steps so far.
        stop_training: set by the callbacks of early stopping.
    """

    def __init__(
        self,
        number: int,
        task: LinearHeadTask,
        fold: _FoldData,
        first_weights: Float32,
        initial_state: Sequence[float],
        recipe: HeadedRecipe,
    ) -> None:
        self.number = number
        self.fold = fold
        self.l2 = task.l2
        self.batches = -(-len(fold.train) // recipe.batch_size)
        self.state = [first_weights, *(np.full_like(first_weights, value) for value in initial_state)]
        self.steps = 0
        self.stop_training = False
        self._task = task
        self._epochs = task.epochs
        self._history: list[Epoch] = []
        watches = recipe.early_stopping if len(fold.validation) else None
        self._stopping = EarlyStoppingMonitor(watches) if watches else None
        self._restore()
        self._callbacks: list[Any] = [
            EpochRecorder(
                self._history, self.batches, task.hooks, what_to_lower(recipe.optimizer.learning_rate, task.l2)
            )
        ]
        self._callbacks += self._stopping.callbacks if self._stopping else []
        for callback in self._callbacks:
            callback.set_model(self)
            callback.on_train_begin()

    @property
    def has_ended(self) -> bool:
        return self.stop_training or len(self._history) == self._epochs

    def order(self) -> Indices:
        """Return the positions of the fold's training rows in the order of the current epoch."""
        # Plus one, since Keras calls `on_epoch_end` of a PyDataset once before the first epoch.
        return shuffled(np.arange(len(self.fold.train)), self._task.seed, len(self._history) + 1)

    def report_batches(self, batches: int) -> None:
        """Report how many batches of the current epoch are done."""
        self._task.hooks.on_batch(len(self._history) + batches / self.batches)

    def end_epoch(self, train_scores: Epoch, loss: LossFunction) -> None:
        """Validate the head, and pass the scores of the epoch to the callbacks."""
        scores = train_scores | {f"val_{name}": value for name, value in self._validate(loss).items()}
        number = len(self._history)
        for callback in self._callbacks:
            callback.on_epoch_end(number, scores)
        if not self.has_ended:
            self._task.hooks.offer(self._snapshot)

    def result(self) -> FittedHead:
        """Return the fitted head, with the weights of its best epoch."""
        for callback in self._callbacks:
            callback.on_train_end()
        (kernel_and_bias,) = self.get_weights()
        weights = [kernel_and_bias[:-1], kernel_and_bias[-1]]
        scaler, target_scaler = self.fold.scaler, self.fold.target_scaler
        trained = FitSummary(
            history=self._history,
            best_epoch=self._stopping.best_epoch if self._stopping else len(self._history),
            stopped=self._stopping.reason if self._stopping else "epochs",
        )
        return FittedHead(
            dense_layers(weights, Activation.LINEAR, scaler, target_scaler), scaler, target_scaler, weights, trained
        )

    def penalty(self) -> float:
        """Return the current L2 penalty, which is a summand of the loss."""
        return self.l2 * float(np.square(self.state[0][:-1], dtype=np.float64).sum()) if self.l2 else 0.0

    def _validate(self, loss: LossFunction) -> Epoch:
        """Return loss and accuracy on the validation rows; empty without validation rows."""
        count = len(self.fold.validation)
        if not count:
            return {}
        total_loss, right = 0.0, 0
        for start in range(0, count, _VALIDATION_BATCH):
            positions = np.arange(start, min(start + _VALIDATION_BATCH, count))
            rows = np.ones((len(positions), len(self.state[0])), dtype=np.float32)
            self.fold.validation.read(positions, rows)
            losses, is_right = loss((rows @ self.state[0])[None], self.fold.validation_targets[None, positions])
            total_loss += float(losses.sum(dtype=np.float64))
            right += 0 if is_right is None else int(is_right.sum())
        scores = {"loss": total_loss / count + self.penalty()}
        return scores if is_right is None else scores | {"accuracy": right / count}

    # --- interface of a Keras model -----------------------------------------------------------------------------------

    @property
    def weights(self) -> Arrays:
        return self.state[:1]

    trainable_variables = weights

    def get_weights(self) -> Arrays:
        return [self.state[0].copy()]

    def set_weights(self, weights: Arrays) -> None:
        self.state[0][...] = weights[0]

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        weights, *optimizer_state = (array.copy() for array in self.state)
        early_stopping_state = self._stopping.early_stopping_state() if self._stopping else None
        history = [dict(epoch) for epoch in self._history]
        return Snapshot(history, [weights], [np.array(self.steps), *optimizer_state], early_stopping_state)

    def _restore(self) -> None:
        """Continue from the snapshot of the task, if it has one whose arrays have the shapes of this head."""
        since = self._task.hooks.since
        shapes = [array.shape for array in self.state]
        if since is None or [array.shape for array in (*since.variables, *since.optimizer[1:])] != shapes:
            return
        self.state = [*since.variables, *since.optimizer[1:]]
        self.steps = int(since.optimizer[0])
        self._history += since.history
        if self._stopping is not None and since.early_stopping_state is not None:
            self._stopping.continue_from(since.early_stopping_state)


# --- stacks -----------------------------------------------------------------------------------------------------------


def _make_stacks(
    heads: Sequence[_HeadInTraining], batch_size: int, loss: LossFunction, update: UpdateRule
) -> list[_HeadStack]:
    """Divide the heads into stacks of at most `_STACK_BYTES`. Heads with the most batches per epoch come first."""
    if not heads:
        return []
    batch_size = min(batch_size, max(len(head.fold.train) for head in heads))
    one_bytes = sum(array.nbytes for array in heads[0].state) + 4 * batch_size * len(heads[0].state[0])
    per_stack = max(1, _STACK_BYTES // one_bytes)
    ordered = sorted(heads, key=lambda head: -head.batches)
    return [
        _HeadStack(ordered[start : start + per_stack], batch_size, loss, update)
        for start in range(0, len(ordered), per_stack)
    ]


class _HeadStack:
    """Heads whose weights are in one array, so that NumPy computes a training step of all of them at once.

    The heads are sorted by their batches per epoch, most first. So the heads that still have a batch in the current
    epoch are always at the beginning of each array. A step leaves the heads behind them unchanged.
    """

    def __init__(
        self, heads: Sequence[_HeadInTraining], batch_size: int, loss: LossFunction, update: UpdateRule
    ) -> None:
        self._heads = heads
        self._batch_size = batch_size
        self._loss = loss
        self._update = update
        self._state = [np.stack(arrays) for arrays in zip(*(head.state for head in heads), strict=True)]
        for number, head in enumerate(heads):
            head.state = [stacked[number] for stacked in self._state]
        weights = self._state[0]
        count, width, outputs = weights.shape
        self._rows = np.ones((count, batch_size, width), dtype=np.float32)
        self._logits = np.empty((count, batch_size, outputs), dtype=np.float32)
        self._gradient, self._scratch = np.empty_like(weights), np.empty_like(weights)
        self._l2 = np.array([head.l2 for head in heads], dtype=np.float32)

    def train(self) -> None:
        """Train one epoch and pass the scores to each head. As in Keras, a batch is scored before its training step."""
        epoch = _StackEpoch(self._heads, self._batch_size)
        steps = np.array([head.steps for head in self._heads])
        penalties = np.zeros(epoch.sizes.shape)
        for batch in range(epoch.sizes.shape[1]):
            active = int(np.count_nonzero(epoch.sizes[:, batch]))
            penalties[:active, batch] = self._step(epoch, batch, steps[:active])
            steps[:active] += 1
            if (batch + 1) % _BATCHES_PER_REPORT == 0:
                for head in self._heads[:active]:
                    head.report_batches(batch + 1)
        for head, taken in zip(self._heads, steps.tolist(), strict=True):
            head.steps = taken
            head.report_batches(head.batches)
        for head, scores in zip(self._heads, epoch.scores(penalties), strict=True):
            head.end_epoch(scores, self._loss)

    def _step(self, epoch: _StackEpoch, batch: int, steps: StepCounts) -> Float64:
        """Compute a training step of the first `len(steps)` heads. Return their penalties before the step, float64."""
        active = len(steps)
        span = slice(batch * self._batch_size, (batch + 1) * self._batch_size)
        weights, *optimizer_state = (array[:active] for array in self._state)
        rows, logits = self._rows[:active], self._logits[:active]
        gradient, scratch = self._gradient[:active], self._scratch[:active]
        for number, head in enumerate(self._heads[:active]):
            positions = epoch.orders[number][span]
            head.fold.train.read(positions, rows[number, : len(positions)])
        np.matmul(rows, weights, out=logits)
        epoch.losses[:active, span], is_right = self._loss(logits, epoch.targets[:active, span])
        if is_right is not None:
            epoch.has_accuracy = True
            epoch.is_right[:active, span] = is_right
        logits *= epoch.shares[:active, span, None]
        np.matmul(rows.transpose(0, 2, 1), logits, out=gradient)
        penalties = np.zeros(active)
        if self._l2.any():
            l2 = self._l2[:active]
            kernels = weights.reshape(active, -1)[:, : -weights.shape[2]]
            penalties = l2 * np.vecdot(kernels, kernels)
            np.multiply(weights[:, :-1], 2 * l2[:, None, None], out=scratch[:, :-1])
            gradient[:, :-1] += scratch[:, :-1]
        self._update.update(weights, gradient, optimizer_state, steps, scratch)
        return penalties


class _StackEpoch:
    """The targets and losses of one epoch of a stack of k heads, with B rows in a batch.

    The rows of a head are in the order in which it is trained on them. Heads with fewer rows have padding at the end.

    Attributes:
        orders: for each head, the positions of its training rows in the order of this epoch.
        sizes: int [k, batches], number of rows in each batch of each head.
        targets: [k, batches * B, ...]; zero for padding.
        shares: float32 [k, batches * B], the weight of each row in the mean loss of its batch; zero for padding.
        losses: float32 [k, batches * B].
        is_right: bool [k, batches * B], whether the prediction for each row is right.
        has_accuracy: whether the task has an accuracy; a regression has none, and then `is_right` has no meaning.
    """

    def __init__(self, heads: Sequence[_HeadInTraining], batch_size: int) -> None:
        count, batches = len(heads), max(head.batches for head in heads)
        self.orders = [head.order() for head in heads]
        rows = np.array([[len(order)] for order in self.orders])
        self.sizes = np.clip(rows - np.arange(batches) * batch_size, 0, batch_size)
        targets = heads[0].fold.train_targets
        shape = (count, batches * batch_size)
        self.targets = np.zeros((*shape, *targets.shape[1:]), dtype=targets.dtype)
        self.shares, self.losses = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self.is_right = np.zeros(shape, dtype=np.bool_)
        self.has_accuracy = False
        for number, (head, order) in enumerate(zip(heads, self.orders, strict=True)):
            self.targets[number, : len(order)] = head.fold.train_targets[order]
            self.shares[number, : len(order)] = head.fold.row_weights[order]
        self.shares /= np.repeat(np.maximum(self.sizes, 1), batch_size, axis=1)

    def scores(self, penalties: Float64) -> list[Epoch]:
        """Return the loss and accuracy of each head. The loss includes `penalties`, float64 [k, batches]."""
        batch_losses = (self.losses * self.shares).reshape(*self.sizes.shape, -1).sum(axis=2, dtype=np.float64)
        rows = self.sizes.sum(axis=1)
        losses = ((batch_losses + penalties) * self.sizes).sum(axis=1) / rows
        scores = [{"loss": loss} for loss in losses.tolist()]
        if self.has_accuracy:
            accuracies = (self.is_right & (self.shares > 0)).sum(axis=1) / rows
            scores = [epoch | {"accuracy": value} for epoch, value in zip(scores, accuracies.tolist(), strict=True)]
        return scores


# --- losses -----------------------------------------------------------------------------------------------------------


def _multiclass_loss(logits: Float32, truth: Truth) -> tuple[Float32, npt.NDArray[np.bool_]]:
    is_right = logits.argmax(axis=-1) == truth
    logits -= logits.max(axis=-1, keepdims=True)
    flat = logits.reshape(-1)
    at_truth = np.arange(0, logits.size, logits.shape[-1]).reshape(truth.shape) + truth
    true_logits = flat[at_truth]
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1)
    logits /= total[..., None]
    flat[at_truth] -= 1
    losses: Float32 = np.log(total) - true_logits
    return losses, is_right


def _binary_loss(logits: Float32, truth: Truth) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Return the binary cross-entropy as the mean over labels. As in Keras, only negative numbers go through exp."""
    is_right = ((logits > 0) == (truth > 0.5)).all(axis=-1)
    small = np.exp(-np.abs(logits))
    losses: Float32 = (np.maximum(logits, 0) - logits * truth + np.log1p(small)).mean(axis=-1)
    np.divide(np.where(logits >= 0, 1, small), 1 + small, out=logits)
    logits -= truth
    logits /= logits.shape[-1]
    return losses, is_right


def _squared_error(logits: Float32, truth: Truth) -> tuple[Float32, None]:
    logits -= truth
    losses: Float32 = np.square(logits).mean(axis=-1)
    logits *= 2 / logits.shape[-1]
    return losses, None


_LOSSES: dict[Task, LossFunction] = {
    Task.MULTICLASS: _multiclass_loss,
    Task.BINARY: _binary_loss,
    Task.MULTILABEL: _binary_loss,
    Task.REGRESSION: _squared_error,
}
