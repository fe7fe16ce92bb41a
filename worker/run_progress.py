"""How far a training is, and how long it will still take. Knows no rows and no clock but the one it is given.

A child estimates the job in hand; its worker combines the jobs of a run with the folds that have ended.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.recipe import Mode
from worker.messages import JobProgress

# Shares of the whole that were typical; only the bar's evenness depends on them, the ETA is measured.
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
# Share of a fold that the head's epochs typically are where the network learns too; only the bar's evenness needs it.
_SHARE_OF_HEAD = 0.05


@dataclass
class _Fit:
    """A fold, or the final fit, in epochs: of the head alone, and of the network with it (0: it stays frozen).

    Attributes:
        done: epochs of both.
        counted_from: what was done when counting began; earlier epochs took another time.
        unfrozen_after: epochs of the head after which the network learns too; None as long as it does not.
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
        """Whether the epochs that are counted show what the others will take."""
        return not self.network or self.unfrozen_after is not None


@dataclass
class ProgressEstimator:
    """Estimates how far the job in hand is; `of_run` combines the jobs of a run.

    Fits run side by side, mostly one alone. Their time counts from when the first of those began that run now.
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
        """Begin a stage, a key of STAGES."""
        self._stage, self._stage_begun_at = name, self.now()
        return JobProgress(stage=name, share=0.0)

    def images_done(self, done: int, total: int) -> JobProgress:
        """Note how many images the stage has done; the others are assumed to take as long each."""
        share = done / total if total else 1.0
        spent_s = self.now() - self._stage_begun_at
        return JobProgress(stage=self._stage, share=share, eta_s=spent_s * (1 - share) / share if share else None)

    def begin_fit(self, fold: int | None, head: int, network: int, *, done: float = 0.0, spent_s: float = 0.0) -> None:
        """Begin a fold, or the final fit (None).

        Args:
            fold: its number.
            head: the most epochs of the head alone; 0 if the network learns from the beginning.
            network: the most epochs of the network with it; 0 if it stays frozen.
            done: epochs of the checkpoint that it continues from.
            spent_s: seconds that these took.
        """
        if not self._fits:
            self._ended = self._spent_before_s = 0.0
            self._fits_begun_at = self._counted_since = self.now()
        self._spent_before_s += spent_s
        self._fits[fold] = _Fit(head, network, done, counted_from=done, unfrozen_after=None if head else 0)

    def network_unfrozen(self, fold: int | None, epochs: int) -> JobProgress:
        """Note that the network learns too after so many epochs of the head.

        Counting begins anew with the next call of `epochs_done`: the network's first step also builds and compiles it.
        """
        fit = self._fits[fold]
        fit.unfrozen_after = epochs
        fit.done = max(fit.done, float(epochs))
        self._counted_since = None
        return self._of_fits(fold)

    def epochs_done(self, fold: int | None, epochs: float) -> JobProgress:
        """Note how many epochs of a fit are done; return how far all fits are."""
        self._fits[fold].done = epochs
        if self._counted_since is None:
            self._ended, self._counted_since = 0.0, self.now()
            for fit in self._fits.values():
                fit.counted_from = fit.done
        return self._of_fits(fold)

    def end_fit(self, fold: int | None) -> None:
        """End a fit; its epochs still show what one takes."""
        fit = self._fits.pop(fold, None)
        if fit is not None:
            self._ended += fit.done - fit.counted_from

    def count_fits(self) -> int:
        """Return how many fits run side by side."""
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

        The ETA is measured: until a fold has begun to count its epochs, it is that of the present stage alone, or None.
        A final fit that does not count them yet takes as long as a fold.

        Args:
            mode: how the run learns; it says which stages there are.
            folds: how many there are, through all repeats.
            ended_s: seconds that each fold took that has ended.
            states: how far each job of the run is, one or more.
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
