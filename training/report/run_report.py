"""What a person reads of a run: the report and its pictures. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from artifacts.bundle import Float32
from artifacts.run_files import RunFile
from recipes import shapes
from recipes.catalogue import ALL, CATALOGUE
from recipes.filled import BackboneRecipe, DecidedRecipe, FineTuningRecipe, FromScratchRecipe
from recipes.headline import HEADLINES
from recipes.layers import NetworkKind, sides
from recipes.recipe import ClassWeights, Mode, Precision, Task
from training.bake_off import FOLDS, BakeOffResult
from training.data.targets import Truth
from training.figures import png
from training.fitting.learners import DIVERGED, NETWORK, Plan
from training.networks.precision import MARGIN, RELATIVE_MARGIN, PrecisionDecision
from training.progress import Epoch, Extraction, FoldResult

_CLASSES_WITH_NUMBERS = 25
_LABELS_SHOWN = 60


@dataclass(frozen=True)
class Description:
    """A finished run, as its report needs it; `truth` and `logits` (out of fold) are of the images that were folded."""

    recipe: DecidedRecipe
    task: Task
    labels: Sequence[str]
    images: int
    truth: Truth
    logits: Float32
    metrics: dict[str, Any]
    folds: Sequence[FoldResult]
    plan: Plan
    extraction: Extraction
    precision: Precision
    choice: PrecisionDecision | None
    pick: BakeOffResult | None
    notes: Sequence[str]


def verdict(task: Task, metrics: dict[str, Any]) -> str:
    """Return the score in one sentence, and for labels and numbers what else is usual in another."""
    headline = HEADLINES[task]
    spread = headline.said(metrics[f"{headline.metric}_sd"])
    sentence = (
        f"{headline.sentence(metrics)}, measured on images that the network had not seen; folds differ by {spread} "
        "(standard deviation)."
    )
    if task is Task.MULTILABEL:
        sentence += f" Micro F1 {metrics['f1_micro']:.3f}; all labels are right in {metrics['accuracy']:.1%} of images."
    if task is Task.REGRESSION:
        sentence += f" Mean absolute error {metrics['mae']:.4g}; R² {metrics['r2']:.3f}."
    return sentence


def report(run: Description) -> str:
    """Return the report of a run as Markdown."""
    recipe, metrics = run.recipe, run.metrics
    lines = [
        f"# {_title(recipe)}, {recipe.mode.value}",
        "",
        verdict(run.task, metrics),
        "",
        *(_grown(run, recipe) if isinstance(recipe, FromScratchRecipe) else _features(run, recipe)),
        f"- Folds: {recipe.folds.k}, stratified and grouped, {recipe.folds.repeats} time(s); the final "
        f"{'network' if recipe.mode is Mode.FROM_SCRATCH else 'head'} was trained on all images for "
        f"{run.plan.head or run.plan.network} epochs, the median of the folds' best.",
        f"- Interval: {metrics['interval']}.",
        *_tuning(run),
        *_precision(run),
        *(f"- {note}" for note in run.notes),
        f"- {overfitting(run.folds, recipe)}",
    ]
    headline = HEADLINES[run.task]
    if "test" in metrics:
        test = metrics["test"]
        has_interval = f"{headline.metric}_ci95" in test
        said = headline.sentence(test) if has_interval else f"{headline.title} {headline.said(test[headline.metric])}"
        lines.append(f"- Test split: {said} on {test['images']:,} images that no fold and no fit has seen.")
    lines += [
        "",
        "## Folds",
        "",
        f"| fold | {headline.title} | loss | epochs | best epoch | ended by |",
        "|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {fold.number + 1} | {headline.said(fold.metrics[headline.metric])} | {fold.metrics['loss']:.4g} "
        f"| {fold.epochs} | {fold.best_epoch} | {fold.stopped} |"
        for fold in run.folds
    ]
    lines += _picked(run)
    if run.labels:
        lines += ["", "## Classes", "", "| class | images | precision | recall | F1 |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row['label']} | {row['images']:,} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |"
        for row in sorted(metrics.get("per_class", []), key=lambda row: row["f1"])
    ]
    confused = _confused(run) if "confusion" in metrics else []
    if confused:
        lines += ["", "## Confused most often", "", "| truth | answer | images |", "|---|---|--:|"]
        lines += [f"| {truth} | {answer} | {count:,} |" for count, truth, answer in confused]
    return "\n".join(lines) + "\n"


def _picked(run: Description) -> list[str]:
    """Return what was tried for the cut that features come from, as lines of the report."""
    if run.pick is None:
        return []
    headline = HEADLINES[run.task]
    chosen = run.pick.chosen
    return [
        "",
        "## Where features come from",
        "",
        f"`{chosen.features_from}` of {CATALOGUE[chosen.backbone].title} was chosen by trying, on {run.pick.images:,} "
        f"images in {FOLDS} folds of their own; the score above was measured afterwards, on the folds of the run. The "
        "images that were tried on are among those of the run, so that the choice has seen their labels.",
        "",
        f"| backbone | features from | width | {headline.title} |",
        "|---|---|--:|--:|",
        *(
            f"| {CATALOGUE[one.backbone].title} | `{one.features_from}` | {one.width} "
            f"| {'did not learn' if one.score is None else headline.said(one.score)} |"
            for one in run.pick.tried
        ),
    ]


def _title(recipe: DecidedRecipe) -> str:
    """Return what the network is called."""
    if isinstance(recipe, FromScratchRecipe):
        return _KINDS[recipe.network.kind]
    return CATALOGUE[recipe.backbone].title


_KINDS = {NetworkKind.PERCEPTRON: "Perceptron", NetworkKind.MLP: "Multilayer perceptron", NetworkKind.CNN: "CNN"}


def _features(run: Description, recipe: BackboneRecipe) -> list[str]:
    """Return what heads learned on, as lines of the report."""
    return [
        f"- Images: {run.images:,}{_learned(run)}; {run.extraction.computed:,} went through the backbone, "
        f"{run.extraction.cached:,} were cached{_in_all_precisions(run)}.",
        f"- Features: {CATALOGUE[recipe.backbone].title} ({recipe.weights}) up to `{recipe.features_from}` at "
        f"{recipe.image_size} px, {run.precision.value}, resized by `{recipe.resize.value}`.",
    ]


def _grown(run: Description, recipe: FromScratchRecipe) -> list[str]:
    """Return what a network from scratch is and saw, as lines of the report."""
    network = recipe.network
    rows = shapes.table(network, *sides(recipe.image_size))
    outputs = run.logits.shape[-1]
    parameters = sum(row.parameters for row in rows) + (rows[-1].shape[0] + 1) * outputs
    return [
        f"- Images: {run.images:,}{_learned(run)}, at {shapes.written(sides(recipe.image_size))} px "
        f"{'in colours' if network.channels == 3 else 'by their brightness'}, resized by `{recipe.resize.value}`.",
        f"- Network: {parameters:,} parameters, none of them pretrained"
        f"{'; it learned by the delta rule' if network.kind is NetworkKind.PERCEPTRON else ''}: "
        + " → ".join(f"{row.type} {shapes.written(row.shape)}" for row in rows)
        + f" → output {outputs}. It is served in {run.precision.value}.",
    ]


def _in_all_precisions(run: Description) -> str:
    if run.choice is None or run.recipe.mode is Mode.FINE_TUNING:
        return ""
    return f", those of {len(run.choice.scores)} precisions together"


def _learned(run: Description) -> str:
    """Return what the images are labelled with."""
    if run.task is Task.REGRESSION:
        return f" with numbers from {run.truth.min():.4g} to {run.truth.max():.4g}"
    return f" in {len(run.labels)} classes" if run.task is not Task.MULTILABEL else f" with {len(run.labels)} labels"


def _tuning(run: Description) -> list[str]:
    """Return what fine-tuning did, as lines of the report."""
    recipe = run.recipe
    if not isinstance(recipe, FineTuningRecipe):
        return []
    lines = [
        f"- Fine-tuning: {'all layers' if recipe.unfreeze == ALL else f'layers from `{recipe.unfreeze}` on'}, learning "
        f"rate {recipe.fine_tune.learning_rate:g}, after the head had learned alone; {outcome(run.folds)}."
    ]
    if run.plan.network:
        export = run.metrics["export"]
        otherwise = export["answered_otherwise"]
        lines.append(
            f"- The network learned on all images for {run.plan.network} epochs. As it is exported in float32, on "
            f"{export['images']} images of this data set its features differ from Keras' by at most "
            f"{export['largest_relative_difference']:.1g} of the largest, and its answers from those of the network "
            f"that learned by at most {export['largest_difference_of_an_answer']:.2g}"
            f"{'' if run.task is Task.REGRESSION else f'; {otherwise} are another label'}."
        )
    else:
        lines.append("- The frozen network is what is served, since fine-tuning did not help most folds.")
    return lines


def outcome(folds: Sequence[FoldResult]) -> str:
    """Return how the network that learned did against the frozen one, in the folds of a fine-tuning."""
    phases = [fold.metrics["phases"] for fold in folds]
    diverged = sum(network["stopped"] == DIVERGED for _, network in phases)
    is_watched = [head["validation"] is not None for head, _ in phases]
    better = sum(watched and fold.metrics["kept"] == NETWORK for watched, fold in zip(is_watched, folds, strict=True))
    said = []
    if any(is_watched):
        said.append(f"it validated at least as well as the frozen network in {better} of {sum(is_watched)} folds")
    if not all(is_watched):
        said.append(
            f"in {len(folds) - sum(is_watched)} of {len(folds)} folds nothing was watched that could have told whether "
            "it became better"
        )
    if diverged:
        said.append(
            f"in {diverged} of {len(folds)} folds its loss was no number any more, and the frozen network was kept: "
            "lower `fine_tune.learning_rate`"
        )
    return "; ".join(said)


def _precision(run: Description) -> list[str]:
    """Return which precisions were tried, and why the one that answers was chosen, as lines of the report."""
    if run.choice is None:
        return []
    headline = HEADLINES[run.task]
    tried = "; ".join(
        f"{one.precision.value} {headline.said(one.score)} at {one.image_ms:.1f} ms an image"
        for one in run.choice.scores
    )
    if headline.is_greater_better:
        bound = f"at most {headline.said(MARGIN)} below that of float32"
    else:
        bound = f"at most {RELATIVE_MARGIN:.0%} above that of float32"
    wanted = run.recipe.precision
    if not isinstance(wanted, Precision):
        why = f"`{run.precision.value}` answers: the fastest on this machine whose {headline.title.lower()} is {bound}"
    elif wanted is run.precision:
        why = f"`{run.precision.value}` answers as asked: its {headline.title.lower()} is {bound}"
    else:
        why = f"`{run.precision.value}` answers, not `{wanted.value}`, whose {headline.title.lower()} is not {bound}"
    return [f"- Precision: {why}. Tried: {tried} (backbone alone, measured out of fold)."]


# Below this share of its least value, a rise of the validation loss is noise.
_RISE = 0.02


def overfitting(folds: Sequence[FoldResult], recipe: DecidedRecipe) -> str:
    """Return in one sentence whether the folds went on to learn their training images by heart."""
    watched = [fold for fold in folds if fold.history and "val_loss" in fold.history[0]]
    if not watched:
        return "Nothing watched the folds while they learned, so overfitting could not be seen."
    rising = [fold for fold in watched if _rises(fold.history)]
    # Losses whose classes are weighed are of another scale.
    gaps = [fold.metrics["gap"] for fold in watched] if recipe.class_weights is ClassWeights.NONE else []
    gap = f"; at the best epochs validation loss was {np.median(gaps):.3f} above training loss (median)" if gaps else ""
    if not rising:
        return f"No fold overfitted: validation loss did not rise while training loss fell{gap}."
    least = [_least(fold.history) + 1 for fold in rising]
    when = f"epoch {min(least)}" if min(least) == max(least) else f"epochs {min(least)} to {max(least)}"
    later = sum(fold.best_epoch > epoch for fold, epoch in zip(rising, least, strict=True))
    if not later:
        kept = "what was learned after that was dropped"
    elif recipe.early_stopping is None:
        kept = f"{later} of them kept what was learned after that, since early stopping is off"
    else:
        kept = f"{later} of them kept a later epoch, as `early_stopping` asks for"
    return (
        f"Validation loss rose from {when} on while training loss fell, in {len(rising)} of {len(watched)} folds, and "
        f"{kept}{gap}."
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
    """Return PNGs by file name: the curves, and what a person looks at first for the run's task."""
    match run.task:
        case Task.REGRESSION:
            first = {RunFile.VALUES: _values(run)}
        case Task.MULTILABEL:
            first = {RunFile.LABELS: _labels(run)}
        case _:
            first = {RunFile.CONFUSION: _confusion(run)}
    return first | {RunFile.CURVES: _curves(run)}


