"""Estimates the progress and the remaining time of a run. Uses neither the database nor the system clock.

The child process estimates the progress of its own job. The worker combines the jobs of a run and its ended folds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.recipe import Mode
from worker.messages import JobProgress

# Where each stage typically starts, as a fraction of the run. Only the progress bar depends on these numbers: the
# remaining time is measured.
STAGES: Mapping[Mode, Mapping[str, float]] = {
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
# In fine-tuning, the typical fraction of a fold that the epochs of the head take. Only the progress bar depends on it.
_SHARE_OF_HEAD = 0.05


@dataclass
class _Fit:
    """The epochs of one fit: the training of one fold, or the final fit.

    Attributes:
        head: the largest number of epochs that train only the head; 0 if the network is trained from the first epoch.
        network: the largest number of epochs that also train the network; 0 if the network stays frozen.
        done: finished epochs of both kinds.
        counted_from: the value of `done` when the time measurement began.
        unfrozen_after: number of epochs after which the network was unfrozen; None while it is frozen.
    """

    head: int
    network: int
    done: float
    counted_from: float
    unfrozen_after: int | None

    @property
    def most(self) -> int:
        return (self.head if self.unfrozen_after is None else self.unfrozen_after) + self.network

    @property
    def share(self) -> float:
        if not self.network or not self.head:
            return min(1.0, self.done / self.most)
        if self.unfrozen_after is None:
            return _SHARE_OF_HEAD * min(1.0, self.done / self.head)
        return _SHARE_OF_HEAD + (1 - _SHARE_OF_HEAD) * min(1.0, (self.done - self.unfrozen_after) / self.network)

    @property
    def left(self) -> float:
        return max(0.0, self.most - self.done)

    @property
    def is_predictable(self) -> bool:
        """Whether the measured epochs are of the same kind as the remaining ones, so that their times compare."""
        return not self.network or self.unfrozen_after is not None


@dataclass
class ProgressEstimator:
    """Estimates the progress of one job; `of_run` combines the jobs of a run.

    A job may train several fits at the same time. Their time is measured from the start of the first of them.
    """

    now: Callable[[], float]
    _stage: str = ""
    _stage_begun_at: float = 0.0
    _fits: dict[int | None, _Fit] = field(default_factory=dict)
    _ended: float = 0.0
    _spent_before_s: float = 0.0
    _fits_begun_at: float = 0.0
    _counted_since: float | None = 0.0

    def begin_stage(self, name: str) -> JobProgress:
        """Begin a stage; `name` is a key of STAGES."""
        self._stage, self._stage_begun_at = name, self.now()
        return JobProgress(stage=name, share=0.0)

    def images_done(self, done: int, total: int) -> JobProgress:
        """Record that the stage has processed `done` of `total` images; return the progress.

        The estimate assumes that each remaining image takes as long as the average so far.
        """
        share = done / total if total else 1.0
        spent_s = self.now() - self._stage_begun_at
        return JobProgress(stage=self._stage, share=share, eta_s=spent_s * (1 - share) / share if share else None)

    def begin_fit(self, fold: int | None, head: int, network: int, *, done: float = 0.0, spent_s: float = 0.0) -> None:
        """Begin a fit.

        Args:
            fold: number of the fold; None for the final fit.
            head: the largest number of epochs that train only the head; 0 if the network is trained from the start.
            network: the largest number of epochs that also train the network; 0 if the network stays frozen.
            done: finished epochs of the checkpoint from which the fit continues.
            spent_s: seconds that these finished epochs took.
        """
        if not self._fits:
            self._ended = self._spent_before_s = 0.0
            self._fits_begun_at = self._counted_since = self.now()
        self._spent_before_s += spent_s
        self._fits[fold] = _Fit(head, network, done, counted_from=done, unfrozen_after=None if head else 0)

    def network_unfrozen(self, fold: int | None, epochs: int) -> JobProgress:
        """Record that the network of a fit is trained too, after `epochs` epochs of the head; return the progress.

        The time measurement restarts at the next `epochs_done`, because the first step also compiles the network.
        """
        fit = self._fits[fold]
        fit.unfrozen_after = epochs
        fit.done = max(fit.done, float(epochs))
        self._counted_since = None
        return self._of_fits(fold)

    def epochs_done(self, fold: int | None, epochs: float) -> JobProgress:
        """Record how many epochs of a fit are finished; return the progress of all fits together."""
        self._fits[fold].done = epochs
        if self._counted_since is None:
            self._ended, self._counted_since = 0.0, self.now()
            for fit in self._fits.values():
                fit.counted_from = fit.done
        return self._of_fits(fold)

    def end_fit(self, fold: int | None) -> None:
        """End a fit. The measured times of its epochs still count for the fits that continue."""
        fit = self._fits.pop(fold, None)
        if fit is not None:
            self._ended += fit.done - fit.counted_from

    def count_fits(self) -> int:
        """Return how many fits this job trains at the same time now."""
        return len(self._fits)

    def _of_fits(self, fold: int | None) -> JobProgress:
        fits, this = self._fits.values(), self._fits[fold]
        now = self.now()
        new = self._ended + sum(fit.done - fit.counted_from for fit in fits)
        left = sum(fit.left for fit in fits)
        eta_s = None
        if self._counted_since is not None and new > 0 and all(fit.is_predictable for fit in fits):
            eta_s = left * (now - self._counted_since) / new
        return JobProgress(
            stage="final" if fold is None else "folds",
            fold=fold,
            folds=len(fits),
            share=sum(fit.share for fit in fits),
            epoch=min(int(this.done) + 1, this.most),
            epochs=this.most,
            spent_s=self._spent_before_s + now - self._fits_begun_at,
            eta_s=eta_s,
        )

    @staticmethod
    def of_run(mode: Mode, folds: int, ended_s: Sequence[float], states: Sequence[JobProgress]) -> dict[str, Any]:
        """Return the progress of a run: stage, fraction from 0 to 1, fold (from 1), folds, epoch, epochs, eta_s.

        Before the folds, `eta_s` is the remaining time of the current stage only, or None. A final fit that has not
        finished an epoch yet is assumed to take as long as a fold.

        Args:
            mode: mode of the run, which determines its stages.
            folds: number of folds of the run, repeats included.
            ended_s: duration in seconds of each fold that has ended.
            states: progress of each job of the run, one or more.
        """
        starts = STAGES[mode]
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
    """Return the estimated seconds until all folds and the final fit have ended.

    The final fit is assumed to take as long as a fold. Until a fold has ended, the estimate assumes no early stopping.

    Args:
        waiting: number of folds that have not started.
        ended_s: duration in seconds of each fold that has ended.
        parts: progress of each job that trains folds now.
    """
    typical = ended_s or [(state.spent_s + state.eta_s) / state.folds for state in parts if state.eta_s is not None]
    if not typical:
        return None
    typical_s = statistics.fmean(typical)
    left_s = max(_rest_s(state, typical_s, has_ended=bool(ended_s)) for state in parts)
    return float(left_s + math.ceil(max(0, waiting) / len(parts)) * typical_s + typical_s)


def _rest_s(state: JobProgress, typical_s: float, *, has_ended: bool) -> float:
    """Return the estimated seconds that a job still needs for its folds.

    If a fold of the run has ended, use the typical duration, because a running fold does not know whether it will stop
    early. Use the job's own estimate if no fold has ended, if the job trains several folds, or if it is overdue.
    """
    if state.eta_s is not None and (not has_ended or state.folds > 1 or state.spent_s > typical_s):
        return state.eta_s
    return max(0.0, state.folds * typical_s - state.spent_s)
