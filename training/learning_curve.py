"""What more images would bring: heads that learn from a part of them, measured on the same test images of every fold.

The parts of a fold hold each other, so that a point differs from the next one by what was added. What is foretold is
the power law through the points (`training.statistics.power_law`). Exports nothing; sees features, never pixels.
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
from artifacts.bundle import Float32
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
from training.fitting.learners import Frozen, LearningTask, Plan
from training.fitting.trials import Trial
from training.networks.precision import MARGIN, RELATIVE_MARGIN
from training.statistics import evaluation, power_law, resampling
from training.statistics.comparison import OutOfFoldLogits
from training.statistics.power_law import LEAST_POINTS, PowerLaw

FRACTIONS = (0.1, 0.2, 0.4, 0.7)
"""Of what a fold learns from; all of it is what the run has measured itself."""

INTERVAL = (
    f"{resampling.DRAWS:,} draws of folds and of test images in them, or of groups where images belong together, the "
    "same for every point, and of what the law leaves unexplained; the law is fitted anew to each, the heads are not"
)

Share = Callable[[float], None]

# Draws whose counts are in memory at once.
_AT_ONCE = 250


@dataclass(frozen=True)
class Subject:
    """A finished run of heads on a frozen network.

    Attributes:
        recipe: as it was trained.
        labels: class names in the order of the outputs.
        rows: the images of the data set version, N of them.
        features: float32 [N, D], as the run's network sees them.
        measured: what the run answered for the test images of its folds.
    """

    recipe: HeadedRecipe
    labels: Sequence[str]
    rows: Sequence[Row]
    features: Features
    measured: OutOfFoldLogits


@dataclass(frozen=True)
class Point:
    """The headline score of heads that learned from so many images, on average over the folds."""

    fraction: float
    images: int
    score: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Law:
    """`floor + scale * images ** -exponent`: the error, which is the headline score itself or what it lacks to one.

    `misfit` is the root mean square of what the points are away from it.
    """

    floor: float
    scale: float
    exponent: float
    misfit: float


@dataclass(frozen=True)
class Twice:
    """What the law foretells for twice the images; `change` is the score less what the law says of all images."""

    images: int
    score: float
    ci95: tuple[float, float]
    change: float
    change_ci95: tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The points by their number of images, and what follows from them; None where they are too few to say."""

    points: list[Point]
    law: Law | None
    twice: Twice | None
    sentence: str
    picture: bytes


def measure(subject: Subject, report: Share) -> Curve:
    """Measure how the score of a run hangs on the number of its training images.

    Args:
        subject: the run.
        report: called now and then with how much is done, from 0 to 1.

    Raises:
        TrainingDiverged: a head's loss is not a number any more.
    """
    task = subject.recipe.task
    headline = HEADLINES[task]
    targets = make_targets(task, subject.labels, subject.rows)
    groups = np.array(manifest.group_rows(subject.rows), dtype=np.intp)
    tested = np.flatnonzero(subject.measured.folds[0] >= 0)
    truth, groups_tested = targets.truth[tested], groups[tested]
    points, statistics = [], []
    for fraction, images, logits in _answers(subject, task, targets, groups, report):
        found = logits[:, tested]
        metrics = evaluation.scores_with_intervals(task, truth, groups_tested, found)
        points.append(Point(fraction, images, metrics[headline.metric], headline.interval(metrics)))
        statistics.append(evaluation.mean_image_statistics(task, truth, found))
    law, twice = None, None
    if len(points) >= LEAST_POINTS:
        drawn = _drawn_scores(task, headline, statistics, groups_tested, subject.measured.folds[0][tested])
        law, twice = foretell(headline, points, drawn, len(np.unique(groups_tested)))
    sentence = said(headline, points, twice)
    return Curve(points, law, twice, sentence, _picture(headline, points, law, twice, sentence))


# --- points ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What one head learns from and is tested on; `images` counts those that it may stop by, too."""

    repeat: int
    task: LearningTask
    test: Indices
    images: int


