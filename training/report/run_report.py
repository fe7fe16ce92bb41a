"""Writes the report of a run: its text as Markdown, and its pictures. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from artifacts.bundle import Logits
from artifacts.markdown import escaped
from artifacts.run_files import RunFile
from recipes import shapes
from recipes.catalogue import ALL, CATALOGUE
from recipes.filled import BackboneRecipe, DecidedRecipe, FineTuningRecipe, FromScratchRecipe
from recipes.headline import HEADLINES, written_numbers
from recipes.layers import NetworkKind, sides
from recipes.recipe import ClassWeights, Mode, Precision, Task
from training.bake_off import FOLDS, BakeOffResult
from training.data.targets import Float64, Truth
from training.figures import drawn_names, png, shortened
from training.fitting.learners import DIVERGED, NETWORK, Plan
from training.networks.precision import MARGIN, RELATIVE_MARGIN, PrecisionDecision
from training.progress import Epoch, Extraction, FoldResult

_CLASSES_WITH_NUMBERS = 25
_LABELS_SHOWN = 60


@dataclass(frozen=True)
class Description:
    """The input of a report. `truth` and the out-of-fold `logits` have a row for each image that was in folds."""

    recipe: DecidedRecipe
    task: Task
    labels: Sequence[str]
    images: int
    truth: Truth
    logits: Logits
    metrics: dict[str, Any]
    folds: Sequence[FoldResult]
    plan: Plan
    extraction: Extraction
    precision: Precision
    choice: PrecisionDecision | None
    pick: BakeOffResult | None
    notes: Sequence[str]


def verdict(task: Task, metrics: dict[str, Any]) -> str:
    """Return the headline score in a sentence. For multilabel and regression, further scores follow in another one."""
    headline = HEADLINES[task]
    spread = headline.formatted(metrics[f"{headline.metric}_sd"])
    sentence = (
        f"{headline.sentence(metrics)}, measured on images that the network had not seen. The standard deviation "
        f"between folds is {spread}."
    )
    if task is Task.MULTILABEL:
        sentence += (
            f" Micro F1 is {metrics['f1_micro']:.3f}. All labels are right in {metrics['accuracy']:.1%} of the images."
        )
    if task is Task.REGRESSION:
        sentence += f" Mean absolute error is {metrics['mae']:.4g} and R² is {written_r2(metrics['r2'])}."
    return sentence


def written_r2(value: float) -> str:
    """Return R² as text: three digits after the point, unless it is so far below 0 that nobody needs them."""
    return f"{value:.3f}" if value > -100 else f"{value:.3g}"


def failure(metrics: Mapping[str, Any]) -> str:
    """Return the sentence on a model that is no better than a constant answer, or an empty text."""
    found = metrics["baseline"]
    if found["is_better"]:
        return ""
    if "r2" in found:
        why = f"always answering the mean of the numbers has an R² of 0, and the model has {written_r2(found['r2'])}."
    else:
        why = (
            f"compared with always answering the shares of the classes or labels, {_differences(found)}. Neither "
            "interval shows the model to be better."
        )
    return (
        f"**This model is no better than a constant answer that ignores the image:** {why} It does not become "
        "`champion` by itself; to predict with it all the same, name its version."
    )


def _differences(found: Mapping[str, Any]) -> str:
    """Return how the log-loss and the balanced accuracy differ from those of the constant answer, with intervals."""
    low, high = found["loss_difference_ci95"]
    least, most = found["balanced_accuracy_difference_ci95"]
    return (
        f"the log-loss (less is better) differs by {found['loss_difference']:+.3f} (95 % interval {low:+.3f} to "
        f"{high:+.3f}) and the balanced accuracy (the mean over the classes of the share that is right; more is "
        f"better) by {100 * found['balanced_accuracy_difference']:+.1f} points (95 % interval {100 * least:+.1f} to "
        f"{100 * most:+.1f})"
    )


def _number_lines(run: Description) -> list[str]:
    """Return the line on classes that pictures show as numbers, or none."""
    labels = run.labels
    if run.task is not Task.MULTILABEL and len(labels) > _CLASSES_WITH_NUMBERS:
        return []  # the confusion matrix names no class then
    shown = drawn_names(labels).names
    numbered = [f"{number} {escaped(label)}" for number, label in zip(shown, labels, strict=True) if number != label]
    if not numbered:
        return []
    return [
        f"- Pictures show numbers instead of names for some classes: {', '.join(numbered)}. Neither Espalier nor the "
        "worker's machine has a font with all their letters. After such a font is installed, such as one of Debian's "
        "`fonts-noto-core`, new pictures show the names."
    ]


def _baseline_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the line on a model of classes or labels that is better than the constant answer."""
    found = metrics["baseline"]
    if not found["is_better"] or "r2" in found:
        return []
    return [
        f"- Compared with a constant answer, {_differences(found)}. Balanced accuracy is "
        f"{100 * found['balanced_accuracy']:.1f} %."
    ]


