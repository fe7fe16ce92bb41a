"""How far a run is as a whole, from what its jobs say and the folds that have ended. Knows no rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.recipe import Mode
from worker.messages import JobProgress

# Shares of the whole that were typical; only the bar's evenness depends on them, the ETA is measured.
_STAGES: Mapping[Mode, Mapping[str, float]] = {
    Mode.FEATURE_EXTRACTION: {
        "weights": 0.0,
        "bake-off": 0.0,
        "backbone": 0.05,
        "quantise": 0.1,
        "features": 0.15,
        "precision": 0.5,
        "folds": 0.6,
        "final": 0.95,
        "bundle": 0.98,
        "end": 1.0,
    },
    Mode.FINE_TUNING: {
        "weights": 0.0,
        "pixels": 0.02,
        "backbone": 0.03,
        "features": 0.04,
        "activations": 0.07,
        "folds": 0.1,
        "final": 0.8,
        "export": 0.94,
        "bundle": 0.98,
        "end": 1.0,
    },
    Mode.FROM_SCRATCH: {
        "pixels": 0.0,
        "folds": 0.03,
        "final": 0.8,
        "export": 0.97,
        "bundle": 0.98,
        "end": 1.0,
    },
}


def whole(mode: Mode, folds: int, ended_s: Sequence[float], states: Sequence[JobProgress]) -> dict[str, Any]:
    """Return the progress of a run: stage, fraction from 0 to 1, fold (from 1), folds, epoch, epochs, eta_s.

    The ETA is measured: until a fold has begun to count its epochs it is that of the present stage alone, or None. A
    final fit that does not count them yet takes as long as a fold.

    Args:
        mode: how the run learns; it says which stages there are.
        folds: how many there are, through all repeats.
        ended_s: seconds that each fold took that has ended.
        states: how far each job of the run is, one or more.
    """
    starts = _STAGES[mode]
    names = list(starts)
    shown = max(states, key=lambda state: names.index(state.stage))
    stage = shown.stage
    parts = [state for state in states if state.stage == stage]
    share, eta_s = shown.share, shown.eta_s
    if stage == "folds":
        shown = min(parts, key=lambda state: state.fold or 0)
        share = (len(ended_s) + sum(state.share for state in parts)) / folds
        eta_s = _eta_of_folds_s(folds - len(ended_s) - sum(state.folds for state in parts), ended_s, parts)
    elif stage == "final" and eta_s is None and ended_s:
        eta_s = _rest_s(shown, statistics.fmean(ended_s), has_ended=True)
    start, end = starts[stage], starts[names[names.index(stage) + 1]]
    fold = shown.fold
    return {
        "stage": stage,
        "fraction": start + (end - start) * min(1.0, share),
        "fold": None if fold is None else fold + 1,
        "folds": None if fold is None else folds,
        "epoch": shown.epoch,
        "epochs": shown.epochs,
        "eta_s": eta_s,
    }


def _eta_of_folds_s(waiting: int, ended_s: Sequence[float], parts: Sequence[JobProgress]) -> float | None:
    """Return the seconds that the folds should still take, and the final fit after them, which takes as long as one.

    Until a fold has ended, as if none stopped early.
    """
    typical = ended_s or [(state.spent_s + state.eta_s) / state.folds for state in parts if state.eta_s is not None]
    if not typical:
        return None
    typical_s = statistics.fmean(typical)
    left_s = max(_rest_s(state, typical_s, has_ended=bool(ended_s)) for state in parts)
    return float(left_s + math.ceil(max(0, waiting) / len(parts)) * typical_s + typical_s)


def _rest_s(state: JobProgress, typical_s: float, *, has_ended: bool) -> float:
    """Return what is left of a part: what is left of a typical one, or what it says itself where that says more.

    Folds that have ended say it better than one that cannot know whether it will stop early. Of several side by side
    and of one that takes longer than others it is the other way round.
    """
    if state.eta_s is not None and (not has_ended or state.folds > 1 or state.spent_s > typical_s):
        return state.eta_s
    return max(0.0, state.folds * typical_s - state.spent_s)
