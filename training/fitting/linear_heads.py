"""Fits many linear heads side by side: folds, repeats, strengths of a penalty. Knows no hidden layers and no dropout.

A step of a linear head is two small products of matrices and a dozen sums; Keras takes many times as long to get there
and back, and as long as all of it to trace a network anew for each fold. Here the weights of several heads lie in one
array, and NumPy does a step of all of them at once, with no backend and nothing to compile. Each head takes the steps
that `training.fitting.head_fit.fit_head` would have it take: the same first weights, rows in the same order, its own
standardisation, the same rule, and an end of its own. What is left between the two is rounding.
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
from training.fitting.head_fit import FittedHead, Scaler, build_head, dense_layers
from training.fitting.training_loop import Arrays, Epoch, Passage, Snapshot, Stopping, Trained, Watch, shuffled
from training.fitting.update_rules import StepCounts, UpdateRule, update_rule

# Weights and batches of the heads in one array should stay in a processor's own cache.
_TOGETHER_BYTES = 2**20
# Standardised rows are kept as long as there is this much room; of folds beyond it, each batch is standardised anew.
_HELD_BYTES = 2**30
_VALIDATION_BATCH = 1024
# Hearing of a batch takes about as long as one.
_HEARD_EVERY = 64

LossFunction = Callable[[Float32, Truth], tuple[Float32, npt.NDArray[np.bool_] | None]]
"""Given logits float32 [k, B, outputs] and what is true of them, returns each row's loss float32 [k, B] and whether it
was answered right, if that means anything; the logits become the gradient of that loss."""


@dataclass(frozen=True)
class LinearHeadTask:
    """A head that is to be fitted.

    Attributes:
        train: rows to learn from.
        validation: rows that early stopping watches; if empty, every epoch is trained.
        seed: the same seed gives the same head.
        epochs: epochs to train at most.
        l2: weight of the squared weights in the loss.
        passage: what to go on from, and who hears how it goes.
    """

    train: Indices
    validation: Indices
    epochs: int
    seed: int
    l2: float
    passage: Passage


def l2_grid(tasks: Sequence[LinearHeadTask], strengths: Sequence[float]) -> list[LinearHeadTask]:
    """Return each of the heads with each strength of the penalty, the strengths of one head in a row."""
    return [replace(one, l2=l2) for one in tasks for l2 in strengths]


def is_linear(recipe: HeadRecipe) -> bool:
    """Say whether heads of a recipe can be fitted here."""
    return not recipe.hidden and not recipe.dropout


def fit_linear_heads(
    recipe: HeadedRecipe,
    task: Task,
    outputs: int,
    features: Features,
    targets: Truth,
    tasks: Sequence[LinearHeadTask],
) -> Iterator[tuple[int, FittedHead]]:
    """Fit linear heads; give the place of each among the wanted ones, and the head, as soon as it has ended.

    Args:
        recipe: optimizer, batch size, class weights and early stopping; the penalty is that of each wanted head.
        task: what is predicted.
        outputs: number of logits: one for binary and regression, else one per class or label.
        features: float32 [N, D], raw.
        targets: what is to be learned of each row, as `training.data.targets` has it.
        tasks: the heads to fit.

    Raises:
        TrainingDiverged: the loss of one is not a number any more.
    """
    if not is_linear(recipe.head):
        raise ValueError(f"Expected a linear head without dropout. Received {recipe.head}. This is a bug.")

    @cache
    def first_weights(seed: int) -> Float32:
        keras.utils.set_random_seed(seed)
        kernel, bias = build_head(recipe.head, features.shape[1], outputs).get_weights()
        return np.concatenate([kernel, bias[None]])

    loss, update = _LOSSES[task], update_rule(recipe.optimizer)
    folds = _FoldDataCache(recipe, task, features, targets)
    heads: list[_HeadInTraining] = []
    for place, one in enumerate(tasks):
        heads.append(_HeadInTraining(place, one, folds.of(one), first_weights(one.seed), update.initial_state, recipe))
        heads[-1].heard(0)  # to standardise a million rows takes a while
    stacks = _make_stacks(heads, recipe.batch_size, loss, update)
    libraries = ThreadpoolController()
    while heads:
        # Threads that share a product this small wait for each other longer than it takes: beside other work, 10 times.
        # What has diverged is told by its loss.
        with libraries.limit(limits=1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
            for stack in stacks:
                stack.train()
        ended = [head for head in heads if head.has_ended]
        if ended:
            heads = [head for head in heads if not head.has_ended]
            stacks = _make_stacks(heads, recipe.batch_size, loss, update)
        for head in ended:
            yield head.place, head.fit()


# --- what heads learn from -------------------------------------------------------------------------------------------


class _FoldDataCache:
    """The rows of every fold; heads that learn from the same ones share them."""

    def __init__(self, recipe: HeadedRecipe, task: Task, features: Features, targets: Truth) -> None:
        self._recipe = recipe
        self._task = task
        self._features = features
        self._targets = targets
        self._known: dict[tuple[bytes, bytes], _FoldData] = {}
        self._left_bytes = _HELD_BYTES

    def of(self, task: LinearHeadTask) -> _FoldData:
        """Return the fold of a head."""
        key = (task.train.tobytes(), task.validation.tobytes())
        if key not in self._known:
            self._known[key] = self._make(task.train, task.validation)
        return self._known[key]

    def _make(self, train: Indices, validation: Indices) -> _FoldData:
        targets, features = self._targets, self._features
        scaler = Scaler.fit(features, train)
        target_scaler = Scaler.fit(targets, train) if self._task is Task.REGRESSION else None
        weights = class_weights(targets[train], self._recipe.class_weights)
        sizes_bytes = 4 * (len(train) + len(validation)) * (features.shape[1] + 1)
        is_held = sizes_bytes <= self._left_bytes
        self._left_bytes -= sizes_bytes * is_held

        def learned(rows: Indices) -> Truth:
            found = target_scaler(targets[rows]) if target_scaler else targets[rows]
            return found[:, None].astype(np.float32) if self._task is Task.BINARY else found

        return _FoldData(
            scaler,
            target_scaler,
            _StandardisedRows(features, train, scaler, is_held),
            _StandardisedRows(features, validation, scaler, is_held),
            learned(train),
            learned(validation),
            _importance(targets[train], weights),
        )


def _importance(classes: Truth, weights: Mapping[int, float] | None) -> Float32:
    """Return the weight of each row, float32 [n]."""
    if weights is None:
        return np.ones(len(classes), dtype=np.float32)
    return np.array([weights[one] for one in classes.tolist()], dtype=np.float32)


@dataclass(frozen=True)
class _FoldData:
    """What heads of one fold share.

    Attributes:
        scaler: of the features.
        target_scaler: of the numbers that a regression learns.
        train: rows to learn from.
        validation: rows to watch.
        learned: what is to be learned of the rows in `train`.
        watched: the same of those in `validation`.
        importance: float32 [n]; the weight of each row in `train`.
    """

    scaler: Scaler
    target_scaler: Scaler | None
    train: _StandardisedRows
    validation: _StandardisedRows
    learned: Truth
    watched: Truth
    importance: Float32


class _StandardisedRows:
    """Standardised rows, each with a one behind it, which the bias is multiplied by."""

    def __init__(self, features: Features, rows: Indices, scaler: Scaler, is_held: bool) -> None:
        self._features = features
        self._rows = rows
        self._scaler = scaler
        self._held: Float32 | None = None
        if is_held:
            held = np.ones((len(rows), features.shape[1] + 1), dtype=np.float32)
            self._write(np.arange(len(rows)), held)
            self._held = held

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, places: Indices, into: Float32) -> None:
        """Write the rows at some places into float32 [n, D + 1], whose last column is left as it is."""
        if self._held is None:
            self._write(places, into)
        else:
            np.take(self._held, places, axis=0, out=into, mode="clip")  # other modes take a copy first

    def _write(self, places: Indices, into: Float32) -> None:
        for start in range(0, len(places), _VALIDATION_BATCH):
            chunk = places[start : start + _VALIDATION_BATCH]
            into[start : start + len(chunk), :-1] = self._scaler(self._features[self._rows[chunk]])


# --- heads -----------------------------------------------------------------------------------------------------------


class _HeadInTraining:
    """A head that is being fitted, as Keras' callbacks see a model.

    Attributes:
        place: where it stands among the wanted ones.
        fold: what it learns from.
        l2: weight of the squared weights in the loss.
        batches: how many there are in an epoch.
        state: its weights float32 [D + 1, outputs], the bias last, then what the rule remembers beside them; the stack
            that trains it has them in its own arrays.
        steps: how many it has taken.
        stop_training: set by early stopping.
    """

    def __init__(
        self,
        place: int,
        task: LinearHeadTask,
        fold: _FoldData,
        first: Float32,
        begin: Sequence[float],
        recipe: HeadedRecipe,
    ) -> None:
        self.place = place
        self.fold = fold
        self.l2 = task.l2
        self.batches = -(-len(fold.train) // recipe.batch_size)
        self.state = [first, *(np.full_like(first, value) for value in begin)]
        self.steps = 0
        self.stop_training = False
        self._task = task
        self._epochs = task.epochs
        self._history: list[Epoch] = []
        watches = recipe.early_stopping if len(fold.validation) else None
        self._stopping = Stopping(watches) if watches else None
        self._go_on()
        self._callbacks: list[Any] = [Watch(self._history, self.batches, task.passage)]
        self._callbacks += self._stopping.callbacks if self._stopping else []
        for callback in self._callbacks:
            callback.set_model(self)
            callback.on_train_begin()

    @property
    def has_ended(self) -> bool:
        return self.stop_training or len(self._history) == self._epochs

    def order(self) -> Indices:
        """Return the places of the fold's training rows in the order of the present epoch."""
        # Keras tells its batches that an epoch has ended before it begins the first one.
        return shuffled(np.arange(len(self.fold.train)), self._task.seed, len(self._history) + 1)

    def heard(self, batches: int) -> None:
        """Tell how many batches of the present epoch are done."""
        self._task.passage.on_batch(len(self._history) + batches / self.batches)

    def end_epoch(self, learned: Epoch, loss: LossFunction) -> None:
        """Watch what this epoch brought: `learned` are its scores on the training rows."""
        scores = learned | {f"val_{name}": value for name, value in self._watched(loss).items()}
        number = len(self._history)
        for callback in self._callbacks:
            callback.on_epoch_end(number, scores)
        if not self.has_ended:
            self._task.passage.offer(self._snapshot)

    def fit(self) -> FittedHead:
        """Return the head with the weights of its best epoch."""
        for callback in self._callbacks:
            callback.on_train_end()
        (both,) = self.get_weights()
        weights = [both[:-1], both[-1]]
        scaler, target_scaler = self.fold.scaler, self.fold.target_scaler
        trained = Trained(
            history=self._history,
            best_epoch=self._stopping.best_epoch if self._stopping else len(self._history),
            stopped=self._stopping.reason if self._stopping else "epochs",
        )
        return FittedHead(
            dense_layers(weights, Activation.LINEAR, scaler, target_scaler), scaler, target_scaler, weights, trained
        )

    def penalty(self) -> float:
        """Return what the weights add to the loss."""
        return self.l2 * float(np.square(self.state[0][:-1], dtype=np.float64).sum()) if self.l2 else 0.0

    def _watched(self, loss: LossFunction) -> Epoch:
        """Return the scores on the validation rows."""
        count = len(self.fold.validation)
        if not count:
            return {}
        lost, right = 0.0, 0
        for start in range(0, count, _VALIDATION_BATCH):
            places = np.arange(start, min(start + _VALIDATION_BATCH, count))
            rows = np.ones((len(places), len(self.state[0])), dtype=np.float32)
            self.fold.validation.read(places, rows)
            losses, are_right = loss((rows @ self.state[0])[None], self.fold.watched[None, places])
            lost += float(losses.sum(dtype=np.float64))
            right += 0 if are_right is None else int(are_right.sum())
        scores = {"loss": lost / count + self.penalty()}
        return scores if are_right is None else scores | {"accuracy": right / count}

    # --- as a model -------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Arrays:
        return self.state[:1]

    trainable_variables = weights

    def get_weights(self) -> Arrays:
        return [self.state[0].copy()]

    def set_weights(self, weights: Arrays) -> None:
        self.state[0][...] = weights[0]

    # --- snapshots --------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        weights, *remembered = (array.copy() for array in self.state)
        watched = self._stopping.watched() if self._stopping else None
        history = [dict(epoch) for epoch in self._history]
        return Snapshot(history, [weights], [np.array(self.steps), *remembered], watched)

    def _go_on(self) -> None:
        """Take the state of the snapshot that was found, if it is one of such a head."""
        since = self._task.passage.since
        shapes = [array.shape for array in self.state]
        if since is None or [array.shape for array in (*since.variables, *since.optimizer[1:])] != shapes:
            return
        self.state = [*since.variables, *since.optimizer[1:]]
        self.steps = int(since.optimizer[0])
        self._history += since.history
        if self._stopping is not None and since.watched is not None:
            self._stopping.go_on_from(since.watched)


