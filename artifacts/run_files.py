"""Names of the files that runs produce. The code that writes a file defines its content."""

from __future__ import annotations

from enum import StrEnum


class RunFile(StrEnum):
    """A file that a run produces. The value is the file's name in the API, in MLflow and in the database."""

    REPORT = "report.md"
    OUT_OF_FOLD = "out-of-fold.safetensors"
    NEIGHBOURS = "neighbours.safetensors"
    CONFUSION = "confusion.png"
    LABELS = "labels.png"
    VALUES = "values.png"
    CURVES = "curves.png"
    AUGMENTATIONS = "augmentations.png"
    LEARNING_CURVE = "learning-curve.png"
