"""Chooses the precision of a model: the fastest one whose score on the folds is as good as that of float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from artifacts.images import Pixels
from inference.engine import Engine
from inference.timing import medians_ms
from recipes.headline import HEADLINES
from recipes.recipe import Precision, Task

MARGIN = 0.005
"""How far a score such as accuracy may be below the score of float32."""
RELATIVE_MARGIN = 0.01
"""How far an error, such as that of a regression, may be above the error of float32, as a share of the latter."""

_TIMED_IMAGES = 8
_ROUNDS = 5
_ROUNDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class PrecisionScore:
    """The out-of-fold headline score of a precision, and the milliseconds that the backbone then takes per image."""

    precision: Precision
    score: float
    image_ms: float


@dataclass(frozen=True)
class PrecisionDecision:
    """The chosen precision, and the scores of all compared precisions, which always include float32."""

    precision: Precision
    scores: tuple[PrecisionScore, ...]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> PrecisionDecision:
        """Restore a decision from the JSON values that `facts` returned."""
        scores = tuple(PrecisionScore(**one | {"precision": Precision(one["precision"])}) for one in facts["tried"])
        return cls(Precision(facts["chosen"]), scores)

    def facts(self, task: Task) -> dict[str, Any]:
        """Return the decision as JSON values, as it is stored with the run and shown in its metrics."""
        return {
            "chosen": self.precision.value,
            "score": HEADLINES[task].metric,
            "margin": RELATIVE_MARGIN if not HEADLINES[task].is_greater_better else MARGIN,
            "tried": [asdict(one) for one in self.scores],
        }


def candidate_precisions(requested: Precision | Literal["auto"], available: Sequence[Precision]) -> list[Precision]:
    """Return the precisions to compare: the requested one alone, or for `auto` all available ones, float32 first."""
    if isinstance(requested, Precision):
        return [requested]
    return [Precision.FLOAT32, *(one for one in Precision if one in available and one is not Precision.FLOAT32)]


def choose_precision(task: Task, scores: Sequence[PrecisionScore]) -> PrecisionDecision:
    """Choose the fastest precision whose score is as good as that of float32."""
    (reference,) = (one.score for one in scores if one.precision is Precision.FLOAT32)
    good = [one for one in scores if is_as_good(task, one.score, reference)]
    return PrecisionDecision(min(good, key=lambda one: one.image_ms).precision, tuple(scores))


def is_as_good(task: Task, score: float, reference: float) -> bool:
    """Return whether a score is worse than `reference`, the score of float32, by no more than the margin."""
    if HEADLINES[task].is_greater_better:
        return score >= reference - MARGIN
    return score <= reference * (1 + RELATIVE_MARGIN)


def measure_image_ms(
    engines: Mapping[Precision, Engine],
    golden: Pixels,
    alive: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Precision, float]:
    """Measure the milliseconds that each engine takes per image of a small batch. The engines take turns.

    Args:
        engines: the engine of each precision.
        golden: uint8 [1, H, W, 3], the image that fills the batch.
        alive: called after each batch, to show that the work continues.
        now: the clock, in seconds.
    """
    pixels = np.repeat(golden, _TIMED_IMAGES, axis=0)
    calls = [lambda engine=engine: engine.features(pixels) for engine in engines.values()]
    times = medians_ms(calls, _ROUNDS, _ROUNDS_WITHIN_S, alive, now)
    return {precision: time / len(pixels) for precision, time in zip(engines, times, strict=True)}
