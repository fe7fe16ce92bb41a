"""The three learners: a head on features of a frozen network, fine-tuning of its later layers, a network from scratch.

A run calls its learner once per fold and once for the final model. A learner sees row numbers of training and
validation images only, never those of test images.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from artifacts.bundle import Dense, Logits
from errors import TrainingDiverged
from inference import heads
from recipes.filled import FineTuningRecipe, FromScratchRecipe, HeadedRecipe
from recipes.recipe import Monitor, Recipe, Task
from training.data.split import Indices
from training.data.targets import Truth
from training.fitting.checkpoint import Checkpoint
from training.fitting.fine_tuning import FINE_TUNE_LEARNING_RATE, FineTuningData, fine_tune
from training.fitting.fit_task import FitData, FitTask
from training.fitting.from_scratch import fit_from_scratch
from training.fitting.head_fit import FittedHead, fit_head
from training.fitting.linear_heads import LinearHeadTask, fit_linear_heads, is_linear
from training.fitting.training_loop import FitHooks, Snapshot, finite
from training.progress import Epoch, FitListener
from training.statistics import evaluation
from training.statistics.evaluation import median_epoch

HEAD, NETWORK = "head", "network"
# `Phase.stopped` of a phase whose loss was not finite; `training.fitting.training_loop.FitSummary` has the others.
DIVERGED = "diverged"
# Without validation nothing checks the last step. So the logits of so many images are checked for finite numbers.
CHECKED_IMAGES = 16


@dataclass(frozen=True)
class Plan:
    """The largest numbers of epochs: of the head alone, and of the network with it (0: the network stays frozen).

    For a network from scratch `head` is 0.
    """

    head: int
    network: int = 0

    @property
    def epochs(self) -> int:
        """The sum of both."""
        return self.head + self.network


@dataclass(frozen=True)
class Phase:
    """One phase of a fit.

    Attributes:
        name: `head` or `network`.
        epochs: epochs that were trained.
        best_epoch: counted from 1; of a network that diverged, the last epoch before that.
        stopped: as in `FitSummary`, or `diverged`.
        validation: the monitored metric on the validation rows, without penalty; None without such rows or after
            divergence.
    """

    name: str
    epochs: int
    best_epoch: int
    stopped: str
    validation: float | None


@dataclass(frozen=True)
class LearnedModel:
    """The result of one fit.

    Attributes:
        phases: the phases in order; the last one is not always the one that was kept.
        history: metrics of each epoch, over all phases.
        best_epoch: the epoch that was kept, counted from 1 over all phases.
        stopped: why the kept phase ended.
        layers: the head on raw features.
        network: returns the weights of the trained network; None if it stayed frozen.
        logits: returns [n, outputs] for rows of the data set.
    """

    phases: tuple[Phase, ...]
    history: list[Epoch]
    best_epoch: int
    stopped: str
    layers: tuple[Dense, ...]
    network: Callable[[], bytes] | None
    logits: Callable[[Indices], Logits]

    @property
    def kept(self) -> str:
        """The name of the phase that was kept."""
        return HEAD if self.network is None else NETWORK


@dataclass(frozen=True)
class LearningTask:
    """One fit of a learner: a fold, or the final fit.

    Attributes:
        train: rows to learn from.
        validation: rows that early stopping watches; if there are none, every planned epoch is trained.
        plan: largest numbers of epochs.
        seed: the same seed gives the same result on the same machine.
        is_final: whether the result is the model that is delivered; the others are only measured.
    """

    train: Indices
    validation: Indices
    plan: Plan
    seed: int
    is_final: bool = False


class Learner(Protocol):
    """Trains a model on rows of the data set."""

    @property
    def plan(self) -> Plan:
        """The largest numbers of epochs of a fold."""
        ...

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Train on the rows of a task; an interrupted fit continues from its checkpoint and gives the same result."""
        ...