def _values(run: Description) -> bytes:
    """Return the predicted numbers over the true ones."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    truth, guesses = run.truth[:, 0], run.logits[:, 0]
    axes.plot(truth, guesses, ".", alpha=min(1.0, max(0.05, 300 / len(truth))))
    ends = [min(truth.min(), guesses.min()), max(truth.max(), guesses.max())]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_xlabel("truth")
    axes.set_ylabel("prediction, out of fold")
    axes.set_title(f"root mean squared error {run.metrics['rmse']:.4g}, R² {run.metrics['r2']:.3f}")
    return png(figure)


def _labels(run: Description) -> bytes:
    """Return a bar of F1 for each label, the worst at the bottom, with its precision and recall."""
    rows = sorted(run.metrics["per_class"], key=lambda row: row["f1"])[:_LABELS_SHOWN]
    figure = Figure(figsize=(7, min(20.0, 1.5 + 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["f1"] for row in rows], color="lightsteelblue", label="F1")
    axes.plot([row["precision"] for row in rows], places, ">", label="precision")
    axes.plot([row["recall"] for row in rows], places, "o", fillstyle="none", label="recall")
    axes.set_yticks(places, [f"{row['label']} ({row['images']:,})" for row in rows], parse_math=False)
    axes.set_xlim(0, 1.02)
    axes.set_title(f"macro F1 {run.metrics['f1_macro']:.3f}")
    axes.legend(fontsize=8, loc="lower right")
    return png(figure)


def _confusion(run: Description) -> bytes:
    """Return the confusion matrix; colours are shares of each true class."""
    counts = np.array(run.metrics["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(run.labels)
    side = min(12.0, max(4.0, 0.45 * classes + 2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(f"accuracy {run.metrics['accuracy']:.1%}")
    if classes <= _CLASSES_WITH_NUMBERS:
        # Not as formulas: a class may be called $5.
        axes.set_xticks(range(classes), run.labels, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), run.labels, parse_math=False)
        for truth in range(classes):
            for answer in range(classes):
                colour = "white" if shares[truth, answer] > 0.5 else "black"
                axes.text(answer, truth, str(counts[truth, answer]), ha="center", va="center", color=colour, size=8)
    return png(figure)


def _curves(run: Description) -> bytes:
    """Return loss and, if there is one, accuracy over the epochs of every fold, best epochs marked."""
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
            if "phases" in fold.metrics:  # where the network began to learn as well
                axes.axvline(fold.metrics["phases"][0]["epochs"] + 0.5, color=colour, alpha=0.35, linestyle=":")
        axes.set_xlabel("epoch")
        axes.set_title(f"{name}: training (pale) and validation")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=8)
    return png(figure)
