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
"""How far a score of which more is better, such as accuracy, may be below that of float32."""
RELATIVE_MARGIN = 0.01
"""How far an error may be above that of float32, as a share of it."""

_TIMED_IMAGES = 8
_ROUNDS = 5
_ROUNDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class PrecisionScore:
    """The headline score of a precision, out of fold, and the milliseconds that its backbone takes per image."""

    precision: Precision
    score: float
    image_ms: float


@dataclass(frozen=True)
class PrecisionDecision:
    """The precision that was chosen, and the scores of all that were tried; float32 is always one of them."""

    precision: Precision
    scores: tuple[PrecisionScore, ...]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> PrecisionDecision:
        """Return the decision that `facts` has returned before."""
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


def candidate_precisions(wanted: Precision | Literal["auto"], available: Sequence[Precision]) -> list[Precision]:
    """Return the precisions that a recipe asks to try, float32 first: one, or for `auto` all that this machine has."""
    if isinstance(wanted, Precision):
        return [wanted]
    return [Precision.FLOAT32, *(one for one in Precision if one in available and one is not Precision.FLOAT32)]


def choose_precision(task: Task, scores: Sequence[PrecisionScore]) -> PrecisionDecision:
    """Choose the fastest precision whose score is as good as that of float32."""
    (reference,) = (one.score for one in scores if one.precision is Precision.FLOAT32)
    good = [one for one in scores if is_as_good(task, one.score, reference)]
    return PrecisionDecision(min(good, key=lambda one: one.image_ms).precision, tuple(scores))


def is_as_good(task: Task, score: float, reference: float) -> bool:
    """Return whether a score is at most the margin worse than `reference`, the score of float32."""
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
        golden: uint8 [1, H, W, 3], the image that the batch repeats.
        alive: called after each batch.
        now: the clock, in seconds.
    """
    pixels = np.repeat(golden, _TIMED_IMAGES, axis=0)
    calls = [lambda engine=engine: engine.features(pixels) for engine in engines.values()]
    times = medians_ms(calls, _ROUNDS, _ROUNDS_WITHIN_S, alive, now)
    return {precision: time / len(pixels) for precision, time in zip(engines, times, strict=True)}
