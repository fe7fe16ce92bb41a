"""Measures how fast linear heads are fitted: all together, one after the other with Keras, and with scikit-learn.

`fold_by_fold` uses `training.fitting.head_fit.fit_head`: Keras, which traces anew for each head. `side_by_side` uses
`training.fitting.linear_heads.fit_linear_heads`, which computes the same steps for all heads together. Both train all
epochs, so that they do the same work. They take turns, and the figures are medians.

scikit-learn's `LogisticRegression` minimises C * sum(cross-entropy) + ||W||²/2 over standardised features. With
C = 1 / (2 * l2 * n) for n rows, this is C * n times our loss, mean(cross-entropy) + l2 * ||W||². scikit-learn is
stopped at the first iteration whose loss on the training rows is no greater than that of our head. So the losses are
equal, but not the weights. Our fit is stochastic and may not have reached the minimum. Both compute on one thread.

Run as `python -m benchmarks.heads [--pairs 3] [--epochs 60]`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from artifacts.features import Features
from benchmarks.figures import report, spread
from inference import heads
from recipes.defaults import ClassCount, fill
from recipes.filled import HeadedRecipe
from recipes.recipe import HeadRecipe, Recipe, Task
from training.data.split import Fold, Indices, make_folds
from training.fitting.fit_task import FitData
from training.fitting.head_fit import FittedHead, Scaler, fit_head
from training.fitting.linear_heads import LinearHeadTask, fit_linear_heads, l2_grid
from training.fitting.training_loop import FitHooks

K, CLASSES = 5, 10
GRID = (1e-6, 1e-4, 1e-2)
SIZES = ((600, 512), (600, 2048), (2000, 512), (2000, 2048))
QUIET = FitHooks(lambda number, metrics: None)
_MOST_ITERATIONS = 1000


def draw_features(rows: int, width: int) -> tuple[Features, Indices]:
    """Return random features, at least zero as after a ReLU, and the class of each row. The classes overlap."""
    random = np.random.default_rng(0)
    truth = np.arange(rows) % CLASSES
    centres = random.normal(0, 1, (CLASSES, width))
    seen = centres[truth] + random.normal(0, np.sqrt(width) / 5, (rows, width))
    return np.maximum(seen, 0).astype(np.float32), truth


def make_benchmark_folds(truth: Indices) -> list[Fold]:
    """Return the folds of a default recipe."""
    rows = np.arange(len(truth))
    labels = np.eye(CLASSES, dtype=bool)[truth]
    return make_folds(rows, truth, labels, rows, rows[:0], k=K, repeats=1, validation_fraction=0.15, seed=0)


def fold_by_fold(
    recipe: HeadedRecipe, features: Features, truth: Indices, tasks: Sequence[LinearHeadTask]
) -> list[FittedHead]:
    """Fit the heads one after the other with Keras."""
    return [
        fit_head(
            recipe.model_copy(update={"head": recipe.head.model_copy(update={"l2": one.l2})}),
            FitData(Task.MULTICLASS, CLASSES, features, truth),
            one,
        )
        for one in tasks
    ]


def side_by_side(
    recipe: HeadedRecipe, features: Features, truth: Indices, tasks: Sequence[LinearHeadTask]
) -> list[FittedHead]:
    """Fit all heads together in NumPy; return them in the order of their tasks."""
    fits = dict(fit_linear_heads(recipe, FitData(Task.MULTICLASS, CLASSES, features, truth), tasks))
    return [fits[place] for place in range(len(tasks))]


class ScikitLearnLoop:
    """Fits the heads with scikit-learn, one after the other, each until it reaches the training loss of our head."""

    def __init__(
        self, features: Features, truth: Indices, tasks: Sequence[LinearHeadTask], ours: Sequence[FittedHead]
    ) -> None:
        self._features, self._truth, self._tasks = features, truth, tasks
        losses = [self._loss_of(one, fit.weights[0], fit.weights[1]) for one, fit in zip(tasks, ours, strict=True)]
        self.iterations = [self._needed(one, loss) for one, loss in zip(tasks, losses, strict=True)]

    def fit_all(self) -> list[Any]:
        """Fit all heads with scikit-learn, each for the iterations that were found to be enough."""
        with threadpool_limits(1):
            return [self._fit(one, iterations) for one, iterations in zip(self._tasks, self.iterations, strict=True)]

    def _needed(self, one: LinearHeadTask, loss: float) -> int:
        """Return the number of iterations after which the loss is no greater than ours."""
        for iterations in range(1, _MOST_ITERATIONS):
            fitted = self._fit(one, iterations)
            if self._loss_of(one, fitted.coef_.T, fitted.intercept_) <= loss:
                return iterations
        raise AssertionError(f"scikit-learn did not reach a loss of {loss} in {_MOST_ITERATIONS} iterations.")

    def _fit(self, one: LinearHeadTask, iterations: int) -> Any:
        rows = Scaler.fit(self._features, one.train)(self._features[one.train])
        model = LogisticRegression(C=1 / (2 * one.l2 * len(one.train)), tol=0.0, max_iter=iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is stopped on purpose
            return model.fit(rows, self._truth[one.train])

    def _loss_of(self, one: LinearHeadTask, kernel: Any, bias: Any) -> float:
        """Return mean cross-entropy + l2 * ||W||² on the training rows."""
        rows = Scaler.fit(self._features, one.train)(self._features[one.train]).astype(np.float64)
        probabilities = heads.probabilities(Task.MULTICLASS, rows @ kernel.astype(np.float64) + bias)
        of_truth = probabilities[np.arange(len(rows)), self._truth[one.train]]
        return float(-np.log(of_truth).mean() + one.l2 * np.square(kernel, dtype=np.float64).sum())


def largest_difference(
    features: Features, tasks: Sequence[LinearHeadTask], one: Sequence[FittedHead], other: Sequence[FittedHead]
) -> float:
    """Return the largest difference of an out-of-fold probability between two fits of the same heads."""
    rows = np.arange(len(features))
    most = 0.0
    for task, a, b in zip(tasks, one, other, strict=True):
        test = np.setdiff1d(rows, np.concatenate([task.train, task.validation]))
        both = [heads.probabilities(Task.MULTICLASS, heads.logits(fit.layers, features[test])) for fit in (a, b)]
        most = max(most, float(np.abs(both[0] - both[1]).max()))
    return most


def time_of(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def compare(rows: int, width: int, epochs: int, pairs: int, strengths: Sequence[float]) -> dict[str, Any]:
    """Measure one size of features, with a head for each fold and each L2 penalty; return the figures."""
    features, truth = draw_features(rows, width)
    recipe = fill(Recipe(early_stopping=None), Task.MULTICLASS, [ClassCount("one of many", rows, rows)])
    assert isinstance(recipe, HeadedRecipe)
    folds = [
        LinearHeadTask(fold.train, fold.validation, epochs, fold.number, QUIET, 0.0)
        for fold in make_benchmark_folds(truth)
    ]
    tasks = l2_grid(folds, strengths)
    inputs = recipe, features, truth
    scikit_learn = ScikitLearnLoop(features, truth, tasks, side_by_side(*inputs, tasks))
    loop, many, scikit = [], [], []
    for _ in range(pairs):
        taken, theirs = time_of(lambda: fold_by_fold(*inputs, tasks))
        loop.append(taken)
        taken, ours = time_of(lambda: side_by_side(*inputs, tasks))
        many.append(taken)
        scikit.append(time_of(scikit_learn.fit_all)[0])
    return {
        "rows": rows,
        "width": width,
        "heads": len(tasks),
        "epochs": epochs,
        "seconds_fold_by_fold": round(float(np.median(loop)), 2),
        "seconds_side_by_side": round(float(np.median(many)), 2),
        "ratio": spread([a / b for a, b in zip(loop, many, strict=True)]),
        "probabilities_differ_by": largest_difference(features, tasks, theirs, ours),
        "seconds_scikit_learn": round(float(np.median(scikit)), 3),
        "scikit_learn_iterations": scikit_learn.iterations,
        "ratio_to_scikit_learn": spread([a / b for a, b in zip(scikit, many, strict=True)]),
    }


def main() -> None:
    """Measure all sizes and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        rows.append(compare(*size, args.epochs, args.pairs, [HeadRecipe().l2]))
        print(rows[-1], flush=True)
    rows.append(compare(*SIZES[0], args.epochs, 1, GRID))
    report("heads", {"aim": "ratio >= 2", "sizes": rows})


if __name__ == "__main__":
    main()
