"""Learning curves: how the score of a run depends on the number of training images.

Heads are fitted on nested subsets of each fold's training images and scored on the fold's test images. A power law
through the points (`training.statistics.power_law`) forecasts the score for twice the images. Reads features, never
pixels, and exports nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from artifacts import manifest
from artifacts.bundle import Logits
from artifacts.features import Features
from artifacts.layout import Split
from artifacts.manifest import Row
from errors import TrainingDiverged
from recipes.filled import HeadedRecipe
from recipes.headline import HEADLINES, Headline
from recipes.recipe import Task
from training.data.split import Indices, nested_subsets, set_aside
from training.data.targets import Float64, Targets, make_targets
from training.figures import png
from training.fitting.fit_task import FitData
from training.fitting.learners import HeadLearner, LearningTask, Plan
from training.fitting.trials import Trial
from training.networks.precision import MARGIN, RELATIVE_MARGIN
from training.statistics import evaluation, power_law, resampling
from training.statistics.comparison import OutOfFoldLogits
from training.statistics.power_law import LEAST_POINTS, PowerLaw

FRACTIONS = (0.1, 0.2, 0.4, 0.7)
"""Shares of a fold's training images that heads are fitted on; the run itself has measured the score for all."""

INTERVAL = (
    f"{resampling.DRAWS:,} draws of folds and of test images in them, or of groups where images belong together, the "
    "same for every point, and of the distances between points and curve; the power law is fitted anew to each draw, "
    "the heads are not"
)

ReportShare = Callable[[float], None]

# Number of bootstrap draws whose counts are in memory at once.
_AT_ONCE = 250


@dataclass(frozen=True)
class MeasuredRun:
    """A finished feature extraction run with its out-of-fold logits.

    Attributes:
        recipe: the recipe of the run.
        labels: class names in the order of the outputs.
        rows: the images of the data set version, N of them.
        features: float32 [N, D], the features of each image, computed by the run's network.
        measured: the out-of-fold logits of the run.
    """

    recipe: HeadedRecipe
    labels: Sequence[str]
    rows: Sequence[Row]
    features: Features
    measured: OutOfFoldLogits