def _answers(
    subject: Subject, task: Task, targets: Targets, groups: Indices, report: Share
) -> Iterator[tuple[float, int, Float32]]:
    """Yield for each number of images its fraction, the number and the logits float32 [repeats, N, outputs].

    Of a data set so small that two fractions come to the same images only the larger one is left.
    """
    measured = subject.measured
    data = FitData(task, measured.logits.shape[2], subject.features, targets.truth)
    learner = Frozen(subject.recipe, data)
    folds = [
        _parts(subject, targets, groups, learner.plan, repeat, number)
        for repeat, fold_of in enumerate(measured.folds)
        for number in np.unique(fold_of[fold_of >= 0]).tolist()
    ]
    sizes = [round(float(np.mean([part.images for part in parts]))) for parts in zip(*folds, strict=True)]
    wanted = [number for number in range(len(FRACTIONS)) if sizes[number] < sizes[number + 1]]
    total = sum(parts[number].images for parts in folds for number in wanted)
    done = 0
    for number in wanted:
        logits = np.full(measured.logits.shape, np.nan, dtype=np.float32)
        for part in (parts[number] for parts in folds):
            listener = Trial(partial(_tell, report, done / total, part.images / total / learner.plan.epochs))
            answered = learner.learn(part.task, listener).logits(part.test)
            if not np.isfinite(answered).all():
                raise TrainingDiverged(
                    f"What was learned from {part.images} images answers with infinite numbers. Lower "
                    "optimizer.learning_rate."
                )
            logits[part.repeat, part.test] = answered
            done += part.images
            report(done / total)
        yield FRACTIONS[number], sizes[number], logits
    yield 1.0, sizes[-1], measured.logits


def _tell(report: Share, before: float, an_epoch: float, epochs: float) -> None:
    """Say how far all fits are when one has done so many epochs."""
    report(before + epochs * an_epoch)


def _parts(subject: Subject, targets: Targets, groups: Indices, plan: Plan, repeat: int, number: int) -> list[_Part]:
    """Return what the heads of a fold learn from, by FRACTIONS and then all of it."""
    recipe, fold_of = subject.recipe, subject.measured.folds[repeat]
    test, rest = np.flatnonzero(fold_of == number), np.flatnonzero((fold_of >= 0) & (fold_of != number))
    watched = _rows_to_watch(subject, groups)
    share = 0.0 if len(watched) else recipe.validation_fraction
    strata, needed, seed = targets.strata, targets.needed, _seed(recipe.seed, number)
    found = []
    for rows in nested_subsets(rest, strata, needed, groups, [*FRACTIONS, 1.0], seed):
        aside = watched
        if share:
            aside = set_aside(rows, strata, needed, groups, share, seed)
        task = LearningTask(np.setdiff1d(rows, aside), aside, plan, seed)
        found.append(_Part(repeat, task, test, len(rows)))
    return found


def _rows_to_watch(subject: Subject, groups: Indices) -> Indices:
    """Return the images that the data set itself sets aside to stop by."""
    split = manifest.splits_of(subject.rows, groups.tolist())
    return np.flatnonzero([part is Split.VALIDATION for part in split])


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# --- law -------------------------------------------------------------------------------------------------------------


