"""What a training reports while it runs, and who listens. Imports no framework, so that a worker can read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Epoch = dict[str, float]
"""Metrics of one epoch by their Keras name: loss and accuracy, and with `val_` in front those on validation rows."""


@dataclass(frozen=True)
class Extraction:
    """How many different images a run has, for how many features were computed, and for how many they were cached."""

    images: int
    computed: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class FoldResult:
    """What one fold measured on its test images, and the seconds that it took."""

    number: int
    epochs: int
    best_epoch: int
    stopped: str
    metrics: dict[str, Any]
    history: list[Epoch]
    seconds: float