def undertrained(folds: Sequence[FoldResult], recipe: DecidedRecipe) -> str:
    """Return the sentence on folds that all trained to their last epoch, so that more epochs may help; else no text."""
    watched = [fold for fold in folds if fold.history and "val_loss" in fold.history[0]]
    falling = sum(_least(fold.history) + 1 == len(fold.history) for fold in watched)
    is_early = recipe.early_stopping is not None and any(fold.stopped != "epochs" for fold in folds)
    if not watched or is_early or (recipe.early_stopping is None and falling < len(watched)):
        return ""
    field = "`epochs` or `fine_tune.epochs`" if recipe.mode is Mode.FINE_TUNING else "`epochs`"
    return (
        f"**All {len(folds)} folds stopped at their last epoch:** the validation loss was still falling in {falling} "
        f"of them, so the training may be too short. Raise {field}."
    )


def report(run: Description) -> str:
    """Return the report of a run as Markdown."""
    recipe, metrics = run.recipe, run.metrics
    lines = [
        f"# {_title(recipe)}, {recipe.mode.value}",
        "",
        " ".join(filter(None, [failure(metrics), verdict(run.task, metrics), undertrained(run.folds, recipe)])),
        "",
        *(_scratch_lines(run, recipe) if isinstance(recipe, FromScratchRecipe) else _feature_lines(run, recipe)),
        f"- Folds: {recipe.folds.k}, stratified and grouped{_repeats(recipe.folds.repeats)}. The final "
        f"{'network' if recipe.mode is Mode.FROM_SCRATCH else 'head'} was trained on all images for "
        f"{run.plan.head or run.plan.network} epochs, the median of the best epochs of the folds.",
        f"- Interval: {metrics['interval']}.",
        *_fine_tuning_lines(run),
        *_precision_lines(run),
        *(f"- {note}" for note in run.notes),
        *_number_lines(run),
        *_baseline_lines(metrics),
        f"- {overfitting(run.folds, recipe, is_bad=bool(failure(metrics)))}",
    ]
    headline = HEADLINES[run.task]
    if "test" in metrics:
        test = metrics["test"]
        has_interval = f"{headline.metric}_ci95" in test
        score = (
            headline.sentence(test) if has_interval else f"{headline.title} {headline.formatted(test[headline.metric])}"
        )
        lines.append(
            f"- Test split: {score} on {test['images']:,} images that were never used for training or early stopping."
        )
    lines += [
        "",
        "## Folds",
        "",
        f"| fold | {headline.title} | loss | epochs | best epoch | stopped by |",
        "|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {fold.number + 1} | {headline.formatted(fold.metrics[headline.metric])} | {fold.metrics['loss']:.4g} "
        f"| {fold.epochs} | {fold.best_epoch} | {fold.stopped} |"
        for fold in run.folds
    ]
    lines += _bake_off_lines(run)
    if run.labels:
        lines += ["", "## Classes", "", "| class | images | precision | recall | F1 |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {escaped(row['label'])} | {row['images']:,} | {row['precision']:.3f} | {row['recall']:.3f} "
        f"| {row['f1']:.3f} |"
        for row in sorted(metrics.get("per_class", []), key=lambda row: row["f1"])
    ]
    confused = _confused(run) if "confusion" in metrics else []
    if confused:
        lines += ["", "## Most frequent confusions", "", "| true class | predicted class | images |", "|---|---|--:|"]
        lines += [f"| {escaped(truth)} | {escaped(answer)} | {count:,} |" for count, truth, answer in confused]
    return "\n".join(lines) + "\n"