def final_plan(phases: Sequence[Sequence[Phase]], kept: Sequence[str]) -> Plan:
    """Return the plan of the final model: the medians of the folds' best epochs, since it has no validation rows.

    Its network stays frozen if no more than half of the folds kept a fine-tuned one.

    Args:
        phases: the phases of each fold.
        kept: name of the phase that each fold kept.
    """
    alone = [phase.best_epoch for fold in phases for phase in fold if phase.name == HEAD]
    head = median_epoch(alone) if alone else 0
    tuned = [fold[-1].best_epoch for fold, name in zip(phases, kept, strict=True) if name == NETWORK]
    return Plan(head, median_epoch(tuned) if 2 * len(tuned) > len(kept) else 0)


class Validation:
    """Computes the metric that early stopping monitors, without the penalty on weights."""

    def __init__(self, recipe: Recipe, task: Task, targets: Truth) -> None:
        self._task = task
        self._targets = targets
        self.is_accuracy = recipe.early_stopping is not None and recipe.early_stopping.monitor is Monitor.VAL_ACCURACY

    def __call__(self, logits: Callable[[Indices], Logits], rows: Indices) -> float | None:
        """Return the metric for the rows; None if there are none."""
        if not len(rows):
            return None
        score = evaluation.mean_scores(self._task, self._targets[rows], logits(rows))
        return score["accuracy" if self.is_accuracy else "loss"]


# Most weights of one head that is trained in parallel with others (measured: up to 20,480), and of all such heads
# together. Memory holds each weight about ten times: for the optimizer, the best epoch and a snapshot.
_LARGEST_IN_PARALLEL, _WEIGHTS_IN_PARALLEL = 262_144, 16_000_000


