"""The ways to learn: a head on features of a frozen network, its later layers as well, or a network from scratch.

A learner is asked once per fold and once for the final model; it sees row numbers, never which images are being tested.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from artifacts.bundle import Dense, Float32
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
# How a phase ended whose loss was no number any more; for other ends see `training.fitting.training_loop.FitSummary`.
DIVERGED = "diverged"
# Images that show whether what nothing watched in its last step still answers with numbers.
LOOKED_AT = 16


@dataclass(frozen=True)
class Plan:
    """Epochs to train at most: of the head alone, and of the network with it (0: it stays frozen).

    A network from scratch has no head that learns alone.
    """

    head: int
    network: int = 0

    @property
    def epochs(self) -> int:
        """Epochs of both together."""
        return self.head + self.network


@dataclass(frozen=True)
class Phase:
    """One part of learning: `head` or `network`; `validation` is the plain value of what early stopping watches.

    That is None where nothing is watched. Where the network diverged, too, and its best epoch is the last before that.
    """

    name: str
    epochs: int
    best_epoch: int
    stopped: str
    validation: float | None


@dataclass(frozen=True)
class LearnedModel:
    """What a learner brings back from one set of training rows.

    Attributes:
        phases: what was trained, in order; the last one is not always the one that was kept.
        history: metrics of each epoch of all phases, one after the other.
        best_epoch: the epoch that was kept, counted from 1 through all phases.
        stopped: why the phase that was kept ended.
        layers: the head on raw features.
        network: the weights of the network that has learned; None if it stayed frozen.
        logits: float32 [n, outputs] for rows of the data set.
    """

    phases: tuple[Phase, ...]
    history: list[Epoch]
    best_epoch: int
    stopped: str
    layers: tuple[Dense, ...]
    network: Callable[[], bytes] | None
    logits: Callable[[Indices], Float32]

    @property
    def kept(self) -> str:
        """Name of the phase that was kept."""
        return HEAD if self.network is None else NETWORK


@dataclass(frozen=True)
class LearningTask:
    """One fit of a learner: a fold, or the final fit.

    Attributes:
        train: rows to learn from.
        validation: rows that early stopping watches; if there are none, every planned epoch is trained.
        plan: epochs at most.
        seed: the same seed gives the same result on the same machine.
        is_final: whether what is learned is served, rather than measured.
    """

    train: Indices
    validation: Indices
    plan: Plan
    seed: int
    is_final: bool = False


class Learner(Protocol):
    """Something that learns from rows."""

    @property
    def plan(self) -> Plan:
        """What a fold trains at most."""
        ...

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Learn from rows; an interrupted fit continues from its checkpoint and ends with the same result."""
        ...


def final_plan(phases: Sequence[Sequence[Phase]], kept: Sequence[str]) -> Plan:
    """Return what the final model trains, without rows to stop by: the medians of the folds' best epochs.

    Its network stays frozen if no more than half of the folds were better with one that learned.

    Args:
        phases: what each fold trained.
        kept: name of the phase that each fold kept.
    """
    alone = [phase.best_epoch for fold in phases for phase in fold if phase.name == HEAD]
    head = median_epoch(alone) if alone else 0
    tuned = [fold[-1].best_epoch for fold, name in zip(phases, kept, strict=True) if name == NETWORK]
    return Plan(head, median_epoch(tuned) if 2 * len(tuned) > len(kept) else 0)


class Validation:
    """Measures what early stopping watches, without any penalty."""

    def __init__(self, recipe: Recipe, task: Task, targets: Truth) -> None:
        self._task = task
        self._targets = targets
        self.is_accuracy = recipe.early_stopping is not None and recipe.early_stopping.monitor is Monitor.VAL_ACCURACY

    def __call__(self, logits: Callable[[Indices], Float32], rows: Indices) -> float | None:
        """Return it for the rows; None if there are none."""
        if not len(rows):
            return None
        score = evaluation.mean_scores(self._task, self._targets[rows], logits(rows))
        return score["accuracy" if self.is_accuracy else "loss"]


# Weights of one head (measured: up to 20,480), and of all that are learned at once: each is held some ten times, for
# its optimizer, its best epoch and a snapshot.
_LARGEST_IN_PARALLEL, _WEIGHTS_IN_PARALLEL = 262_144, 16_000_000