def _repeats(count: int) -> str:
    return f", repeated {count} times" if count > 1 else ""


def _bake_off_lines(run: Description) -> list[str]:
    """Return the section on the bake-off, or no lines if there was none."""
    if run.pick is None:
        return []
    headline = HEADLINES[run.task]
    chosen = run.pick.chosen
    return [
        "",
        "## Where features come from",
        "",
        f"`{chosen.features_from}` of {CATALOGUE[chosen.backbone].title} was chosen by a bake-off on "
        f"{run.pick.images:,} images, which were split into {FOLDS} folds only for this choice. The score above was "
        "measured afterwards, on the folds of the run. The images of the bake-off are also images of the run, so the "
        "choice depends on some of the labels "
        "that the score is measured on, and the score may be slightly too good.",
        "",
        f"| backbone | features from | width | {headline.title} |",
        "|---|---|--:|--:|",
        *(
            f"| {CATALOGUE[one.backbone].title} | `{one.features_from}` | {one.width} "
            f"| {'diverged' if one.score is None else headline.formatted(one.score)} |"
            for one in run.pick.tried
        ),
    ]


def _title(recipe: DecidedRecipe) -> str:
    """Return the name of the network for the heading."""
    if isinstance(recipe, FromScratchRecipe):
        return _KINDS[recipe.network.kind]
    return CATALOGUE[recipe.backbone].title


_KINDS = {NetworkKind.PERCEPTRON: "Perceptron", NetworkKind.MLP: "Multilayer perceptron", NetworkKind.CNN: "CNN"}


def _feature_lines(run: Description, recipe: BackboneRecipe) -> list[str]:
    """Return the lines on the images, and on the features on which heads were trained."""
    return [
        f"- Images: {run.images:,}{_learned(run)}. The backbone computed the features of "
        f"{run.extraction.computed:,}, and {run.extraction.cached:,} came from the cache{_in_all_precisions(run)}.",
        f"- Features: {CATALOGUE[recipe.backbone].title} ({recipe.weights}) up to `{recipe.features_from}` at "
        f"{recipe.image_size} px, {run.precision.value}, resized by `{recipe.resize.value}`.",
    ]


def _scratch_lines(run: Description, recipe: FromScratchRecipe) -> list[str]:
    """Return the lines on the images and the layers of a network from scratch."""
    network = recipe.network
    rows = shapes.table(network, *sides(recipe.image_size))
    outputs = run.logits.shape[-1]
    parameters = sum(row.parameters for row in rows) + (rows[-1].shape[0] + 1) * outputs
    return [
        f"- Images: {run.images:,}{_learned(run)}, at {shapes.written(sides(recipe.image_size))} px "
        f"{'in colour' if network.channels == 3 else 'in greyscale'}, resized by `{recipe.resize.value}`.",
        f"- Network: {parameters:,} parameters, none of them pretrained"
        f"{', trained by the delta rule' if network.kind is NetworkKind.PERCEPTRON else ''}: "
        + " → ".join(f"{row.type} {shapes.written(row.shape)}" for row in rows)
        + f" → output {outputs}. Predictions run in {run.precision.value}.",
    ]


def _in_all_precisions(run: Description) -> str:
    if run.choice is None or run.recipe.mode is Mode.FINE_TUNING:
        return ""
    return f" (all {len(run.choice.scores)} precisions counted together)"


def _learned(run: Description) -> str:
    """Return the number of classes or labels, or the range of the targets."""
    if run.task is Task.REGRESSION:
        low, high = written_numbers(float(run.truth.min()), float(run.truth.max()))
        return f" with numbers from {low} to {high}"
    return f" in {len(run.labels)} classes" if run.task is not Task.MULTILABEL else f" with {len(run.labels)} labels"


