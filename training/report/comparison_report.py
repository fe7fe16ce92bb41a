"""Writes the report of a comparison: its table as Markdown, and a picture of the scores. Knows no Keras."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from artifacts.markdown import escaped
from recipes.headline import Headline
from training.figures import drawn_names, png
from training.statistics.comparison import TEST, Difference

_TITLE_CHARACTERS, _TITLE_LINES = 44, 3


@dataclass(frozen=True)
class Line:
    """One recipe of a comparison, as a row of its table. `predict_ms` is None if this machine cannot run the model."""

    title: str
    version: int
    score: float
    ci95: tuple[float, float]
    difference: Difference | None
    training_s: float
    predict_ms: float | None
    backbone_bytes: int
    bundle_bytes: int


def report(name: str, headline: Headline, lines: Sequence[Line], verdict: str, interval: str) -> str:
    """Return the report as Markdown, with a row for each of `lines` in their order."""
    formatted = headline.formatted
    text = [
        f"# Comparison of {escaped(name)}",
        "",
        verdict,
        "",
        f"| recipe | version | {headline.title} | 95 % interval | difference to the best | 95 % interval | p "
        "| training | one prediction | backbone | bundle |",
        "|---|--:|--:|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        apart = ("", "", "")
        if line.difference is not None:
            low, high = line.difference.ci95
            apart = (
                formatted(line.difference.difference),
                f"{formatted(low)} to {formatted(high)}",
                f"{line.difference.p_value:.2g}",
            )
        text.append(
            f"| {escaped(line.title)} | {line.version} | {formatted(line.score)} "
            f"| {formatted(line.ci95[0])} to {formatted(line.ci95[1])} "
            f"| {' | '.join(apart)} | {line.training_s:,.1f} s | {_milliseconds(line.predict_ms)} "
            f"| {line.backbone_bytes / 1e6:,.1f} MB | {line.bundle_bytes / 1e6:,.2f} MB |"
        )
    text += [
        "",
        f"- Interval of a score: {interval}.",
        f"- {TEST}",
        "- Training is the time of the whole run. Features that an earlier run had computed were read from the cache.",
        "- One prediction is the median time of one decoded image through backbone and head, on the machine "
        "that ran the "
        "comparison.",
    ]
    return "\n".join(text) + "\n"


def _milliseconds(value: float | None) -> str:
    return "not supported here" if value is None else f"{value:.2f} ms"


def row_name(line: Line) -> str:
    """Return the name of a row in the picture: its version, by which the table has the row, and its title."""
    title = line.title
    half = _TITLE_CHARACTERS * _TITLE_LINES // 2 - 22
    if len(title) > 2 * half:  # titles often differ at their end
        title = f"{title[:half]} … {title[-half:]}"
    title = textwrap.fill(
        f"version {line.version}: {title}", _TITLE_CHARACTERS, max_lines=_TITLE_LINES, placeholder=" …"
    )
    return title.removesuffix(": ").removesuffix(":")


def forest(headline: Headline, lines: Sequence[Line]) -> bytes:
    """Return a PNG of the scores with their intervals, in the order of `lines`, of which the first is the best."""
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(lines):
        colour = "C0" if line.difference is None else "0.35"
        axes.plot(line.ci95, [place, place], color=colour, linewidth=2)
        axes.plot(line.score, place, "s", color=colour)
    axes.axvline(lines[0].score, color="C0", alpha=0.4, linestyle=":", label="score of the best")
    # Without `parse_math=False`, matplotlib would read a label with $ as a formula.
    drawn = drawn_names([row_name(line) for line in lines])
    axes.set_yticks(range(len(lines)), drawn.names, parse_math=False, fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(f"{headline.title}, 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower right")
    return png(figure, drawn.fonts)