# --- stacks ----------------------------------------------------------------------------------------------------------


def _make_stacks(
    heads: Sequence[_HeadInTraining], batch_size: int, loss: LossFunction, update: UpdateRule
) -> list[_HeadStack]:
    """Return the heads in stacks that are no larger than is good, those with the most batches first."""
    if not heads:
        return []
    batch_size = min(batch_size, max(len(head.fold.train) for head in heads))
    one_bytes = sum(array.nbytes for array in heads[0].state) + 4 * batch_size * len(heads[0].state[0])
    together = max(1, _TOGETHER_BYTES // one_bytes)
    ordered = sorted(heads, key=lambda head: -head.batches)
    return [
        _HeadStack(ordered[start : start + together], batch_size, loss, update)
        for start in range(0, len(ordered), together)
    ]


class _HeadStack:
    """Heads whose weights lie in one array, so that they take their steps together.

    Those with the most batches come first: the heads that have a batch left are the first so many of each array, and
    the others do not move.
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
        self._gradient, self._spare = np.empty_like(weights), np.empty_like(weights)
        self._l2 = np.array([head.l2 for head in heads], dtype=np.float32)

    def train(self) -> None:
        """Train an epoch, and have each head hear how it went: before each step, as Keras measures it."""
        epoch = _StackEpoch(self._heads, self._batch_size)
        steps = np.array([head.steps for head in self._heads])
        penalties = np.zeros(epoch.sizes.shape)
        for batch in range(epoch.sizes.shape[1]):
            active = int(np.count_nonzero(epoch.sizes[:, batch]))
            penalties[:active, batch] = self._step(epoch, batch, steps[:active])
            steps[:active] += 1
            if (batch + 1) % _HEARD_EVERY == 0:
                for head in self._heads[:active]:
                    head.heard(batch + 1)
        for head, taken in zip(self._heads, steps.tolist(), strict=True):
            head.steps = taken
            head.heard(head.batches)
        for head, scores in zip(self._heads, epoch.scores(penalties), strict=True):
            head.end_epoch(scores, self._loss)

    def _step(self, epoch: _StackEpoch, batch: int, steps: StepCounts) -> Float64:
        """Take a step with as many heads as `steps` has; return what their weights added to the loss before it."""
        active = len(steps)
        span = slice(batch * self._batch_size, (batch + 1) * self._batch_size)
        weights, *remembered = (array[:active] for array in self._state)
        rows, logits = self._rows[:active], self._logits[:active]
        gradient, spare = self._gradient[:active], self._spare[:active]
        for number, head in enumerate(self._heads[:active]):
            places = epoch.orders[number][span]
            head.fold.train.read(places, rows[number, : len(places)])
        np.matmul(rows, weights, out=logits)
        epoch.losses[:active, span], right = self._loss(logits, epoch.truth[:active, span])
        if right is not None:
            epoch.is_judged = True
            epoch.right[:active, span] = right
        logits *= epoch.shares[:active, span, None]
        np.matmul(rows.transpose(0, 2, 1), logits, out=gradient)
        penalties = np.zeros(active)
        if self._l2.any():
            l2 = self._l2[:active]
            kernels = weights.reshape(active, -1)[:, : -weights.shape[2]]
            penalties = l2 * np.vecdot(kernels, kernels)
            np.multiply(weights[:, :-1], 2 * l2[:, None, None], out=spare[:, :-1])
            gradient[:, :-1] += spare[:, :-1]
        self._update.update(weights, gradient, remembered, steps, spare)
        return penalties


class _StackEpoch:
    """What the heads of a stack learn in an epoch, row by row in their order, and how it goes.

    Attributes:
        orders: the places of the training rows of each head.
        sizes: int [k, batches]; how many rows each batch of each head has.
        truth: what is to be learned, [k, batches * B, ...]; rows that a head does not have are zero.
        shares: float32 [k, batches * B]; what each row weighs in the mean loss of its batch, 0 for what is no row.
        losses: float32 of the same shape.
        right: whether each row was answered right; nothing, unless `is_judged`.
    """

    def __init__(self, heads: Sequence[_HeadInTraining], batch_size: int) -> None:
        count, batches = len(heads), max(head.batches for head in heads)
        self.orders = [head.order() for head in heads]
        rows = np.array([[len(order)] for order in self.orders])
        self.sizes = np.clip(rows - np.arange(batches) * batch_size, 0, batch_size)
        learned = heads[0].fold.learned
        shape = (count, batches * batch_size)
        self.truth = np.zeros((*shape, *learned.shape[1:]), dtype=learned.dtype)
        self.shares, self.losses = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self.right = np.zeros(shape, dtype=np.bool_)
        self.is_judged = False
        for number, (head, order) in enumerate(zip(heads, self.orders, strict=True)):
            self.truth[number, : len(order)] = head.fold.learned[order]
            self.shares[number, : len(order)] = head.fold.importance[order]
        self.shares /= np.repeat(np.maximum(self.sizes, 1), batch_size, axis=1)

    def scores(self, penalties: Float64) -> list[Epoch]:
        """Return loss and accuracy of each head; `penalties` float64 [k, batches] are part of the loss."""
        batch_losses = (self.losses * self.shares).reshape(*self.sizes.shape, -1).sum(axis=2, dtype=np.float64)
        rows = self.sizes.sum(axis=1)
        losses = ((batch_losses + penalties) * self.sizes).sum(axis=1) / rows
        found = [{"loss": loss} for loss in losses.tolist()]
        if self.is_judged:
            right = (self.right & (self.shares > 0)).sum(axis=1) / rows
            found = [epoch | {"accuracy": share} for epoch, share in zip(found, right.tolist(), strict=True)]
        return found


# --- losses ----------------------------------------------------------------------------------------------------------


def _multiclass_loss(logits: Float32, truth: Truth) -> tuple[Float32, npt.NDArray[np.bool_]]:
    right = logits.argmax(axis=-1) == truth
    logits -= logits.max(axis=-1, keepdims=True)
    flat = logits.reshape(-1)
    places = np.arange(0, logits.size, logits.shape[-1]).reshape(truth.shape) + truth
    of_truth = flat[places]
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1)
    logits /= total[..., None]
    flat[places] -= 1
    losses: Float32 = np.log(total) - of_truth
    return losses, right


def _binary_loss(logits: Float32, truth: Truth) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """Binary cross-entropy, the mean over labels; as Keras does it, exp of no positive number."""
    right = ((logits > 0) == (truth > 0.5)).all(axis=-1)
    small = np.exp(-np.abs(logits))
    losses: Float32 = (np.maximum(logits, 0) - logits * truth + np.log1p(small)).mean(axis=-1)
    np.divide(np.where(logits >= 0, 1, small), 1 + small, out=logits)
    logits -= truth
    logits /= logits.shape[-1]
    return losses, right


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
