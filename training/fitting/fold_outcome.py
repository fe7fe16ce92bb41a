"""The outcome of a fold, in memory and as one safetensors file, which holds numbers and logits but never code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from artifacts import tensors
from artifacts.bundle import Logits
from recipes.recipe import Precision
from training.fitting.learners import Phase
from training.progress import FoldResult


@dataclass(frozen=True)
class FoldOutcome:
    """What the final fit and the report of a run need of a fold.

    Attributes:
        result: the scores of the fold.
        phases: the phases that were trained.
        kept: name of the phase whose network is kept.
        logits: [n, outputs] of the test images, in the order of their rows, in each precision that is
            considered; the first precision is the one of the training.
    """

    result: FoldResult
    phases: Sequence[Phase]
    kept: str
    logits: Mapping[Precision, Logits]

    def dump(self) -> bytes:
        """Return the outcome as a safetensors file, which `load` reads."""
        values = {
            "result": asdict(self.result),
            "phases": [asdict(phase) for phase in self.phases],
            "kept": self.kept,
        }
        return tensors.dump(values, {f"logits.{precision}": logits for precision, logits in self.logits.items()})


def load(data: bytes) -> FoldOutcome:
    """Return the outcome in a file that `FoldOutcome.dump` has written, also by an earlier version."""
    values, arrays = tensors.load(data)
    phases = tuple(Phase(**phase) for phase in values["phases"])
    if "logits" in arrays:  # written by a version that knew one precision
        arrays[f"logits.{Precision.FLOAT32}"] = arrays["logits"]
    logits = {precision: arrays[f"logits.{precision}"] for precision in Precision if f"logits.{precision}" in arrays}
    return FoldOutcome(FoldResult(**values["result"]), phases, values["kept"], logits)
