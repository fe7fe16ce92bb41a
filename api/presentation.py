"""Conversions from records to parts of responses, for several routes."""

from __future__ import annotations

from api.schemas import ModelRef
from models.registry import ModelVersion
from models.run import Run


def model_ref(run: Run, version: ModelVersion | None) -> ModelRef | None:
    """Return the name and number of the model version that a run produced; None if it has produced none."""
    return ModelRef(name=run.name, version=version.number) if version else None
