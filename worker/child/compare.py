"""Compares the runs of a comparison, inside a child process: what they left is read, nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from artifacts import manifest
from artifacts.bucket_store import open_store
from artifacts.store import Digest, Store, StoreAddress
from errors import EspalierError
from recipes.headline import HEADLINES, Headline
from recipes.layers import sides
from recipes.recipe import Task
from worker.child.channel import Channel

if TYPE_CHECKING:
    from inference.predictor import Predictor

# Enough for a median that a short disturbance does not move; large networks get fewer.
_ROUNDS = 30
_ROUNDS_WITHIN_S = 60.0
# Networks that are in memory at once, to take turns.
_TURNS_BYTES = 4 * 1024**3


def compare(order: Mapping[str, Any], channel: Channel) -> None:
    """Compare the runs of a comparison, sending `alive`, then `outcome` with the table, its picture and its report."""
    from safetensors.numpy import load as load_tensors

    from training.report import comparison_report
    from training.statistics import comparison as comparing

    store = open_store(StoreAddress(**order["store"]))
    candidates: list[dict[str, Any]] = order["candidates"]
    task = Task(candidates[0]["task"])
    headline = HEADLINES[task]

    def out_of_fold(digest: str) -> comparing.OutOfFoldLogits:
        return comparing.OutOfFoldLogits(**load_tensors(store.read(Digest(digest))))

    entries = [
        comparing.Entry(
            title=candidate["title"],
            score=candidate["metrics"][headline.metric],
            load=partial(out_of_fold, candidate["out_of_fold"]),
        )
        for candidate in candidates
    ]
    rows = manifest.load(store.read(Digest(order["manifest"])))
    found = comparing.compare(task, order["labels"], rows, entries, lambda: channel.send("alive"))
    channel.send("alive")
    times = _prediction_times(candidates, store, order["threads"], lambda: channel.send("alive"))
    lines = [
        comparison_report.Line(
            title=candidate["title"],
            version=candidate["version"],
            score=entry.score,
            ci95=headline.interval(candidate["metrics"]),
            difference=difference,
            training_s=candidate["training_s"],
            predict_ms=predict_ms,
            backbone_bytes=store.path(Digest(candidate["backbone"])).stat().st_size,
            bundle_bytes=store.path(Digest(candidate["bundle"])).stat().st_size,
        )
        for candidate, entry, difference, predict_ms in zip(candidates, entries, found.differences, times, strict=True)
    ]
    interval = headline.interval_kind(candidates[0]["metrics"])
    ranked = sorted(lines, key=lambda line: (line.difference is not None, _loss(headline, line.score)))
    report = comparison_report.report(order["name"], headline, ranked, found.verdict, interval)
    channel.send(
        "outcome",
        picture=store.put(comparison_report.forest(headline, ranked)),
        report=store.put(report.encode()),
        table={
            "metric": headline.metric,
            "greater_is_better": headline.is_greater_better,
            "best": candidates[found.best]["position"],
            "verdict": found.verdict,
            "interval": interval,
            "test": comparing.TEST,
            "rows": [
                {"position": candidate["position"], **asdict(line)}
                for candidate, line in zip(candidates, lines, strict=True)
            ],
        },
    )


def _loss(headline: Headline, score: float) -> float:
    return -score if headline.is_greater_better else score


def _prediction_times(
    candidates: Sequence[Mapping[str, Any]], store: Store, threads: int, alive: Callable[[], None]
) -> list[float | None]:
    """Return the median milliseconds that each bundle takes for one decoded image.

    None for a bundle that this machine cannot serve: what was measured in training counts all the same.
    """
    from inference.shelf import Shelf
    from inference.timing import medians_ms

    found: list[float | None] = [None] * len(candidates)
    for turns in _turns([store.path(Digest(candidate["backbone"])) for candidate in candidates]):
        shelf = Shelf(store, threads, budget_bytes=sys.maxsize)  # all of these at once
        loaded: list[tuple[int, Predictor]] = []
        for number in turns:
            try:
                loaded.append((number, shelf.predictor(Digest(candidates[number]["bundle"]))))
            except EspalierError as error:
                sys.stderr.write(f"Not timed: {error.detail}\n")
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
    """Return the numbers of networks in groups that fit into memory together; equal ones count once."""
    groups: list[list[int]] = [[]]
    held: set[Path] = set()
    for number, network in enumerate(networks):
        if held and sum(path.stat().st_size for path in held | {network}) > _TURNS_BYTES:
            groups.append([])
            held = set()
        groups[-1].append(number)
        held.add(network)
    return groups
