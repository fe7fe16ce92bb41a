"""The headline score, the one metric by which runs of a task are compared, and how reports write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.recipe import Task


@dataclass(frozen=True)
class Headline:
    """The headline score of a task.

    Attributes:
        metric: its key in the metrics of a run.
        title: its name in reports.
        form: the Python format specification of its value, such as `.1%`.
        is_greater_better: whether a greater value is better.
    """

    metric: str
    title: str
    form: str
    is_greater_better: bool

    def formatted(self, value: float) -> str:
        """Return a value of this score as text, such as `93.1%`."""
        return format(value, self.form)

    def sentence(self, metrics: Mapping[str, Any]) -> str:
        """Return the score in `metrics` as text, with its 95 % interval over images and, if there are any, groups."""
        low, high = map(self.formatted, metrics[f"{self.metric}_ci95"])
        interval = f"95 % interval {low} to {high} over images"
        if "groups" in metrics:
            low, high = map(self.formatted, metrics[f"{self.metric}_ci95_groups"])
            interval += f", {low} to {high} over the {metrics['groups']:,} groups of images that belong together"
        return f"{self.title} {self.formatted(metrics[self.metric])} ({interval})"

    def interval(self, metrics: Mapping[str, Any]) -> tuple[float, float]:
        """Return the bounds of the 95 % interval in `metrics`: over groups if there are any, else over images."""
        low, high = metrics.get(f"{self.metric}_ci95_groups") or metrics[f"{self.metric}_ci95"]
        return low, high

    def interval_kind(self, metrics: Mapping[str, Any]) -> str:
        """Return the method that computed the bounds of `interval`, such as `Wilson, over images; …`."""
        kind = str(metrics["interval"])
        return kind.replace("over images", "over groups of images") if "groups" in metrics else kind


def written_numbers(low: float, high: float, *others: float) -> list[str]:
    """Return the least and the largest of some numbers, and others between, with enough digits to see their range."""
    digits = 4
    if low < high:
        digits += max(0, math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))))
    return [f"{number:.{min(digits, 16)}g}" for number in (low, high, *others)]


_ACCURACY = Headline("accuracy", "Accuracy", ".1%", True)

HEADLINES = {
    Task.MULTICLASS: _ACCURACY,
    Task.BINARY: _ACCURACY,
    Task.MULTILABEL: Headline("f1_macro", "Macro F1", ".3f", True),
    Task.REGRESSION: Headline("rmse", "Root mean squared error", ".4g", False),
}
