"""The three learners, one for each mode of a recipe: feature extraction, fine-tuning and from scratch.

A run calls its learner once per fold and once for the final model. A learner gets the row numbers of training and
validation images, but never those of test images.
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
# The value of `Phase.stopped` if the loss was not finite. `training.fitting.training_loop.FitSummary` lists the others.
DIVERGED = "diverged"
# Without validation rows no loss is computed after the last step. Then the logits of so many images are checked.
CHECKED_IMAGES = 16


@dataclass(frozen=True)
class Plan:
    """The largest numbers of epochs of the two phases of a fit.

    Attributes:
        head: epochs of the head alone; 0 for a network from scratch.
        network: epochs of the network together with its head; 0 if the network stays frozen.
    """

    head: int
    network: int = 0

    @property
    def epochs(self) -> int:
        """The epochs of both phases together."""
        return self.head + self.network


@dataclass(frozen=True)
class Phase:
    """One phase of a fit.

    Attributes:
        name: `head` or `network`.
        epochs: number of epochs that were trained.
        best_epoch: the epoch whose weights were kept, counted from 1; after divergence, the last epoch before it.
        stopped: why the phase ended: one of the values in `FitSummary`, or `diverged`.
        validation: the metric that early stopping monitors, on the validation rows, without the penalty on weights.
            None without validation rows, and after divergence.
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
        phases: the phases that were trained, in order. The model may be that of an earlier phase than the last.
        history: metrics of each epoch, over all phases.
        best_epoch: the epoch whose weights were kept, counted from 1 over all phases.
        stopped: why the phase of the kept weights ended.
        layers: the head, which takes unscaled features.
        network: returns the weights of the trained network; None if the network stayed frozen.
        logits: returns the logits for row numbers of the data set, [n, outputs].
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
        """The name of the phase whose weights were kept."""
        return HEAD if self.network is None else NETWORK


@dataclass(frozen=True)
class LearningTask:
    """One fit of a learner: a fold, or the final fit.

    Attributes:
        train: rows to train on.
        validation: rows that early stopping monitors; if empty, all epochs of the plan are trained.
        plan: largest numbers of epochs.
        seed: the same seed gives the same result on the same machine.
        is_final: True for the final fit, whose model is served; False for a fold, whose model is only evaluated.
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
        """Train on the rows of a task.

        If the listener has a checkpoint, the fit continues from it, with the same result as without an interruption.
        """
        ...


def final_plan(phases: Sequence[Sequence[Phase]], kept: Sequence[str]) -> Plan:
    """Return the plan of the final fit. It has no validation rows, so it trains for the median best epoch of the folds.

    The network is fine-tuned only if more than half of the folds kept a fine-tuned network.

    Args:
        phases: the phases of each fold.
        kept: for each fold, the name of the phase whose weights it kept.
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
        """Return the metric for the rows; None if `rows` is empty."""
        if not len(rows):
            return None
        score = evaluation.mean_scores(self._task, self._targets[rows], logits(rows))
        return score["accuracy" if self.is_accuracy else "loss"]


# Limits for heads that are trained in parallel: the weights of one head (20,480 is the most that was measured), and of
# all heads together. Each weight takes about ten times its size, for the optimizer, the best epoch and a snapshot.
_LARGEST_IN_PARALLEL, _WEIGHTS_IN_PARALLEL = 262_144, 16_000_000


class HeadLearner:
    """Trains a head on the features of a frozen network, which were extracted before."""

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
        """Whether `learn_many` trains several tasks in parallel, which is much faster for small linear heads.

        Large heads are trained one after the other, because a single matrix product then already uses all processors.
        """
        return is_linear(self._recipe.head) and self._weights <= _LARGEST_IN_PARALLEL

    @property
    def _weights(self) -> int:
        return int(self._data.inputs.shape[1]) * self._data.outputs

    def learn_many(self, tasks: Sequence[tuple[LearningTask, FitListener]]) -> Iterator[tuple[int, LearnedModel]]:
        """Train a head for each task. Yield the index of a task and its model as soon as its fit has ended."""
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
        """Return a fitted head as a `LearnedModel`, with its metric on the validation rows."""

        def logits(rows: Indices) -> Logits:
            return heads.logits(head.layers, self._data.inputs[rows])

        value = self.validation(logits, validation)
        trained = head.trained
        phase = Phase(HEAD, len(trained.history), trained.best_epoch, trained.stopped, value)
        return LearnedModel((phase,), trained.history, trained.best_epoch, trained.stopped, head.layers, None, logits)


def _hooks(listener: FitListener) -> FitHooks:
    """Return hooks that pass the progress and checkpoints of a fit with one phase to its listener."""

    def offer(take: Callable[[], Snapshot]) -> None:
        listener.offer_checkpoint(lambda: Checkpoint(None, take()))

    return FitHooks(
        listener.epoch_ended, listener.epochs_done, offer, listener.checkpoint.snapshot if listener.checkpoint else None
    )


class FineTuningLearner:
    """Trains a head on frozen features, then fine-tunes the network with it, and keeps the better of the two.

    The two are compared on the validation rows. If fine-tuning diverges, a fold keeps the frozen network with its head;
    the final fit raises TrainingDiverged.
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
        gc.collect()  # frees the network of the previous fold, which is large and part of reference cycles
        try:
            hooks = FitHooks(record, lambda epochs: listener.epochs_done(trained + epochs), offer, since)
            fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
            tuned = fine_tune(self._recipe, self._data, self._weights, head, fit)
            if not len(task.validation):  # no loss is reported after the last step
                finite(tuned.logits(task.train[:CHECKED_IMAGES]), FINE_TUNE_LEARNING_RATE)
        except TrainingDiverged:
            if task.is_final:  # the score of the run is that of a fine-tuned network, so a frozen one may not be served
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
    """Trains all layers of a network that starts with random weights."""

    def __init__(self, recipe: FromScratchRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self._validation = Validation(recipe, data.task, data.targets)
        self.plan = Plan(0, recipe.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Train all layers."""
        gc.collect()  # frees the network of the previous fold, which is part of reference cycles
        hooks = _hooks(listener)
        fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
        fitted = fit_from_scratch(self._recipe, self._data, fit)
        summary = fitted.trained
        value = self._validation(fitted.logits, task.validation)
        phase = Phase(NETWORK, len(summary.history), summary.best_epoch, summary.stopped, value)
        return LearnedModel(
            (phase,), summary.history, summary.best_epoch, summary.stopped, fitted.layers, fitted.network, fitted.logits
        )
