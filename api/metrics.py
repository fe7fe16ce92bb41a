"""The metrics that Prometheus scrapes: requests, predictions, engines, jobs. The names of metrics must not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference.batcher import Batcher
from inference.shelf import LoadedBackbone
from models.job import JobState, Queue

# Number of models that have a label of their own. All other models share one label: each label costs Prometheus memory.
LABELLED_MODELS = 200
OTHER_MODELS = "(others)"


class Metrics:
    """The metrics of one API process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "espalier_http_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "espalier_http_request_seconds", "Time to answer a request.", ["method", "route"], registry=self._registry
        )
        self._closed = Counter(
            "espalier_connections_closed", "Connections closed for a limit.", ["reason"], registry=self._registry
        )
        self._images = Counter("espalier_predicted_images", "Images predicted.", registry=self._registry)
        self._predictions = Counter(
            "espalier_predictions", "Prediction requests answered.", ["model"], registry=self._registry
        )
        self._stages = Histogram(
            "espalier_prediction_stage_seconds", "Time of a prediction by stage.", ["stage"], registry=self._registry
        )
        self._models: set[str] = set()
        self._engines = _EngineMetrics(self._registry)
        self._loaded: Callable[[], Sequence[LoadedBackbone]] = tuple

    def watch(self, loaded: Callable[[], Sequence[LoadedBackbone]]) -> None:
        """Set the function that returns the loaded backbones; each rendering reports them."""
        self._loaded = loaded

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request by method, route and status, and observe the seconds that it took."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def count_closed_connection(self, reason: str) -> None:
        """Count a connection that was closed for a limit."""
        self._closed.labels(reason).inc()

    def count_prediction(self, model: str, images: int, timings_ms: Mapping[str, float]) -> None:
        """Count a prediction request, its images, and the milliseconds that each stage took."""
        if len(self._models) < LABELLED_MODELS:
            self._models.add(model)
        self._predictions.labels(model if model in self._models else OTHER_MODELS).inc()
        self._images.inc(images)
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def render(self, jobs: Mapping[tuple[Queue, JobState], int] | None) -> bytes:
        """Return all metrics in Prometheus' text format; `jobs` are the numbers of jobs, or None to leave these out."""
        self._engines.refresh(self._loaded())
        return generate_latest(self._registry) + _render_jobs(jobs)


@dataclass
class _BatcherCounts:
    """The totals of a batcher at the last refresh. `labels` are the batcher's backbone and precision."""

    labels: tuple[str, str]
    busy_s: float = 0.0
    batches: int = 0
    images: int = 0


class _EngineMetrics:
    """Metrics of every loaded backbone: the work of its engine, and the images that wait for it.

    The label `backbone` is the first 12 digits of the backbone's digest.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["backbone", "precision"]
        self._lock = threading.Lock()
        self._counted: dict[Batcher, _BatcherCounts] = {}
        self._busy = Counter(
            "espalier_engine_busy_seconds", "Time that the engine computed.", labels, registry=registry
        )
        self._batches = Counter("espalier_engine_batches", "Batches computed.", labels, registry=registry)
        self._images = Counter("espalier_engine_images", "Images computed.", labels, registry=registry)
        self._limit = Gauge("espalier_engine_batch_limit", "Most images of a batch.", labels, registry=registry)
        self._queued = Gauge("espalier_engine_queued_images", "Images that wait.", labels, registry=registry)
        self._oldest = Gauge("espalier_engine_queue_age_seconds", "Wait of the oldest.", labels, registry=registry)
        self._memory = Gauge("espalier_shelf_bytes", "Memory of a loaded backbone.", labels, registry=registry)
        self._models = Gauge("espalier_shelf_models", "Models loaded on a backbone.", labels, registry=registry)

    def refresh(self, loaded: Sequence[LoadedBackbone]) -> None:
        """Add the work of each batcher since the last refresh to the counters, and set the gauges to current values."""
        with self._lock:
            present = {one.batcher for one in loaded}
            for batcher in [batcher for batcher in self._counted if batcher not in present]:
                self._count(batcher)
                self._remove_gauges(self._counted.pop(batcher).labels)
            for one in loaded:
                labels = (one.digest[:12], one.precision.value)
                self._counted.setdefault(one.batcher, _BatcherCounts(labels))
                self._count(one.batcher)
                self._limit.labels(*labels).set(one.batcher.limit)
                self._queued.labels(*labels).set(one.batcher.queued())
                self._oldest.labels(*labels).set(one.batcher.oldest_s())
                self._memory.labels(*labels).set(one.size_bytes)
                self._models.labels(*labels).set(one.models)

    def _count(self, batcher: Batcher) -> None:
        before = self._counted[batcher]
        now = _BatcherCounts(before.labels, batcher.busy_s, batcher.batches, batcher.images)
        self._busy.labels(*before.labels).inc(now.busy_s - before.busy_s)
        self._batches.labels(*before.labels).inc(now.batches - before.batches)
        self._images.labels(*before.labels).inc(now.images - before.images)
        self._counted[batcher] = now

    def _remove_gauges(self, labels: tuple[str, str]) -> None:
        for gauge in (self._limit, self._queued, self._oldest, self._memory, self._models):
            gauge.remove(*labels)


class _FixedMetrics(Collector):
    """A Prometheus collector that returns metrics which are already computed."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _render_jobs(counts: Mapping[tuple[Queue, JobState], int] | None) -> bytes:
    """Return the metrics of jobs in Prometheus' text format. They are the same in every API process."""
    if counts is None:
        return b""
    jobs = GaugeMetricFamily("espalier_jobs", "Unfinished jobs.", labels=["queue", "state"])
    for queue in Queue:
        for state in (JobState.QUEUED, JobState.RUNNING):
            jobs.add_metric([queue.value, state.value], counts.get((queue, state), 0))
    registry = CollectorRegistry()
    registry.register(_FixedMetrics(jobs))
    return generate_latest(registry)