class HeadLearner:
    """Trains a head on features that were extracted once."""

    def __init__(self, recipe: HeadedRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self.validation = Validation(recipe, data.task, data.targets)
        self.plan = Plan(recipe.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Train the head."""
        ((_, learned),) = self.learn_many([(task, listener)])
        return learned

    @property
    def learns_in_parallel(self) -> bool:
        """Whether `learn_many` trains several tasks in parallel, which takes a fraction of the time.

        Large heads are trained one after the other: for them Keras is faster, as one product uses all processors.
        """
        return is_linear(self._recipe.head) and self._weights <= _LARGEST_IN_PARALLEL

    @property
    def _weights(self) -> int:
        return int(self._data.inputs.shape[1]) * self._data.outputs

    def learn_many(self, tasks: Sequence[tuple[LearningTask, FitListener]]) -> Iterator[tuple[int, LearnedModel]]:
        """Train a head for each task; yield the index of the task and its model, as soon as the fit has ended."""
        if not self.learns_in_parallel:
            for index, (task, listener) in enumerate(tasks):
                yield index, self.of_head(self.fit_head(task, listener), task.validation)
            return
        at_once = max(1, _WEIGHTS_IN_PARALLEL // self._weights)
        for start in range(0, len(tasks), at_once):
            parallel_tasks = [
                LinearHeadTask(
                    task.train,
                    task.validation,
                    task.plan.head,
                    task.seed,
                    _hooks(listener),
                    self._recipe.head.l2,
                )
                for task, listener in tasks[start : start + at_once]
            ]
            fits = fit_linear_heads(self._recipe, self._data, parallel_tasks)
            for index, head in fits:
                yield start + index, self.of_head(head, parallel_tasks[index].validation)

    def fit_head(self, task: LearningTask, listener: FitListener) -> FittedHead:
        """Fit one head on the features of the task's rows."""
        hooks = _hooks(listener)
        fit = FitTask(task.train, task.validation, task.plan.head, task.seed, hooks)
        return fit_head(self._recipe, self._data, fit)

    def of_head(self, head: FittedHead, validation: Indices) -> LearnedModel:
        """Return the `LearnedModel` of a fitted head."""

        def logits(rows: Indices) -> Logits:
            return heads.logits(head.layers, self._data.inputs[rows])

        value = self.validation(logits, validation)
        trained = head.trained
        phase = Phase(HEAD, len(trained.history), trained.best_epoch, trained.stopped, value)
        return LearnedModel((phase,), trained.history, trained.best_epoch, trained.stopped, head.layers, None, logits)


def _hooks(listener: FitListener) -> FitHooks:
    """Return the hooks of a fit with one phase, for its listener."""

    def offer(take: Callable[[], Snapshot]) -> None:
        listener.offer_checkpoint(lambda: Checkpoint(None, take()))

    return FitHooks(
        listener.epoch_ended, listener.epochs_done, offer, listener.checkpoint.snapshot if listener.checkpoint else None
    )


class FineTuningLearner:
    """Trains a head on frozen features, then the network with it, and keeps the better of both on validation rows.

    If the network diverges, a fold keeps the head alone; the final fit raises TrainingDiverged.
    """

    def __init__(self, recipe: FineTuningRecipe, frozen: HeadLearner, weights: bytes, data: FineTuningData) -> None:
        self._recipe = recipe
        self._frozen = frozen
        self._weights = weights
        self._data = data
        self.plan = Plan(recipe.epochs, recipe.fine_tune.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Train the head, then the network."""
        found = listener.checkpoint
        head = found.head if found else None
        since = found.snapshot if found and head else None
        if head is None:
            head = self._frozen.fit_head(task, listener)
        before = self._frozen.of_head(head, task.validation)
        if not task.plan.network:
            return before
        fitted, trained = head, len(head.trained.history)
        if since is None:
            listener.offer_checkpoint(lambda: Checkpoint(fitted, None))

        def offer(take: Callable[[], Snapshot]) -> None:
            listener.offer_checkpoint(lambda: Checkpoint(fitted, take()))

        history_so_far = list(since.history) if since else []

        def record(number: int, epoch: Epoch) -> None:
            history_so_far[number - 1 :] = [epoch]
            listener.epoch_ended(trained + number, epoch)

        listener.network_unfrozen(trained)
        gc.collect()  # frees the previous fold's network, which is large and part of reference cycles
        try:
            hooks = FitHooks(record, lambda epochs: listener.epochs_done(trained + epochs), offer, since)
            fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
            tuned = fine_tune(self._recipe, self._data, self._weights, head, fit)
            if not len(task.validation):  # no loss is reported after the last step
                finite(tuned.logits(task.train[:CHECKED_IMAGES]), FINE_TUNE_LEARNING_RATE)
        except TrainingDiverged:
            if task.is_final:  # the folds measured a fine-tuned network
                raise
            phases = (*before.phases, Phase(NETWORK, len(history_so_far), len(history_so_far), DIVERGED, None))
            return replace(before, phases=phases, history=[*head.trained.history, *history_so_far])
        value = self._frozen.validation(tuned.logits, task.validation)
        summary = tuned.trained
        phases = (*before.phases, Phase(NETWORK, len(summary.history), summary.best_epoch, summary.stopped, value))
        history = [*head.trained.history, *summary.history]
        if self._is_better(before.phases[0].validation, value):
            return replace(before, phases=phases, history=history)
        best_epoch = trained + summary.best_epoch
        return LearnedModel(phases, history, best_epoch, summary.stopped, tuned.layers, tuned.network, tuned.logits)

    def _is_better(self, one: float | None, other: float | None) -> bool:
        if one is None or other is None:
            return False
        return one > other if self._frozen.validation.is_accuracy else one < other


class FromScratchLearner:
    """Trains a network from scratch."""

    def __init__(self, recipe: FromScratchRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self._validation = Validation(recipe, data.task, data.targets)
        self.plan = Plan(0, recipe.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Train all layers."""
        gc.collect()  # frees the previous fold's network, which is part of reference cycles
        hooks = _hooks(listener)
        fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
        fitted = fit_from_scratch(self._recipe, self._data, fit)
        summary = fitted.trained
        value = self._validation(fitted.logits, task.validation)
        phase = Phase(NETWORK, len(summary.history), summary.best_epoch, summary.stopped, value)
        return LearnedModel(
            (phase,), summary.history, summary.best_epoch, summary.stopped, fitted.layers, fitted.network, fitted.logits
        )
