"""What a person reads of a run: the report and its pictures. Measures nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from artifacts.catalogue import CATALOGUE
from artifacts.manifest import Row
from artifacts.recipe import Mode, Recipe, Task
from training.extract import Extraction
from training.fit import Epoch
from training.learn import NETWORK, Plan

if TYPE_CHECKING:
    from training.experiment import FoldResult

_CLASSES_WITH_NUMBERS = 25


@dataclass(frozen=True)
class Description:
    """A finished run, as its report needs it."""

    recipe: Recipe
    task: Task
    labels: Sequence[str]
    rows: Sequence[Row]
    metrics: dict[str, Any]
    folds: Sequence[FoldResult]
    plan: Plan
    extraction: Extraction


def verdict(metrics: dict[str, Any]) -> str:
    """Return the score in one sentence."""
    low, high = metrics["accuracy_ci95"]
    interval = f"95 % interval {low:.1%} to {high:.1%} over images"
    if "groups" in metrics:
        low, high = metrics["accuracy_ci95_groups"]
        interval += f", {low:.1%} to {high:.1%} over the {metrics['groups']:,} groups of images that belong together"
    return (
        f"Accuracy {metrics['accuracy']:.1%} ({interval}), measured on images that the network had not seen; folds "
        f"differ by {metrics['accuracy_sd']:.1%} (standard deviation)."
    )


def report(run: Description) -> str:
    """Return the report of a run as Markdown."""
    recipe, metrics = run.recipe, run.metrics
    title = CATALOGUE[recipe.backbone].title
    lines = [
        f"# {title}, {recipe.mode.value}",
        "",
        verdict(metrics),
        "",
        f"- Images: {len(run.rows):,} in {len(run.labels)} classes; {run.extraction.computed:,} went through the "
        f"backbone, {run.extraction.cached:,} were cached.",
        f"- Features: {title} ({recipe.weights}) up to `{recipe.features_from}` at {recipe.image_size} px, "
        f"{recipe.precision.value}, resized by `{recipe.resize.value}`.",
        f"- Folds: {recipe.folds.k}, stratified and grouped, {recipe.folds.repeats} time(s); the final head was "
        f"trained on all images for {run.plan.head} epochs, the median of the folds' best.",
        f"- Interval: {metrics['interval']}.",
        *_tuning(run),
        f"- {overfitting(run.folds)}",
    ]
    if "test" in metrics:
        test = metrics["test"]
        low, high = test["accuracy_ci95"]
        lines.append(
            f"- Test split: accuracy {test['accuracy']:.1%} ({low:.1%} to {high:.1%}) on {test['images']:,} images "
            "that no fold and no fit has seen."
        )
    lines += [
        "",
        "## Folds",
        "",
        "| fold | accuracy | loss | epochs | best epoch | ended by |",
        "|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {fold.number + 1} | {fold.metrics['accuracy']:.3f} | {fold.metrics['loss']:.3f} | {fold.epochs} "
        f"| {fold.best_epoch} | {fold.stopped} |"
        for fold in run.folds
    ]
    lines += ["", "## Classes", "", "| class | images | precision | recall | F1 |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row['label']} | {row['images']:,} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |"
        for row in sorted(metrics["per_class"], key=lambda row: row["f1"])
    ]
    confused = _confused(run)
    if confused:
        lines += ["", "## Confused most often", "", "| truth | answer | images |", "|---|---|--:|"]
        lines += [f"| {truth} | {answer} | {count:,} |" for count, truth, answer in confused]
    return "\n".join(lines) + "\n"


def _tuning(run: Description) -> list[str]:
    """Return what fine-tuning did, as lines of the report."""
    recipe = run.recipe
    if recipe.mode is not Mode.FINE_TUNING or recipe.fine_tune is None:
        return []
    kept = sum(fold.metrics["kept"] == NETWORK for fold in run.folds)
    lines = [
        f"- Fine-tuning: layers from `{recipe.unfreeze}` on, learning rate {recipe.fine_tune.learning_rate:g}, after "
        f"the head had learned alone; it validated better than the frozen network in {kept} of {len(run.folds)} folds."
    ]
    if run.plan.network:
        difference = run.metrics["export"]["largest_relative_difference"]
        lines.append(
            f"- The network learned on all images for {run.plan.network} epochs; as it is served, its features differ "
            f"from Keras' by at most {difference:.1g} of the largest, on images of this data set."
        )
    else:
        lines.append("- The frozen network is what is served, since fine-tuning did not help most folds.")
    return lines


# Below this share of its least value, a rise of the validation loss is noise.
_RISE = 0.02


def overfitting(folds: Sequence[FoldResult]) -> str:
    """Return in one sentence whether the folds went on to learn their training images by heart."""
    watched = [fold for fold in folds if fold.history and "val_loss" in fold.history[0]]
    if not watched:
        return "Nothing watched the folds while they learned, so overfitting could not be seen."
    rising = [fold for fold in watched if _rises(fold.history)]
    gaps = [fold.metrics["gap"] for fold in watched]
    gap = f"at the best epochs validation loss was {np.median(gaps):.3f} above training loss (median)"
    if not rising:
        return f"No fold overfitted: validation loss did not rise while training loss fell; {gap}."
    epochs = sorted(int(np.argmin([epoch["val_loss"] for epoch in fold.history])) + 1 for fold in rising)
    when = f"epoch {epochs[0]}" if epochs[0] == epochs[-1] else f"epochs {epochs[0]} to {epochs[-1]}"
    return (
        f"Validation loss rose from {when} on while training loss fell, in {len(rising)} of {len(watched)} folds, and "
        f"what was learned after that was dropped; {gap}."
    )


def _rises(history: Sequence[Epoch]) -> bool:
    losses = [epoch["val_loss"] for epoch in history]
    best = int(np.argmin(losses))
    return losses[-1] > losses[best] * (1 + _RISE) and history[-1]["loss"] < history[best]["loss"]


def _confused(run: Description, most: int = 10) -> list[tuple[int, str, str]]:
    counts = [
        (count, run.labels[truth], run.labels[answer])
        for truth, row in enumerate(run.metrics["confusion"])
        for answer, count in enumerate(row)
        if truth != answer and count
    ]
    return sorted(counts, key=lambda item: (-item[0], item[1], item[2]))[:most]


def confusion(run: Description) -> bytes:
    """Return the confusion matrix as a PNG; colours are shares of each true class."""
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
    return _png(figure)


def curves(run: Description) -> bytes:
    """Return loss and accuracy over the epochs of every fold as a PNG, best epochs marked."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
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
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
