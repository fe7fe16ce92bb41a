"""The one score that a run is known by, for each task, and how it is said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.recipe import Task


@dataclass(frozen=True)
class Headline:
    """A score: its name among the metrics, what it is called, and how its value is written."""

    metric: str
    title: str
    form: str
    is_greater_better: bool

    def formatted(self, value: float) -> str:
        """Return a value as it is printed."""
        return format(value, self.form)

    def sentence(self, metrics: Mapping[str, Any]) -> str:
        """Return the score with its interval, over groups as well where images belong together."""
        low, high = map(self.formatted, metrics[f"{self.metric}_ci95"])
        interval = f"95 % interval {low} to {high} over images"
        if "groups" in metrics:
            low, high = map(self.formatted, metrics[f"{self.metric}_ci95_groups"])
            interval += f", {low} to {high} over the {metrics['groups']:,} groups of images that belong together"
        return f"{self.title} {self.formatted(metrics[self.metric])} ({interval})"

    def interval(self, metrics: Mapping[str, Any]) -> tuple[float, float]:
        """Return the bounds that hold: over groups where there are some."""
        low, high = metrics.get(f"{self.metric}_ci95_groups") or metrics[f"{self.metric}_ci95"]
        return low, high

    def interval_kind(self, metrics: Mapping[str, Any]) -> str:
        """Return in words how the bounds of `interval` were made."""
        kind = str(metrics["interval"])
        return kind.replace("over images", "over groups of images") if "groups" in metrics else kind


_ACCURACY = Headline("accuracy", "Accuracy", ".1%", True)

HEADLINES = {
    Task.MULTICLASS: _ACCURACY,
    Task.BINARY: _ACCURACY,
    Task.MULTILABEL: Headline("f1_macro", "Macro F1", ".3f", True),
    Task.REGRESSION: Headline("rmse", "Root mean squared error", ".4g", False),
}
