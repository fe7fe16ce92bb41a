"""Shapes of records that several routes show."""

from __future__ import annotations

from api.schemas import ModelRef
from models.registry import ModelVersion
from models.run import Run


def model_ref(run: Run, version: ModelVersion | None) -> ModelRef | None:
    """Return the reference to the model version that a run made; None if it made none."""
    return ModelRef(name=run.name, version=version.number) if version else None
