"""Which precision answers: the fastest whose score is as good as that of float32, as measured on the folds."""

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
"""How much a score that is better when greater, such as accuracy, may fall below that of float32."""
RELATIVE_MARGIN = 0.01
"""By which share of float32's an error may be above it."""

_TIMED_IMAGES = 8
_ROUNDS = 5
_ROUNDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class PrecisionScore:
    """What a precision came to: the task's headline score, out of fold, and the backbone's milliseconds per image."""

    precision: Precision
    score: float
    image_ms: float


@dataclass(frozen=True)
class PrecisionDecision:
    """The precision that was chosen, and all that were tried for that; float32 is always among them."""

    precision: Precision
    tried: tuple[PrecisionScore, ...]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> PrecisionDecision:
        """Return what `facts` says."""
        tried = tuple(PrecisionScore(**one | {"precision": Precision(one["precision"])}) for one in facts["tried"])
        return cls(Precision(facts["chosen"]), tried)

    def facts(self, task: Task) -> dict[str, Any]:
        """Return it as it is kept with the run."""
        return {
            "chosen": self.precision.value,
            "score": HEADLINES[task].metric,
            "margin": RELATIVE_MARGIN if not HEADLINES[task].is_greater_better else MARGIN,
            "tried": [asdict(one) for one in self.tried],
        }


def candidate_precisions(wanted: Precision | Literal["auto"], available: Sequence[Precision]) -> list[Precision]:
    """Return the precisions that a recipe has tried, float32 first: one, or for `auto` those of this machine."""
    if isinstance(wanted, Precision):
        return [wanted]
    return [Precision.FLOAT32, *(one for one in Precision if one in available and one is not Precision.FLOAT32)]


def choose_precision(task: Task, tried: Sequence[PrecisionScore]) -> PrecisionDecision:
    """Choose the fastest of those that are as good as float32."""
    (reference,) = (one.score for one in tried if one.precision is Precision.FLOAT32)
    good = [one for one in tried if is_as_good(task, one.score, reference)]
    return PrecisionDecision(min(good, key=lambda one: one.image_ms).precision, tuple(tried))


def is_as_good(task: Task, score: float, reference: float) -> bool:
    """Say whether a score is no worse than that of float32 by more than the margin."""
    if HEADLINES[task].is_greater_better:
        return score >= reference - MARGIN
    return score <= reference * (1 + RELATIVE_MARGIN)


def measure_image_ms(
    engines: Mapping[Precision, Engine],
    golden: Pixels,
    alive: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[Precision, float]:
    """Return the milliseconds that each engine takes per image of a small batch, measured in turn on this machine.

    `alive` is called after each batch; `now` is the clock.
    """
    pixels = np.repeat(golden, _TIMED_IMAGES, axis=0)
    calls = [lambda engine=engine: engine.features(pixels) for engine in engines.values()]
    times = medians_ms(calls, _ROUNDS, _ROUNDS_WITHIN_S, alive, now)
    return {precision: time / len(pixels) for precision, time in zip(engines, times, strict=True)}
