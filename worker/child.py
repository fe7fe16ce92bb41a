"""The process that does one job: reads an order from standard input, sends messages, ends. Writes no rows.

Run as `python -m worker.child <descriptor>`: that open file takes the messages, so that nothing which a library prints
looks like one. Ends at once when standard input closes, since then its worker is gone.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from artifacts import images, layout, manifest
from artifacts.archive import Archive, ArchiveLimits, open_archive
from artifacts.headline import HEADLINES, Headline
from artifacts.images import ImageLimits
from artifacts.layout import Layout
from artifacts.recipe import Recipe, Task
from artifacts.store import Digest, Store, digest_of
from errors import DatasetRefused, EspalierError, ImageRefused, OutOfMemory, Refused
from worker import weights
from worker.weights import Source

_SAY_EVERY_S = 1.0


class Channel:
    """Messages to the worker, and answers from it."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Begin to take in answers, and die with the worker."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()

    def send(self, type: str, **fields: Any) -> None:
        """Send a message."""
        with self._lock:
            self._outgoing.write(json.dumps({"type": type, **fields}) + "\n")
            self._outgoing.flush()

    def ask(self, type: str, **fields: Any) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        self.send(type, **fields)
        return self._answers.get()

    def _listen(self) -> None:
        for line in self._incoming:
            self._answers.put(json.loads(line))
        os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Do what the order says."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # what this process starts must not keep the pipe open after its end
    outgoing = os.fdopen(descriptor, "w", encoding="utf-8")
    order = json.loads(sys.stdin.readline())
    channel = Channel(sys.stdin, outgoing)
    channel.listen()
    try:
        _ORDERS[order["kind"]](order, channel)
    except EspalierError as error:
        channel.send("error", error=error.record())
    except MemoryError:
        channel.send("error", error=OutOfMemory("The work took more memory than it may.").record())
    return 0


# --- ingest --------------------------------------------------------------------------------------------------------


def ingest(order: Mapping[str, Any], channel: Channel) -> None:
    """Read an archive: store each image that can be used and say what is known of it.

    Sends `layout` once, then for each image `reading` and `accepted` or `refused`. An image that kills this process
    was the last one `reading`; the worker then orders the rest from a new process.
    """
    resource.setrlimit(resource.RLIMIT_AS, (order["memory_bytes"], order["memory_bytes"]))
    store = Store(Path(order["store"]))
    limits = ImageLimits(**{**order["image_limits"], "formats": tuple(order["image_limits"]["formats"])})
    archive = open_archive(store.verified_path(Digest(order["archive"])), ArchiveLimits(**order["archive_limits"]))
    found = _layout(archive)
    done = set(order["done"])
    channel.send(
        "layout",
        task=found.task,
        samples=len(found.samples),
        ignored=archive.ignored,
        refused=[vars(file) for file in found.refused],
    )
    samples = {sample.path: sample for sample in found.samples if sample.path not in done}
    for path, data in archive.read(samples.keys()):
        # With its digest, so that the worker knows of every file that may lie in the store if it stops us now.
        channel.send("reading", path=path, sha256=None if isinstance(data, Refused) else digest_of(data))
        _limit_cpu(order["decode_cpu_s"])
        try:
            if isinstance(data, Refused):
                channel.send("refused", path=path, reason=data.reason)
                continue
            facts = images.inspect(data, limits)
        except ImageRefused as error:
            channel.send("refused", path=path, reason=error.detail)
            continue
        sample = samples[path]
        channel.send(
            "accepted",
            path=path,
            sha256=store.put(data),
            size_bytes=len(data),
            facts=asdict(facts),
            labels=sample.labels,
            target=sample.target,
            group=sample.group,
            split=sample.split,
        )


def _layout(archive: Archive) -> Layout:
    paths = [entry.path for entry in archive.entries]
    labels = layout.labels_file(paths)
    if labels is None:
        return layout.from_folders(paths)
    _, data = next(archive.read({labels}))
    if isinstance(data, Refused):
        raise DatasetRefused(f"labels.csv is {data.reason}.")
    return layout.from_labels(data, labels, paths)