@dataclass(frozen=True)
class Point:
    """One measured point of a learning curve.

    Attributes:
        fraction: share of each fold's training images that heads were fitted on, above 0 and up to 1.
        images: number of images that this share contains, as the mean over the folds.
        score: the headline score of these heads on the test images of all folds.
        ci95: the 95 % interval of the score.
    """

    fraction: float
    images: int
    score: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class FittedPowerLaw:
    """The fitted curve `error = floor + scale * images ** -exponent`.

    The error is 1 − score, or the score itself if a smaller score is better.

    Attributes:
        floor: the error that would remain with any number of images.
        scale: the part of the error that falls with the number of images, for one image.
        exponent: how fast the error falls.
        misfit: root mean square of the distances between the measured errors and the curve.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float


@dataclass(frozen=True)
class DoubledForecast:
    """The forecast score for twice as many training images as the run has.

    Attributes:
        images: twice the number of training images.
        score: the measured score for all images plus `change`.
        ci95: the 95 % interval of the forecast score.
        change: the change of the score along the fitted curve from all images to twice as many.
        change_ci95: the 95 % interval of the change.
    """

    images: int
    score: float
    ci95: tuple[float, float]
    change: float
    change_ci95: tuple[float, float]


@dataclass(frozen=True)
class LearningCurve:
    """A measured learning curve.

    Attributes:
        points: the measured points, by number of images.
        law: the fitted power law; None if there are too few points to fit one.
        twice: the forecast for twice the images; None if there are too few points.
        sentence: what the forecast says, in one sentence.
        picture: a PNG of the points, the fitted curve and the forecast.
    """

    points: list[Point]
    law: FittedPowerLaw | None
    twice: DoubledForecast | None
    sentence: str
    picture: bytes


def measure_learning_curve(subject: MeasuredRun, report: ReportShare) -> LearningCurve:
    """Measure how the score of a run depends on the number of its training images.

    Args:
        subject: the run.
        report: called with the finished share of the work, from 0 to 1.

    Raises:
        TrainingDiverged: the loss of a head became infinite or NaN.
    """
    task = subject.recipe.task
    headline = HEADLINES[task]
    targets = make_targets(task, subject.labels, subject.rows)
    groups = np.array(manifest.group_rows(subject.rows), dtype=np.intp)
    tested = np.flatnonzero(subject.measured.folds[0] >= 0)
    truth, groups_tested = targets.truth[tested], groups[tested]
    points, statistics = [], []
    for fraction, images, logits in _logits_by_size(subject, task, targets, groups, report):
        found = logits[:, tested]
        metrics = evaluation.scores_with_intervals(task, truth, groups_tested, found)
        points.append(Point(fraction, images, metrics[headline.metric], headline.interval(metrics)))
        statistics.append(evaluation.mean_image_statistics(task, truth, found))
    law, twice = None, None
    if len(points) >= LEAST_POINTS:
        drawn = _bootstrap_scores(task, headline, statistics, groups_tested, subject.measured.folds[0][tested])
        law, twice = forecast_doubled(headline, points, drawn, len(np.unique(groups_tested)))
    sentence = summary_sentence(headline, points, twice)
    return LearningCurve(points, law, twice, sentence, _plot(headline, points, law, twice, sentence))


# --- points ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HeadFit:
    """One head to fit.

    Attributes:
        repeat: the repeat of cross-validation that the head belongs to.
        task: the rows to fit the head on.
        test: the rows to test the head on.
        images: number of training and validation images together.
    """

    repeat: int
    task: LearningTask
    test: Indices
    images: int


def _logits_by_size(
    subject: MeasuredRun, task: Task, targets: Targets, groups: Indices, report: ReportShare
) -> Iterator[tuple[float, int, Logits]]:
    """Fit and test heads on each fraction of the training images.

    If two fractions give the same number of images, which happens in small data sets, only the larger one is used.

    Yields:
        the fraction, the number of images, and the out-of-fold logits, float32 [repeats, N, outputs]. The last fraction
        is 1, with the logits that the run itself has measured.
    """
    measured = subject.measured
    data = FitData(task, measured.logits.shape[2], subject.features, targets.truth)
    learner = HeadLearner(subject.recipe, data)
    folds = [
        _head_fits(subject, targets, groups, learner.plan, repeat, number)
        for repeat, fold_of in enumerate(measured.folds)
        for number in np.unique(fold_of[fold_of >= 0]).tolist()
    ]
    sizes = [round(float(np.mean([part.images for part in parts]))) for parts in zip(*folds, strict=True)]
    distinct = [number for number in range(len(FRACTIONS)) if sizes[number] < sizes[number + 1]]
    total = sum(parts[number].images for parts in folds for number in distinct)
    done = 0
    for number in distinct:
        logits: Logits = np.full(measured.logits.shape, np.nan, np.float64 if task is Task.REGRESSION else np.float32)
        for part in (parts[number] for parts in folds):
            listener = Trial(partial(_report_epochs, report, done / total, part.images / total / learner.plan.epochs))
            answered = learner.learn(part.task, listener).logits(part.test)
            if not np.isfinite(answered).all():
                raise TrainingDiverged(
                    f"A head that was trained on {part.images} images predicts infinite values or NaN. Lower "
                    "optimizer.learning_rate."
                )
            logits[part.repeat, part.test] = answered
            done += part.images
            report(done / total)
        yield FRACTIONS[number], sizes[number], logits
    yield 1.0, sizes[-1], measured.logits


def _report_epochs(report: ReportShare, before: float, an_epoch: float, epochs: float) -> None:
    """Report the finished share of all fits: `before` this fit, plus `an_epoch` for each of its finished epochs."""
    report(before + epochs * an_epoch)


def _head_fits(
    subject: MeasuredRun, targets: Targets, groups: Indices, plan: Plan, repeat: int, number: int
) -> list[_HeadFit]:
    """Return the fits of one fold: one for each of FRACTIONS, then one on all training images of the fold."""
    recipe, fold_of = subject.recipe, subject.measured.folds[repeat]
    test, rest = np.flatnonzero(fold_of == number), np.flatnonzero((fold_of >= 0) & (fold_of != number))
    validation = _validation_rows(subject, groups)
    share = 0.0 if len(validation) else recipe.validation_fraction
    strata, needed, seed = targets.strata, targets.needed, _seed(recipe.seed, number)
    found = []
    for rows in nested_subsets(rest, strata, needed, groups, [*FRACTIONS, 1.0], seed):
        aside = validation
        if share:
            aside = set_aside(rows, strata, needed, groups, share, seed)
        task = LearningTask(np.setdiff1d(rows, aside), aside, plan, seed)
        found.append(_HeadFit(repeat, task, test, len(rows)))
    return found


def _validation_rows(subject: MeasuredRun, groups: Indices) -> Indices:
    """Return the rows of the validation split that the data set itself defines; empty if it defines none."""
    split = manifest.splits_of(subject.rows, groups.tolist())
    return np.flatnonzero([part is Split.VALIDATION for part in split])


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# --- power law -------------------------------------------------------------------------------------------------------


def _bootstrap_scores(
    task: Task, headline: Headline, statistics: Sequence[Float64], groups: Indices, fold_of: Indices
) -> Float64:
    """Return the score of each of P points in each bootstrap draw, float64 [draws, P].

    Within a draw, all points are scored on the same test images. The bootstrap has two stages: it draws folds, then
    images (or groups) in each fold. Drawing folds matters because the heads of two folds were trained on different
    images (Davison & Hinkley 1997, "Bootstrap Methods and their Application", 3.8).
    """
    of_folds = [
        np.stack(
            [resampling.block_sums(of_images[fold_of == number], groups[fold_of == number]) for of_images in statistics]
        )
        for number in np.unique(fold_of)
    ]  # [P, groups, S] each
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(0, resampling.DRAWS, _AT_ONCE):
        times = random.multinomial(len(of_folds), np.full(len(of_folds), 1 / len(of_folds)), size=_AT_ONCE)
        sums = np.zeros((len(statistics), _AT_ONCE, statistics[0].shape[1]))
        for number, blocks in enumerate(of_folds):
            among = blocks.shape[1]
            sums += random.multinomial(times[:, number] * among, np.full(among, 1 / among)).astype(float) @ blocks
        drawn.append(evaluation.scores_of_sums(task, sums)[headline.metric].T)
    return np.concatenate(drawn)


def forecast_doubled(
    headline: Headline, points: Sequence[Point], drawn: Float64, blocks: int
) -> tuple[FittedPowerLaw, DoubledForecast]:
    """Fit a power law to the points, and forecast the score for twice the images.

    The fitted curve gives the change of the error from all images to twice as many. The forecast adds this change to
    the score that was measured for all images, because that score need not lie on the curve.

    The interval of the forecast comes from curves that are fitted to resampled points. Resampling changes a point in
    two ways. First, by the change of its score in a draw of test images. Second, by its distance from the curve with a
    random sign (the wild bootstrap, Wu 1986, "Jackknife, Bootstrap and Other Resampling Methods in Regression
    Analysis"), because other training images would also give other heads.

    Args:
        headline: the headline score of the task.
        points: at least LEAST_POINTS points.
        drawn: the bootstrap scores of the P points, float64 [draws, P].
        blocks: number of images, or of groups if images belong together.
    """
    images = np.array([point.images for point in points], dtype=np.float64)
    ends = np.array([images[-1], 2 * images[-1]])
    errors = _error_or_score(headline, np.array([point.score for point in points]))
    law = power_law.fit_power_law(images, errors)
    misfits = errors - law.error(images)
    # Residuals are smaller than the true distances, because the curve was fitted to these points.
    free = np.sqrt(len(points) / (len(points) - (LEAST_POINTS - 1)))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=drawn.shape)
    moved = law.error(images) + signs * misfits * free + _error_or_score(headline, drawn) - errors
    resampled = power_law.fit_power_law(images, np.maximum(moved, 0.0)).error(ends)  # [draws, 2]
    now, then = law.error(ends).tolist()
    forecast = max(0.0, float(errors[-1]) + then - now)
    falls = resampled[:, 1] - resampled[:, 0]
    forecasts = _error_or_score(headline, np.maximum(0.0, _error_or_score(headline, drawn[:, -1]) + falls))
    change_sign = -1.0 if headline.is_greater_better else 1.0
    return (
        FittedPowerLaw(
            floor=float(law.floor),
            scale=float(law.scale),
            exponent=float(law.exponent),
            misfit=float(np.sqrt(np.square(misfits).mean())),
        ),
        DoubledForecast(
            images=round(ends[1]),
            score=float(_error_or_score(headline, np.array(forecast))),
            ci95=resampling.bootstrap_interval(forecasts, blocks),
            change=change_sign * (then - now),
            change_ci95=resampling.bootstrap_interval(change_sign * falls, blocks),
        ),
    )


def _error_or_score(headline: Headline, values: Float64) -> Float64:
    """Convert scores to errors, or errors to scores: 1 − value, or the value itself if a smaller score is better."""
    return 1.0 - values if headline.is_greater_better else values


# --- report ---------------------------------------------------------------------------------------------------------


def summary_sentence(headline: Headline, points: Sequence[Point], twice: DoubledForecast | None) -> str:
    """Return a sentence that says how much the score would gain from twice the images."""
    if twice is None:
        return (
            "There are too few images for a forecast: the curve has "
            f"{len(points)} different numbers of images and a power law needs {LEAST_POINTS}."
        )
    gain = abs(twice.change)
    low, high = sorted(map(abs, twice.change_ci95))
    margin = MARGIN if headline.is_greater_better else RELATIVE_MARGIN * points[-1].score
    title = headline.title[0].lower() + headline.title[1:]
    interval = f"(95 % interval {headline.formatted(low)} to {headline.formatted(high)})"
    if headline.form.endswith("%"):
        much = f"about +{100 * gain:.1f} points of {title} (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    elif headline.is_greater_better:
        much = f"about +{headline.formatted(gain)} of {title} {interval}"
    else:
        much = f"the {title} down by about {headline.formatted(gain)} {interval}"
    if high < margin:
        return f"The curve is flat: twice the images would bring {much}."
    return f"Twice the images would bring {much}{', so it may be nothing' if low < margin / 10 else ''}."


def _plot(
    headline: Headline,
    points: Sequence[Point],
    law: FittedPowerLaw | None,
    twice: DoubledForecast | None,
    sentence: str,
) -> bytes:
    """Return a PNG of the scores over the number of images: points with intervals, fitted curve and forecast."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    images = [point.images for point in points]
    _plot_intervals(axes, images, [point.score for point in points], [point.ci95 for point in points], "C0", "measured")
    if law is not None and twice is not None:
        fitted = PowerLaw(np.array(law.floor), np.array(law.scale), np.array(law.exponent))
        along, beyond = np.geomspace(images[0], images[-1], 100), np.geomspace(images[-1], twice.images, 100)
        axes.plot(
            along, _error_or_score(headline, fitted.error(along)), "--", color="C0", alpha=0.6, label="fitted power law"
        )
        # From the measured score on, as the forecast is.
        change = _error_or_score(headline, fitted.error(beyond)) - _error_or_score(headline, fitted.error(along[-1:]))
        axes.plot(beyond, points[-1].score + change, ":", color="C1")
        _plot_intervals(axes, [twice.images], [twice.score], [twice.ci95], "C1", "forecast")
        images.append(twice.images)
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{count:,}" for count in images])
    axes.minorticks_off()
    axes.set_xlabel("images to learn from")
    axes.set_ylabel(f"{headline.title}, 95 % interval")
    # Lines break at spaces, but not at those without a break.
    together = sentence.replace("95 % interval", "95\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}interval")
    axes.set_title(textwrap.fill(together, 70), fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return png(figure)


def _plot_intervals(
    axes: Any, images: list[int], scores: list[float], bounds: list[tuple[float, float]], colour: str, label: str
) -> None:
    """Draw points with their intervals. An interval need not be symmetric around its point."""
    axes.vlines(images, [low for low, _ in bounds], [high for _, high in bounds], color=colour, linewidth=2)
    axes.plot(images, scores, "o", color=colour, label=label)
