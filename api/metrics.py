"""What Prometheus may ask: requests, predictions, engines, jobs. Names are ours to keep stable.

Several processes on one machine keep their numbers in files of one folder, by prometheus_client's multiprocess mode:
its environment variable must be there before the library is imported. Whoever is asked tells the numbers of all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from inference.batcher import Batcher
from inference.shelf import LoadedBackbone
from models.job import JobState, Queue

# Names the folder; the library's own variable.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# Other processes tell of this one's engines as they were at most so long ago.
REFRESH_EVERY_S = 1.0
# Models with a label of their own in each process; all others are one together, so that a thousand cost Prometheus no
# more.
MODELS = 200
OTHERS = "(others)"

log = structlog.get_logger()


def shared_folder() -> Path | None:
    """Return the folder that the processes of this machine share, None for one process alone."""
    found = os.environ.get(FOLDER)
    return Path(found) if found else None


def forget(folder: Path, process: int) -> None:
    """Tell no more of what a process that died had in memory. What it counted stays, so that no sum goes down."""
    mark_process_dead(process, str(folder))  # type: ignore[no-untyped-call]
    for file in folder.glob(f"*_{process}.db"):
        if not file.stat().st_size:  # it died just when it had made the file, which nobody could read
            file.unlink()


class Metrics:
    """The metrics of one API process; its page tells those of all that share a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """Count in memory, or in a folder, which must be `shared_folder()`."""
        self._folder = folder
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "espalier_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "espalier_http_request_seconds", "Time to answer a request.", ["method", "route"], registry=self._registry
        )
        self._images = Counter("espalier_predicted_images", "Images predicted.", registry=self._registry)
        self._predictions = Counter(
            "espalier_predictions", "Prediction requests answered.", ["model"], registry=self._registry
        )
        self._stages = Histogram(
            "espalier_prediction_stage_seconds", "Time of a prediction by stage.", ["stage"], registry=self._registry
        )
        Gauge(
            "espalier_api_processes", "API processes that answer.", registry=self._registry, multiprocess_mode="livesum"
        ).set(1)
        self._models: set[str] = set()
        self._engines = _Engines(self._registry, is_shared=folder is not None)
        self._loaded: Callable[[], Sequence[LoadedBackbone]] = tuple
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, loaded: Callable[[], Sequence[LoadedBackbone]]) -> None:
        """Tell of the backbones that `loaded` returns from now on."""
        self._loaded = loaded

    def start(self) -> None:
        """Look at the engines from time to time until closed, if other processes are asked about them, too."""
        if self._folder is not None:
            self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def count_prediction(self, model: str, images: int, timings_ms: Mapping[str, float]) -> None:
        """Count a prediction and where its time went."""
        if len(self._models) < MODELS:
            self._models.add(model)
        self._predictions.labels(model if model in self._models else OTHERS).inc()
        self._images.inc(images)
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def page(self, jobs: Mapping[tuple[Queue, JobState], int] | None) -> bytes:
        """Return the metrics as Prometheus reads them; without `jobs` those of jobs are left out."""
        self._engines.refresh(self._loaded())
        registry = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(registry) + _jobs_page(jobs)

    def _run(self) -> None:
        while not self._is_over.wait(REFRESH_EVERY_S):
            try:
                self._engines.refresh(self._loaded())
            except Exception:  # whatever it is, the next look may see more
                log.exception("engines were not looked at")


@dataclass
class _BatcherCounts:
    """What had been counted of a batcher at the last look."""

    names: tuple[str, str]
    busy_s: float = 0.0
    batches: int = 0
    images: int = 0


class _Engines:
    """What every loaded backbone has done and has before it; `backbone` is the beginning of its digest."""

    def __init__(self, registry: CollectorRegistry, is_shared: bool) -> None:
        labels = ["backbone", "precision"]
        self._is_shared = is_shared
        self._lock = threading.Lock()
        self._seen: dict[Batcher, _BatcherCounts] = {}
        self._busy = Counter(
            "espalier_engine_busy_seconds", "Time that the engine computed.", labels, registry=registry
        )
        self._batches = Counter("espalier_engine_batches", "Batches computed.", labels, registry=registry)
        self._images = Counter("espalier_engine_images", "Images computed.", labels, registry=registry)
        # What is of one machine is added up. Limits, ages and models are not: every process has its own of the same.
        self._limit = Gauge(
            "espalier_engine_batch_limit",
            "Most images of a batch.",
            labels,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._queued = Gauge(
            "espalier_engine_queued_images",
            "Images that wait.",
            labels,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._oldest = Gauge(
            "espalier_engine_queue_age_seconds",
            "Wait of the oldest.",
            labels,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._memory = Gauge(
            "espalier_shelf_bytes",
            "Memory of a loaded backbone.",
            labels,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._models = Gauge(
            "espalier_shelf_models",
            "Models loaded on a backbone.",
            labels,
            registry=registry,
            multiprocess_mode="livemax",
        )

    def refresh(self, loaded: Sequence[LoadedBackbone]) -> None:
        """Count what was done since the last look, and tell what there is."""
        with self._lock:
            there = {one.batcher for one in loaded}
            for batcher in [batcher for batcher in self._seen if batcher not in there]:
                self._count(batcher)
                self._forget(self._seen.pop(batcher).names)
            for one in loaded:
                names = (one.digest[:12], one.precision.value)
                self._seen.setdefault(one.batcher, _BatcherCounts(names))
                self._count(one.batcher)
                self._limit.labels(*names).set(one.batcher.limit)
                self._queued.labels(*names).set(one.batcher.queued())
                self._oldest.labels(*names).set(one.batcher.oldest_s())
                self._memory.labels(*names).set(one.size_bytes)
                self._models.labels(*names).set(one.models)

    def _count(self, batcher: Batcher) -> None:
        seen = self._seen[batcher]
        now = _BatcherCounts(seen.names, batcher.busy_s, batcher.batches, batcher.images)
        self._busy.labels(*seen.names).inc(now.busy_s - seen.busy_s)
        self._batches.labels(*seen.names).inc(now.batches - seen.batches)
        self._images.labels(*seen.names).inc(now.images - seen.images)
        self._seen[batcher] = now

    def _forget(self, names: tuple[str, str]) -> None:
        """Tell that a backbone is not loaded; the library cannot take a label out of a folder."""
        for gauge in (self._limit, self._queued, self._oldest, self._memory, self._models):
            if self._is_shared:
                gauge.labels(*names).set(0)
            else:
                gauge.remove(*names)


class _FixedMetrics(Collector):
    """Metrics that are known when they are asked for."""

    def __init__(self, *told: Metric) -> None:
        self._told = told

    def collect(self) -> Iterator[Metric]:
        yield from self._told


def _jobs_page(counts: Mapping[tuple[Queue, JobState], int] | None) -> bytes:
    """Return the metrics of jobs: they are the database's, the same whichever process is asked."""
    if counts is None:
        return b""
    told = GaugeMetricFamily("espalier_jobs", "Unfinished jobs.", labels=["queue", "state"])
    for queue in Queue:
        for state in (JobState.QUEUED, JobState.RUNNING):
            told.add_metric([queue.value, state.value], counts.get((queue, state), 0))
    registry = CollectorRegistry()
    registry.register(_FixedMetrics(told))
    return generate_latest(registry)
