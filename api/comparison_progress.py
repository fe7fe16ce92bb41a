"""Computes the progress and the ETA of a comparison from those of its runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from api.schemas import ComparisonProgress
from models.base import now
from models.comparison import Comparison
from models.run import Run, RunState
from models.run_queue import STAGES_WITH_ETA, QueuePlace


def comparison_progress(
    comparison: Comparison, runs: Sequence[Run], places: Mapping[str, QueuePlace]
) -> ComparisonProgress:
    """Return the progress of a comparison: its stage, the fraction that is done, and the estimated seconds left.

    Args:
        comparison: the comparison.
        runs: all its runs.
        places: the places in the queue of those that wait, by run id.
    """
    ended = [run for run in runs if run.state.is_final]
    running = [run for run in runs if run.state is RunState.RUNNING]
    if comparison.state.is_final:
        stage = "done"
    elif len(ended) == len(runs):
        stage = "comparing"
    else:
        stage = "training" if running or ended else "queued"
    fraction = statistics.fmean(1.0 if run.state.is_final else run.progress["fraction"] for run in runs)
    return ComparisonProgress(
        stage=stage,
        fraction=fraction,
        ended=len(ended),
        runs=len(runs),
        position=min((place.position for place in places.values()), default=None) if stage == "queued" else None,
        eta_s=_eta_of_queue_s(runs, places) or _eta_s(stage, runs, running),
    )


def _eta_of_queue_s(runs: Sequence[Run], places: Mapping[str, QueuePlace]) -> float | None:
    """Return the estimated seconds until the last run ends, from past runs; None if unknown or if no run waits."""
    waiting = [run for run in runs if run.state is RunState.QUEUED]
    etas = [places[run.id].eta_s for run in waiting if run.id in places]
    if not waiting or len(etas) < len(waiting) or None in etas:
        return None
    etas += [run.progress["eta_s"] for run in runs if run.state is RunState.RUNNING]
    return max(eta_s for eta_s in etas if eta_s is not None)


def _eta_s(stage: str, runs: Sequence[Run], running: Sequence[Run]) -> float | None:
    """Return the estimated seconds until the last run ends, from the other runs of the comparison; None if unknown.

    Assumes that as many runs as now are always running at the same time, and that a waiting run takes as long as other
    runs with the same mode.
    """
    if stage not in ("training", "queued"):
        return None
    left = [run.progress["eta_s"] for run in running]
    typical_s = _typical_s(runs)
    waiting = [run.recipe["mode"] for run in runs if run.state is RunState.QUEUED]
    if None in left or any(mode not in typical_s for mode in waiting):
        return None
    together_s = sum(left) + sum(typical_s[mode] for mode in waiting)
    return float(max([*left, together_s / max(1, len(running))]))


def _typical_s(runs: Sequence[Run]) -> dict[str, float]:
    """Return the mean seconds of a run for each mode: of runs that succeeded, or if there are none, of running ones."""
    ended, estimated = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for run in runs:
        mode = run.recipe["mode"]
        if run.state is RunState.SUCCEEDED and run.started_at and run.finished_at:
            ended[mode].append((run.finished_at - run.started_at).total_seconds())
        left_s = run.progress["eta_s"] if run.progress["stage"] in STAGES_WITH_ETA else None
        if run.state is RunState.RUNNING and run.started_at and left_s is not None:
            estimated[mode].append((now() - run.started_at).total_seconds() + left_s)
    return {mode: statistics.fmean(takes) for mode, takes in (estimated | ended).items()}
