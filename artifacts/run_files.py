"""Names of the files that are kept with a run. What is in each, its writer knows."""

from __future__ import annotations

from enum import StrEnum


class RunFile(StrEnum):
    """A file of a run, by the name that the API, MLflow and the database use for it."""

    REPORT = "report.md"
    OUT_OF_FOLD = "out-of-fold.safetensors"
    NEIGHBOURS = "neighbours.safetensors"
    CONFUSION = "confusion.png"
    LABELS = "labels.png"
    VALUES = "values.png"
    CURVES = "curves.png"
    AUGMENTATIONS = "augmentations.png"
    LEARNING_CURVE = "learning-curve.png"
