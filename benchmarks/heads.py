"""Linear heads of all folds side by side against fold by fold, and against a loop of scikit-learn at equal loss.

Fold by fold is `training.fitting.head_fit.fit_head`: Keras, which traces anew for each head. Side by side is
`training.fitting.linear_heads.fit_linear_heads`, which takes the same steps. Both train every epoch, so that they do
the same work. The two take turns in pairs; figures are medians.

scikit-learn's `LogisticRegression` minimises C * sum(cross-entropy) + ||W||²/2 over standardised features, which is
C * n times our mean(cross-entropy) + l2 * ||W||² where C = 1 / (2 * l2 * n), for n rows. It is stopped at the first
iteration at which this loss is no greater than that of our head on the same training rows: equal loss, not equal
weights. Ours is stochastic and may still be above the least loss after its last epoch. Both compute on one thread.

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
from training.fitting.training_loop import Passage

K, CLASSES = 5, 10
GRID = (1e-6, 1e-4, 1e-2)
SIZES = ((600, 512), (600, 2048), (2000, 512), (2000, 2048))
QUIET = Passage(lambda number, metrics: None)
_MOST_ITERATIONS = 1000


def drawn(rows: int, width: int) -> tuple[Features, Indices]:
    """Return features as those of a network with ReLU, of classes that overlap, and the class of each row."""
    random = np.random.default_rng(0)
    truth = np.arange(rows) % CLASSES
    centres = random.normal(0, 1, (CLASSES, width))
    seen = centres[truth] + random.normal(0, np.sqrt(width) / 5, (rows, width))
    return np.maximum(seen, 0).astype(np.float32), truth


def folded(truth: Indices) -> list[Fold]:
    """Return the folds of a default recipe."""
    rows = np.arange(len(truth))
    labels = np.eye(CLASSES, dtype=bool)[truth]
    return make_folds(rows, truth, labels, rows, rows[:0], k=K, repeats=1, validation_fraction=0.15, seed=0)


def fold_by_fold(
    recipe: HeadedRecipe, features: Features, truth: Indices, wanted: Sequence[LinearHeadTask]
) -> list[FittedHead]:
    """Fit each head by itself."""
    return [
        fit_head(
            recipe.model_copy(update={"head": recipe.head.model_copy(update={"l2": one.l2})}),
            FitData(Task.MULTICLASS, CLASSES, features, truth),
            one,
        )
        for one in wanted
    ]


def side_by_side(
    recipe: HeadedRecipe, features: Features, truth: Indices, wanted: Sequence[LinearHeadTask]
) -> list[FittedHead]:
    """Fit all heads at once."""
    fits = dict(fit_linear_heads(recipe, FitData(Task.MULTICLASS, CLASSES, features, truth), wanted))
    return [fits[place] for place in range(len(wanted))]


class Rival:
    """A loop of scikit-learn over the folds, each stopped at the loss that our head has on its training rows."""

    def __init__(
        self, features: Features, truth: Indices, wanted: Sequence[LinearHeadTask], ours: Sequence[FittedHead]
    ) -> None:
        self._features, self._truth, self._wanted = features, truth, wanted
        losses = [self._loss_of(one, fit.weights[0], fit.weights[1]) for one, fit in zip(wanted, ours, strict=True)]
        self.iterations = [self._needed(one, loss) for one, loss in zip(wanted, losses, strict=True)]

    def fit_all(self) -> list[Any]:
        """Fit all heads."""
        with threadpool_limits(1):
            return [self._fit(one, iterations) for one, iterations in zip(self._wanted, self.iterations, strict=True)]

    def _needed(self, one: LinearHeadTask, loss: float) -> int:
        """Return the first iteration whose loss is no greater."""
        for iterations in range(1, _MOST_ITERATIONS):
            fitted = self._fit(one, iterations)
            if self._loss_of(one, fitted.coef_.T, fitted.intercept_) <= loss:
                return iterations
        raise AssertionError(f"Expected a loss of {loss} at most. Not in {_MOST_ITERATIONS} iterations.")

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


def differ(
    features: Features, wanted: Sequence[LinearHeadTask], one: Sequence[FittedHead], other: Sequence[FittedHead]
) -> float:
    """Return how much the out-of-fold probabilities of two fits of the same heads differ at most."""
    rows = np.arange(len(features))
    most = 0.0
    for asked, a, b in zip(wanted, one, other, strict=True):
        test = np.setdiff1d(rows, np.concatenate([asked.train, asked.validation]))
        both = [heads.probabilities(Task.MULTICLASS, heads.logits(fit.layers, features[test])) for fit in (a, b)]
        most = max(most, float(np.abs(both[0] - both[1]).max()))
    return most


def timed(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """Return how many seconds something takes, and what it brings."""
    started = time.perf_counter()
    brought = work()
    return time.perf_counter() - started, brought


def compared(rows: int, width: int, epochs: int, pairs: int, strengths: Sequence[float]) -> dict[str, Any]:
    """Measure one size, with heads of each strength of the penalty."""
    features, truth = drawn(rows, width)
    recipe = fill(Recipe(early_stopping=None), Task.MULTICLASS, [ClassCount("one of many", rows, rows)])
    assert isinstance(recipe, HeadedRecipe)
    folds = [LinearHeadTask(fold.train, fold.validation, epochs, fold.number, QUIET, 0.0) for fold in folded(truth)]
    wanted = l2_grid(folds, strengths)
    given = recipe, features, truth
    rival = Rival(features, truth, wanted, side_by_side(*given, wanted))
    loop, many, scikit = [], [], []
    for _ in range(pairs):
        taken, theirs = timed(lambda: fold_by_fold(*given, wanted))
        loop.append(taken)
        taken, ours = timed(lambda: side_by_side(*given, wanted))
        many.append(taken)
        scikit.append(timed(rival.fit_all)[0])
    return {
        "rows": rows,
        "width": width,
        "heads": len(wanted),
        "epochs": epochs,
        "seconds_fold_by_fold": round(float(np.median(loop)), 2),
        "seconds_side_by_side": round(float(np.median(many)), 2),
        "ratio": spread([a / b for a, b in zip(loop, many, strict=True)]),
        "probabilities_differ_by": differ(features, wanted, theirs, ours),
        "seconds_scikit_learn": round(float(np.median(scikit)), 3),
        "scikit_learn_iterations": rival.iterations,
        "ratio_to_scikit_learn": spread([a / b for a, b in zip(scikit, many, strict=True)]),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    wanted = parser.parse_args()
    rows = []
    for size in SIZES:
        rows.append(compared(*size, wanted.epochs, wanted.pairs, [HeadRecipe().l2]))
        print(rows[-1], flush=True)
    rows.append(compared(*SIZES[0], wanted.epochs, 1, GRID))
    report("heads", {"aim": "ratio >= 2", "sizes": rows})


if __name__ == "__main__":
    main()