def _fine_tuning_lines(run: Description) -> list[str]:
    """Return the lines on fine-tuning; an empty list for another mode."""
    recipe = run.recipe
    if not isinstance(recipe, FineTuningRecipe):
        return []
    lines = [
        f"- Fine-tuning: {'all layers' if recipe.unfreeze == ALL else f'layers from `{recipe.unfreeze}` on'} "
        f"were trained with learning rate {recipe.fine_tune.learning_rate:g}, after the head alone. "
        f"{fine_tuning_outcome(run.folds)}"
    ]
    if run.plan.network:
        export = run.metrics["export"]
        otherwise = export["answered_otherwise"]
        lines.append(
            f"- The final network was trained on all images for {run.plan.network} epochs. It was exported in "
            f"float32 and compared with Keras on {export['images']} images: features differ by at most "
            f"{export['largest_relative_difference']:.1g} of the largest feature, and predictions by at most "
            f"{export['largest_difference_of_an_answer']:.2g}"
            f"{'' if run.task is Task.REGRESSION else f'. {otherwise} of the predicted labels differ'}."
        )
    else:
        lines.append("- The model uses the frozen network, since fine-tuning did not help in most folds.")
    return lines


def fine_tuning_outcome(folds: Sequence[FoldResult]) -> str:
    """Return sentences that compare the fine-tuned network with the frozen one over the folds."""
    phases = [fold.metrics["phases"] for fold in folds]
    diverged = sum(network["stopped"] == DIVERGED for _, network in phases)
    is_watched = [head["validation"] is not None for head, _ in phases]
    better = sum(watched and fold.metrics["kept"] == NETWORK for watched, fold in zip(is_watched, folds, strict=True))
    sentences = []
    if any(is_watched):
        sentences.append(
            f"The validation score was at least as good as that of the frozen network in {better} of {sum(is_watched)} "
            "folds."
        )
    if not all(is_watched):
        sentences.append(
            f"In {len(folds) - sum(is_watched)} of {len(folds)} folds there were no validation images to compare the "
            "two on."
        )
    if diverged:
        sentences.append(
            f"In {diverged} of {len(folds)} folds training diverged and the frozen network was kept. Lower "
            "`fine_tune.learning_rate`."
        )
    return " ".join(sentences)


def _precision_lines(run: Description) -> list[str]:
    """Return the line on the comparison of precisions; an empty list if only one precision was possible."""
    if run.choice is None:
        return []
    headline = HEADLINES[run.task]
    tried = "; ".join(
        f"{one.precision.value} {headline.formatted(one.score)} at {one.image_ms:.1f} ms per image"
        for one in run.choice.scores
    )
    if headline.is_greater_better:
        bound = f"at most {headline.formatted(MARGIN)} below that of float32"
    else:
        bound = f"at most {RELATIVE_MARGIN:.0%} above that of float32"
    wanted = run.recipe.precision
    if not isinstance(wanted, Precision):
        why = f"`{run.precision.value}` is used: the fastest on this machine with a {headline.title.lower()} {bound}"
    elif wanted is run.precision:
        why = f"`{run.precision.value}` is used as requested, since its {headline.title.lower()} is {bound}"
    else:
        score = headline.title.lower()
        why = f"`{run.precision.value}` is used instead of `{wanted.value}`, whose {score} is not {bound}"
    return [f"- Precision: {why}. Compared: {tried} (scores out of fold, times of the backbone alone)."]


# A rise of the validation loss by less than this share of its minimum counts as noise.
_RISE = 0.02