def _drawn_scores(
    task: Task, headline: Headline, statistics: Sequence[Float64], groups: Indices, fold_of: Indices
) -> Float64:
    """Return float64 [draws, P], the score of each point on test images that are drawn anew, the same for all.

    Folds are drawn, and then images of each, or groups of them: the heads of a fold have learned from images of their
    own, so that folds differ by that, too (Davison & Hinkley 1997, "Bootstrap Methods and their Application", 3.8).
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


def foretell(headline: Headline, points: Sequence[Point], drawn: Float64, blocks: int) -> tuple[Law, Twice]:
    """Return the law through the points, and what it says of twice the images.

    Its interval is that of laws through other points: each is moved as the draw of test images moves it, and by what
    the law leaves unexplained to one side or the other (the wild bootstrap, Wu 1986, "Jackknife, Bootstrap and Other
    Resampling Methods in Regression Analysis"), since images drawn anew would be learned from otherwise, too.

    Args:
        headline: the score.
        points: at least LEAST_POINTS.
        drawn: the points' scores on test images that are drawn anew, float64 [draws, P].
        blocks: how many images, or groups of them, there are to draw.
    """
    images = np.array([point.images for point in points], dtype=np.float64)
    ends = np.array([images[-1], 2 * images[-1]])
    errors = _flipped(headline, np.array([point.score for point in points]))
    law = power_law.fit_power_law(images, errors)
    misfits = errors - law.error(images)
    free = np.sqrt(len(points) / (len(points) - (LEAST_POINTS - 1)))  # they are smaller than what was there before
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=drawn.shape)
    moved = law.error(images) + signs * misfits * free + _flipped(headline, drawn) - errors
    foretold = _flipped(headline, power_law.fit_power_law(images, np.maximum(moved, 0.0)).error(ends))  # [draws, 2]
    now, then = _flipped(headline, law.error(ends)).tolist()
    return (
        Law(
            floor=float(law.floor),
            scale=float(law.scale),
            exponent=float(law.exponent),
            misfit=float(np.sqrt(np.square(misfits).mean())),
        ),
        Twice(
            images=round(ends[1]),
            score=then,
            ci95=resampling.bootstrap_interval(foretold[:, 1], blocks),
            change=then - now,
            change_ci95=resampling.bootstrap_interval(foretold[:, 1] - foretold[:, 0], blocks),
        ),
    )


def _flipped(headline: Headline, values: Float64) -> Float64:
    """Return errors for scores, and scores for errors: the same where the score is an error, else what lacks to one."""
    return 1.0 - values if headline.is_greater_better else values


# --- for a person ----------------------------------------------------------------------------------------------------


def said(headline: Headline, points: Sequence[Point], twice: Twice | None) -> str:
    """Return in one sentence what more images would bring."""
    if twice is None:
        return (
            "There are too few images to say what more of them would bring: their parts come to "
            f"{len(points)} different numbers of images, where a law needs {LEAST_POINTS}."
        )
    gain = abs(twice.change)
    low, high = sorted(map(abs, twice.change_ci95))
    margin = MARGIN if headline.is_greater_better else RELATIVE_MARGIN * points[-1].score
    title = headline.title[0].lower() + headline.title[1:]
    if headline.form.endswith("%"):
        much = f"about +{100 * gain:.1f} points of {title} [{100 * low:.1f}, {100 * high:.1f}]"
    elif headline.is_greater_better:
        much = f"about +{headline.said(gain)} of {title} [{headline.said(low)}, {headline.said(high)}]"
    else:
        much = f"the {title} down by about {headline.said(gain)} [{headline.said(low)}, {headline.said(high)}]"
    if high < margin:
        return f"The curve is flat: twice the images would bring {much}."
    return f"Twice the images would bring {much}{', so it may be nothing' if low < margin / 10 else ''}."


def _picture(headline: Headline, points: Sequence[Point], law: Law | None, twice: Twice | None, sentence: str) -> bytes:
    """Return the points with their intervals over the number of images as a PNG, the law through them and beyond."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    images = [point.images for point in points]
    _bars(axes, images, [point.score for point in points], [point.ci95 for point in points], "C0", "measured")
    if law is not None and twice is not None:
        along = np.geomspace(images[0], twice.images, 100)
        found = PowerLaw(np.array(law.floor), np.array(law.scale), np.array(law.exponent)).error(along)
        axes.plot(along, _flipped(headline, found), "--", color="C0", alpha=0.6, label="power law")
        _bars(axes, [twice.images], [twice.score], [twice.ci95], "C1", "foretold")
        images.append(twice.images)
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{count:,}" for count in images])
    axes.minorticks_off()
    axes.set_xlabel("images to learn from")
    axes.set_ylabel(f"{headline.title}, 95 % interval")
    axes.set_title(textwrap.fill(sentence, 70), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    return png(figure)


def _bars(
    axes: Any, images: list[int], scores: list[float], bounds: list[tuple[float, float]], colour: str, label: str
) -> None:
    """Draw points with their intervals, which need not have them in the middle."""
    axes.vlines(images, [low for low, _ in bounds], [high for _, high in bounds], color=colour, linewidth=2)
    axes.plot(images, scores, "o", color=colour, label=label)
