"""The outcome of a fold, in memory and as a safetensors file without code."""

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
    """The part of a fold's result that the final fit and the report of the run need.

    Attributes:
        result: the scores of the fold.
        phases: the phases that were trained.
        kept: name of the phase whose network was kept.
        logits: for each compared precision, the logits of the test images, [n, outputs], in the order of their
            rows. The first precision is the one of the training.
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
    """Return the outcome in the bytes of a file that `FoldOutcome.dump` wrote, in this version or an earlier one."""
    values, arrays = tensors.load(data)
    phases = tuple(Phase(**phase) for phase in values["phases"])
    if "logits" in arrays:  # written by an early version, which supported float32 only
        arrays[f"logits.{Precision.FLOAT32}"] = arrays["logits"]
    logits = {precision: arrays[f"logits.{precision}"] for precision in Precision if f"logits.{precision}" in arrays}
    return FoldOutcome(FoldResult(**values["result"]), phases, values["kept"], logits)