def overfitting(folds: Sequence[FoldResult], recipe: DecidedRecipe, *, is_bad: bool = False) -> str:
    """Return one or two sentences that say whether the folds overfitted.

    For a bad model they do not say that no fold did, because that would read as praise.
    """
    watched = [fold for fold in folds if fold.history and "val_loss" in fold.history[0]]
    if not watched:
        return "The folds had no validation images, so overfitting could not be detected."
    rising = [fold for fold in watched if _rises(fold.history)]
    # With class weights, training and validation loss have different scales.
    gaps = [fold.metrics["gap"] for fold in watched] if recipe.class_weights is ClassWeights.NONE else []
    gap = (
        f" At the best epochs, the validation loss minus the training loss was {np.median(gaps):.3f} (median of the "
        "folds)."
        if gaps
        else ""
    )
    if not rising:
        what = "Overfitting is not the reason" if is_bad else "No fold overfitted"
        return f"{what}: validation loss did not rise while training loss fell.{gap}"
    least = [_least(fold.history) + 1 for fold in rising]
    when = f"epoch {min(least)}" if min(least) == max(least) else f"epochs {min(least)} to {max(least)}"
    later = sum(fold.best_epoch > epoch for fold, epoch in zip(rising, least, strict=True))
    if not later:
        kept = "The later epochs were discarded."
    elif recipe.early_stopping is None:
        kept = f"{later} of them kept the weights of a later epoch, since early stopping is off."
    else:
        kept = f"{later} of them kept the weights of a later epoch, as `early_stopping` requires."
    return (
        f"{len(rising)} of {len(watched)} folds overfitted: validation loss rose from {when} on while training "
        f"loss fell. {kept}{gap}"
    )


def _least(history: Sequence[Epoch]) -> int:
    """Return the epoch of the least validation loss, counted from 0."""
    return int(np.argmin([epoch["val_loss"] for epoch in history]))


def _rises(history: Sequence[Epoch]) -> bool:
    best, last = history[_least(history)], history[-1]
    return last["val_loss"] > best["val_loss"] * (1 + _RISE) and last["loss"] < best["loss"]


def _confused(run: Description, most: int = 10) -> list[tuple[int, str, str]]:
    counts = [
        (count, run.labels[truth], run.labels[answer])
        for truth, row in enumerate(run.metrics["confusion"])
        for answer, count in enumerate(row)
        if truth != answer and count
    ]
    return sorted(counts, key=lambda item: (-item[0], item[1], item[2]))[:most]


def pictures(run: Description) -> dict[RunFile, bytes]:
    """Return PNGs by file name: the training curves, and a plot of the predictions that depends on the task."""
    match run.task:
        case Task.REGRESSION:
            first = {RunFile.VALUES: _values(run)}
        case Task.MULTILABEL:
            first = {RunFile.LABELS: _labels(run)}
        case _:
            first = {RunFile.CONFUSION: _confusion(run)}
    return first | {RunFile.CURVES: _curves(run)}