class HeadLearner:
    """Learns a head on features that were computed once."""

    def __init__(self, recipe: HeadedRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self.validation = Validation(recipe, data.task, data.targets)
        self.plan = Plan(recipe.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Learn a head."""
        ((_, learned),) = self.learn_many([(task, listener)])
        return learned

    @property
    def learns_in_parallel(self) -> bool:
        """Whether several tasks are learned side by side, which takes a fraction of the time.

        Not with heads so large that Keras has the better of it, with all processors in one product.
        """
        return is_linear(self._recipe.head) and self._weights <= _LARGEST_IN_PARALLEL

    @property
    def _weights(self) -> int:
        return int(self._data.inputs.shape[1]) * self._data.outputs

    def learn_many(self, tasks: Sequence[tuple[LearningTask, FitListener]]) -> Iterator[tuple[int, LearnedModel]]:
        """Learn a head for each task; yield its place among the tasks and what was learned, as soon as it has ended."""
        if not self.learns_in_parallel:
            for place, (task, listener) in enumerate(tasks):
                yield place, self.of_head(self.fit_head(task, listener), task.validation)
            return
        at_once = max(1, _WEIGHTS_IN_PARALLEL // self._weights)
        for start in range(0, len(tasks), at_once):
            wanted = [
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
            fits = fit_linear_heads(self._recipe, self._data, wanted)
            for place, head in fits:
                yield start + place, self.of_head(head, wanted[place].validation)

    def fit_head(self, task: LearningTask, listener: FitListener) -> FittedHead:
        """Fit the recipe's head on the rows' features, by itself."""
        hooks = _hooks(listener)
        fit = FitTask(task.train, task.validation, task.plan.head, task.seed, hooks)
        return fit_head(self._recipe, self._data, fit)

    def of_head(self, head: FittedHead, validation: Indices) -> LearnedModel:
        """Return a fitted head as what was learned."""

        def logits(rows: Indices) -> Float32:
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
    """Learns a head on frozen features first, then the network with it, and keeps what validates better.

    Where the network diverges the head is kept, except in the final model: raises TrainingDiverged.
    """

    def __init__(self, recipe: FineTuningRecipe, frozen: HeadLearner, weights: bytes, data: FineTuningData) -> None:
        self._recipe = recipe
        self._frozen = frozen
        self._weights = weights
        self._data = data
        self.plan = Plan(recipe.epochs, recipe.fine_tune.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Learn a head, then the network."""
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

        heard = list(since.history) if since else []

        def hear(number: int, epoch: Epoch) -> None:
            heard[number - 1 :] = [epoch]
            listener.epoch_ended(trained + number, epoch)

        listener.network_unfrozen(trained)
        gc.collect()  # the network of the fold before: it holds itself in cycles, and is large
        try:
            hooks = FitHooks(hear, lambda epochs: listener.epochs_done(trained + epochs), offer, since)
            fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
            tuned = fine_tune(self._recipe, self._data, self._weights, head, fit)
            if not len(task.validation):  # no loss is told after the last step
                finite(tuned.logits(task.train[:LOOKED_AT]), FINE_TUNE_LEARNING_RATE)
        except TrainingDiverged:
            if task.is_final:  # what the folds measured was a network that learned
                raise
            phases = (*before.phases, Phase(NETWORK, len(heard), len(heard), DIVERGED, None))
            return replace(before, phases=phases, history=[*head.trained.history, *heard])
        value = self._frozen.validation(tuned.logits, task.validation)
        went = tuned.trained
        phases = (*before.phases, Phase(NETWORK, len(went.history), went.best_epoch, went.stopped, value))
        history = [*head.trained.history, *went.history]
        if self._is_better(before.phases[0].validation, value):
            return replace(before, phases=phases, history=history)
        best_epoch = trained + went.best_epoch
        return LearnedModel(phases, history, best_epoch, went.stopped, tuned.layers, tuned.network, tuned.logits)

    def _is_better(self, one: float | None, other: float | None) -> bool:
        if one is None or other is None:
            return False
        return one > other if self._frozen.validation.is_accuracy else one < other


class FromScratchLearner:
    """Learns a network from scratch."""

    def __init__(self, recipe: FromScratchRecipe, data: FitData) -> None:
        self._recipe = recipe
        self._data = data
        self._validation = Validation(recipe, data.task, data.targets)
        self.plan = Plan(0, recipe.epochs)

    def learn(self, task: LearningTask, listener: FitListener) -> LearnedModel:
        """Learn all layers."""
        gc.collect()  # the network of the fold before, which holds itself in cycles
        hooks = _hooks(listener)
        fit = FitTask(task.train, task.validation, task.plan.network, task.seed, hooks)
        grown = fit_from_scratch(self._recipe, self._data, fit)
        went = grown.trained
        value = self._validation(grown.logits, task.validation)
        phase = Phase(NETWORK, len(went.history), went.best_epoch, went.stopped, value)
        return LearnedModel(
            (phase,), went.history, went.best_epoch, went.stopped, grown.layers, grown.network, grown.logits
        )
