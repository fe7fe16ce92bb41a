from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from artifacts.features import Features
from artifacts.images import Pixels
from inference.engine import FlatEngine
from recipes.recipe import Precision, Task
from training.networks.precision import (
    PrecisionDecision,
    PrecisionScore,
    candidate_precisions,
    choose_precision,
    is_as_good,
    measure_image_ms,
)

FLOAT32, BFLOAT16, INT8 = Precision


def test_auto_tries_what_the_machine_has_and_anything_else_only_itself() -> None:
    assert candidate_precisions("auto", [INT8, FLOAT32]) == [FLOAT32, INT8]
    assert candidate_precisions("auto", list(Precision)) == [FLOAT32, BFLOAT16, INT8]
    assert candidate_precisions(Precision.BFLOAT16, [FLOAT32]) == [BFLOAT16]


@pytest.mark.parametrize(
    ("task", "scores", "chosen"),
    [
        (Task.MULTICLASS, (0.900, 0.899, 0.896), INT8),
        (Task.MULTICLASS, (0.900, 0.896, 0.894), BFLOAT16),
        (Task.MULTICLASS, (0.900, 0.890, 0.890), FLOAT32),
        (Task.MULTILABEL, (0.900, 0.910, 0.800), BFLOAT16),
        (Task.REGRESSION, (2.00, 2.10, 2.019), INT8),
        (Task.REGRESSION, (2.00, 2.021, 2.021), FLOAT32),
    ],
)
def test_the_fastest_of_those_as_good_as_float32_is_chosen(
    task: Task, scores: Sequence[float], chosen: Precision
) -> None:
    tried = [
        PrecisionScore(precision, score, ms)
        for precision, score, ms in zip(Precision, scores, (9.0, 5.0, 3.0), strict=True)
    ]
    assert choose_precision(task, tried) == PrecisionDecision(chosen, tuple(tried))


def test_a_slower_one_is_not_chosen_however_good() -> None:
    tried = [PrecisionScore(FLOAT32, 0.9, 5.0), PrecisionScore(INT8, 0.95, 6.0)]
    assert choose_precision(Task.BINARY, tried).precision is FLOAT32


def test_a_better_error_is_a_smaller_one() -> None:
    assert is_as_good(Task.REGRESSION, 1.0, 2.0) and not is_as_good(Task.REGRESSION, 2.0, 1.0)
    assert is_as_good(Task.BINARY, 0.9, 0.8) and not is_as_good(Task.BINARY, 0.8, 0.9)


def test_a_choice_is_the_same_after_it_was_written() -> None:
    choice = PrecisionDecision(INT8, (PrecisionScore(FLOAT32, 0.9, 5.0), PrecisionScore(INT8, 0.897, 3.0)))
    facts = choice.facts(Task.MULTICLASS)
    assert (facts["chosen"], facts["score"], facts["margin"]) == ("int8", "accuracy", 0.005)
    assert choice.facts(Task.REGRESSION)["margin"] == 0.01
    assert PrecisionDecision.from_facts(json.loads(json.dumps(facts))) == choice


class Slow(FlatEngine):
    """An engine that puts a clock forward."""

    def __init__(self, image_s: float, clock: list[float]) -> None:
        super().__init__()
        self._image_s = image_s
        self._clock = clock

    def features(self, images: Pixels) -> Features:
        self._clock[0] += self._image_s * len(images)
        return super().features(images)


def test_engines_are_timed_per_image() -> None:
    golden = np.zeros((1, 8, 8, 3), np.uint8)
    clock = [0.0]
    engines = {FLOAT32: Slow(0.004, clock), INT8: Slow(0.001, clock)}
    times = measure_image_ms(engines, golden, now=lambda: clock[0])
    assert times == {FLOAT32: pytest.approx(4.0), INT8: pytest.approx(1.0)}