def _values(run: Description) -> bytes:
    """Return a PNG that plots the predicted numbers over the true numbers of a regression."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    truth, guesses = run.truth[:, 0], run.logits[:, 0]
    low, high = shown_range(np.concatenate([truth, guesses]))
    outside = (np.minimum(truth, guesses) < low) | (np.maximum(truth, guesses) > high)
    inside = ~outside
    axes.plot(truth[inside], guesses[inside], ".", alpha=min(1.0, max(0.05, 300 / len(truth))))
    axes.plot([low, high], [low, high], color="black", linewidth=1, label="a prediction without error")
    if outside.any():
        label = f"{outside.sum():,} outside the picture, drawn at its border"
        kept = truth[outside].clip(low, high), guesses[outside].clip(low, high)
        axes.plot(*kept, "x", color="C3", clip_on=False, label=label)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
    axes.set_xlabel("true value")
    axes.set_ylabel("predicted value, out of fold")
    axes.set_title(f"root mean squared error {run.metrics['rmse']:.4g}, R² {written_r2(run.metrics['r2'])}", pad=12)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return png(figure)


def shown_range(values: Float64) -> tuple[float, float]:
    """Return the range of numbers that a picture shows: all, unless a few far ones would squeeze the others.

    Far is more than three times the range of the middle half outside of it (Tukey 1977, "Exploratory Data Analysis").
    """
    least, low, high, most = np.quantile(values, [0, 0.25, 0.75, 1]).tolist()
    near = values[(values >= low - 3 * (high - low)) & (values <= high + 3 * (high - low))]
    start, end = float(near.min()), float(near.max())
    if end > start and most - least > 3 * (end - start):
        margin = 0.05 * (end - start)
        return start - margin, end + margin
    return least, most


def _labels(run: Description) -> bytes:
    """Return a PNG with a bar of F1 for each label, the worst at the bottom, and marks for precision and recall."""
    rows = sorted(run.metrics["per_class"], key=lambda row: row["f1"])[:_LABELS_SHOWN]
    figure = Figure(figsize=(7, min(20.0, 1.5 + 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["f1"] for row in rows], color="lightsteelblue", label="F1")
    axes.plot([row["precision"] for row in rows], places, ">", label="precision")
    axes.plot([row["recall"] for row in rows], places, "o", fillstyle="none", label="recall")
    drawn = drawn_names(run.labels)
    shown = dict(zip(run.labels, shortened(drawn.names), strict=True))
    axes.set_yticks(places, [f"{shown[row['label']]} ({row['images']:,})" for row in rows], parse_math=False)
    axes.set_ylabel("label (images that have it)")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.02)
    which = "" if len(rows) == len(run.labels) else f", the {len(rows)} of {len(run.labels):,} labels with the least F1"
    axes.set_title(f"macro F1 {run.metrics['f1_macro']:.3f}{which}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return png(figure, drawn.fonts)


def _confusion(run: Description) -> bytes:
    """Return a PNG of the confusion matrix. Colours show shares of the images of a true class; numbers count images."""
    counts = np.array(run.metrics["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn, classes = drawn_names(run.labels), len(run.labels)
    is_named = classes <= _CLASSES_WITH_NUMBERS
    names = shortened(drawn.names) if is_named else []
    side = min(12.0, max(4.0, 0.45 * classes + 2) + 0.07 * max(map(len, names), default=0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # Classes without names are numbered from 1.
    extent = None if is_named else (0.5, classes + 0.5, classes + 0.5, 0.5)
    colours = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=extent)
    numbered = "" if is_named else ", as a number in the order of the names"
    axes.set_xlabel(f"predicted class{numbered}")
    axes.set_ylabel(f"true class{numbered}")
    axes.set_title(f"accuracy {run.metrics['accuracy']:.1%}")
    figure.colorbar(colours, ax=axes, shrink=0.6, label="share of the images of the true class")
    if is_named:
        # Without `parse_math=False`, matplotlib would read a class name with $ as a formula.
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
        for truth in range(classes):
            for answer in range(classes):
                colour = "white" if shares[truth, answer] > 0.5 else "black"
                axes.text(answer, truth, str(counts[truth, answer]), ha="center", va="center", color=colour, size=8)
    return png(figure, drawn.fonts)


def _curves(run: Description) -> bytes:
    """Return a PNG of loss and, if the task has one, accuracy over the epochs of each fold. Dots mark best epochs."""
    names = [name for name in ("loss", "accuracy") if name in run.folds[0].history[0]]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for number, fold in enumerate(run.folds):
            epochs = range(1, len(fold.history) + 1)
            colour = f"C{number % 10}"
            axes.plot(epochs, [epoch[name] for epoch in fold.history], color=colour, alpha=0.35)
            if f"val_{name}" in fold.history[0]:
                watched = [epoch[f"val_{name}"] for epoch in fold.history]
                axes.plot(epochs, watched, color=colour, label=f"fold {fold.number + 1}")
                axes.plot(fold.best_epoch, watched[fold.best_epoch - 1], "o", color=colour)
            if "phases" in fold.metrics:  # a line marks the beginning of the second phase
                axes.axvline(fold.metrics["phases"][0]["epochs"] + 0.5, color=colour, alpha=0.35, linestyle=":")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        watched_too = any(f"val_{name}" in fold.history[0] for fold in run.folds)
        axes.set_title(f"{name}: training (pale) and validation" if watched_too else f"{name} of training")
    if panels[0].get_legend_handles_labels()[0]:
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
        figure.supxlabel("a dot marks the best epoch, whose weights are kept", fontsize=8)
    return png(figure)