def _limit_cpu(seconds: int) -> None:
    """Let the kernel end this process if it burns that much processor time on the next image."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.RLIM_INFINITY))


# --- train ---------------------------------------------------------------------------------------------------------


def train(order: Mapping[str, Any], channel: Channel) -> None:
    """Run an experiment, sending `progress`, `epoch`, `fold`, `file` and `alive`, then `outcome`."""
    store = Store(Path(order["store"]))
    recipe = Recipe.model_validate(order["recipe"])
    source = _weights(order, recipe, store, channel)
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(order["threads"])
    # Imported here and now: TensorFlow takes seconds, and weights that cannot be had should be told before.
    from training import experiment
    from training.experiment import Place

    limits = ImageLimits(**{**order["image_limits"], "formats": tuple(order["image_limits"]["formats"])})
    place = Place(
        store=store,
        features=Path(order["features"]),
        pixels=Path(order["pixels"]),
        pixels_bytes=order["pixels_bytes"],
        image_limits=limits,
        threads=order["threads"],
    )
    outcome = experiment.run(
        recipe,
        Digest(order["manifest"]),
        order["labels"],
        source,
        place,
        _Registry(channel),
        _Reporter(channel, store),
    )
    files = [_stored(store, name, data, media_type) for name, (data, media_type) in outcome.files.items()]
    channel.send(
        "outcome",
        bundle=outcome.bundle,
        backbone=outcome.backbone,
        metrics=outcome.metrics,
        extraction=outcome.extraction,
        files=files,
    )


def _stored(store: Store, name: str, data: bytes, media_type: str) -> dict[str, Any]:
    return {"name": name, "sha256": store.put(data), "size_bytes": len(data), "media_type": media_type}


class _Reporter:
    """Sends what an experiment reports, its progress and that it lives at most once a second."""

    def __init__(self, channel: Channel, store: Store) -> None:
        self._channel = channel
        self._store = store
        self._stage: str | None = None
        self._told_at = self._alive_at = 0.0

    def progress(self, **state: Any) -> None:
        now = time.monotonic()
        if state["stage"] != self._stage or now - self._told_at >= _SAY_EVERY_S:
            self._stage, self._told_at = state["stage"], now
            self._channel.send("progress", state=state)

    def alive(self) -> None:
        now = time.monotonic()
        if now - self._alive_at >= _SAY_EVERY_S:
            self._alive_at = now
            self._channel.send("alive")

    def epoch(self, fold: int | None, number: int, metrics: dict[str, float]) -> None:
        self._channel.send("epoch", fold=fold, epoch=number, metrics=metrics)

    def fold(self, result: Any) -> None:
        self._channel.send("fold", result=asdict(result))

    def file(self, name: str, data: bytes, media_type: str) -> None:
        self._channel.send("file", file=_stored(self._store, name, data, media_type))


class _Registry:
    """Answers an experiment's questions about backbones through the worker."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def find_backbone(self, key: Any) -> Digest | None:
        answer = self._channel.ask("find_backbone", key=asdict(key))["digest"]
        return None if answer is None else Digest(answer)

    def add_backbone(self, key: Any, digest: Digest, facts: dict[str, Any]) -> Digest:
        return Digest(self._channel.ask("add_backbone", key=asdict(key), digest=digest, facts=facts)["digest"])


def _weights(order: Mapping[str, Any], recipe: Recipe, store: Store, channel: Channel) -> Digest:
    """Return weights that lie in the store, getting them there if need be."""
    if order["weights"] is not None:
        return Digest(order["weights"])

    def downloaded(done_bytes: int, total_bytes: int | None, eta_s: float | None) -> None:
        share = done_bytes / total_bytes if total_bytes else 0.0
        channel.send("progress", state={"stage": "weights", "fraction": 0.1 * share, "eta_s": eta_s})

    found = weights.obtain(recipe.backbone, recipe.weights, store, Source(**order["source"]), downloaded)
    channel.ask("weights", network=recipe.backbone, name=recipe.weights, sha256=found.sha256, source=found.source)
    return found.sha256


# --- compare -------------------------------------------------------------------------------------------------------


# Enough for a median that a short disturbance does not move; large networks get fewer.
_ROUNDS = 30
_ROUNDS_WITHIN_S = 60.0
# Networks that are in memory at once, to take turns.
_TURNS_BYTES = 4 * 1024**3


def compare(order: Mapping[str, Any], channel: Channel) -> None:
    """Compare the runs of a comparison, sending `alive`, then `outcome` with the table, its picture and its report."""
    from safetensors.numpy import load as load_tensors

    from training import compare as comparing
    from training import tabulate

    store = Store(Path(order["store"]))
    candidates: list[dict[str, Any]] = order["candidates"]
    task = Task(candidates[0]["task"])
    headline = HEADLINES[task]

    def out_of_fold(digest: str) -> comparing.OutOfFold:
        return comparing.OutOfFold(**load_tensors(store.read(Digest(digest))))

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
        tabulate.Line(
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
    report = tabulate.report(order["name"], headline, ranked, found.verdict, interval)
    channel.send(
        "outcome",
        picture=store.put(tabulate.forest(headline, ranked)),
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
    """Return the median milliseconds that each bundle takes for its golden input, one decoded image.

    None for a bundle that this machine cannot serve: what was measured in training counts all the same.
    """
    from inference.predictor import Predictor
    from inference.shelf import Shelf
    from inference.stopwatch import medians_ms

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
        measured = medians_ms([predictor.golden_logits for _, predictor in loaded], _ROUNDS, _ROUNDS_WITHIN_S, alive)
        for (number, _), value in zip(loaded, measured, strict=True):
            found[number] = value
    return found


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


_ORDERS: Mapping[str, Callable[[Mapping[str, Any], Channel], None]] = {
    "ingest": ingest,
    "train": train,
    "compare": compare,
}

if __name__ == "__main__":
    sys.exit(main())
