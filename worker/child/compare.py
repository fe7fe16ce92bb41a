"""Compares the results of several runs, inside a child process.

It reads the stored files of the runs and trains nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from artifacts import manifest
from artifacts.bucket_store import open_store
from artifacts.store import Digest, Store
from errors import EspalierError
from recipes.headline import HEADLINES, Headline
from recipes.layers import sides
from worker.child.channel import Channel
from worker.messages import Alive, ComparedRun, CompareOrder, ComparisonOutcome

if TYPE_CHECKING:
    from inference.predictor import Predictor

# Predictions per bundle: enough for a stable median. Large networks get fewer, because of the time limit.
_ROUNDS = 30
_ROUNDS_WITHIN_S = 60.0
# Largest total size of the networks that are in memory and timed in turns.
_TURNS_BYTES = 4 * 1024**3


def compare(order: CompareOrder, channel: Channel) -> None:
    """Compare the runs that the order lists.

    Sends Alive regularly, and ComparisonOutcome at the end.
    """
    from safetensors.numpy import load as load_tensors

    from training.report import comparison_report
    from training.statistics import comparison as comparing

    store = open_store(order.store)
    task = order.runs[0].task
    headline = HEADLINES[task]

    def out_of_fold(digest: Digest) -> comparing.OutOfFoldLogits:
        return comparing.OutOfFoldLogits(**load_tensors(store.read(digest)))

    def alive() -> None:
        channel.send(Alive())

    entries = [
        comparing.Entry(
            title=run.title,
            score=run.metrics[headline.metric],
            load=partial(out_of_fold, run.out_of_fold),
        )
        for run in order.runs
    ]
    rows = manifest.load(store.read(order.manifest))
    found = comparing.compare(task, order.labels, rows, entries, alive)
    verdict = " ".join(filter(None, [found.verdict, _missing(order)]))
    alive()
    times = _prediction_times(order.runs, store, order.threads, alive)
    lines = [
        comparison_report.Line(
            title=run.title,
            version=run.version,
            score=entry.score,
            ci95=headline.interval(run.metrics),
            difference=difference,
            training_s=run.training_s,
            predict_ms=predict_ms,
            backbone_bytes=store.path(run.backbone).stat().st_size,
            bundle_bytes=store.path(run.bundle).stat().st_size,
        )
        for run, entry, difference, predict_ms in zip(order.runs, entries, found.differences, times, strict=True)
    ]
    interval = headline.interval_kind(order.runs[0].metrics)
    ranked = sorted(lines, key=lambda line: (line.difference is not None, _loss(headline, line.score)))
    report = comparison_report.report(order.name, headline, ranked, verdict, interval)
    table = {
        "metric": headline.metric,
        "greater_is_better": headline.is_greater_better,
        "best": order.runs[found.best].position,
        "verdict": verdict,
        "interval": interval,
        "test": comparing.TEST,
        "rows": [{"position": run.position, **asdict(line)} for run, line in zip(order.runs, lines, strict=True)],
    }
    channel.send(
        ComparisonOutcome(
            picture=store.put(comparison_report.forest(headline, ranked)),
            report=store.put(report.encode()),
            table=table,
        )
    )


def _missing(order: CompareOrder) -> str:
    """Return the sentence on recipes without a row in the table, or an empty text if there are none."""
    counts = [f"{count} {how}" for count, how in ((order.failed, "failed"), (order.cancelled, "cancelled")) if count]
    return f"Not in the table: the runs of other recipes ({', '.join(counts)})." if counts else ""


def _loss(headline: Headline, score: float) -> float:
    return -score if headline.is_greater_better else score


def _prediction_times(
    runs: Sequence[ComparedRun], store: Store, threads: int, alive: Callable[[], None]
) -> list[float | None]:
    """Return, for each run, the median time in milliseconds of a prediction for one decoded image.

    A run whose bundle this machine cannot serve gets None, but it stays in the comparison.
    """
    from inference.shelf import Shelf
    from inference.timing import medians_ms

    found: list[float | None] = [None] * len(runs)
    for turns in _turns([store.path(run.backbone) for run in runs]):
        shelf = Shelf(store, threads, budget_bytes=sys.maxsize)  # no limit: `_turns` has chosen networks that fit
        loaded: list[tuple[int, Predictor]] = []
        for number in turns:
            try:
                loaded.append((number, shelf.predictor(runs[number].bundle)))
            except EspalierError as error:
                sys.stderr.write(f"Bundle not timed: {error.detail}\n")
            alive()
        measured = medians_ms([_ask(predictor) for _, predictor in loaded], _ROUNDS, _ROUNDS_WITHIN_S, alive)
        shelf.close()
        for (number, _), value in zip(loaded, measured, strict=True):
            found[number] = value
    return found


def _ask(predictor: Predictor) -> Callable[[], object]:
    pixels = np.zeros((1, *sides(predictor.bundle.size), 3), np.uint8)
    return lambda: predictor.logits(pixels)


def _turns(networks: Sequence[Path]) -> list[list[int]]:
    """Return the indexes of networks in groups that fit into memory together. Equal files count once."""
    groups: list[list[int]] = [[]]
    held: set[Path] = set()
    for number, network in enumerate(networks):
        if held and sum(path.stat().st_size for path in held | {network}) > _TURNS_BYTES:
            groups.append([])
            held = set()
        groups[-1].append(number)
        held.add(network)
    return groups
