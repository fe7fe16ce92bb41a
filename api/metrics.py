"""What Prometheus may ask: requests, predictions, engines, jobs. Names are ours to keep stable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference.shelf import Loaded
from models.job import JobState, Queue

# Models with a label of their own; all others are one together, so that a thousand cost Prometheus no more.
MODELS = 200
OTHERS = "(others)"


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
        self._images = Counter("espalier_predicted_images", "Images predicted.", registry=self._registry)
        self._predictions = Counter(
            "espalier_predictions", "Prediction requests answered.", ["model"], registry=self._registry
        )
        self._stages = Histogram(
            "espalier_prediction_stage_seconds", "Time of a prediction by stage.", ["stage"], registry=self._registry
        )
        self._jobs = Gauge("espalier_jobs", "Unfinished jobs.", ["queue", "state"], registry=self._registry)
        self._models: set[str] = set()
        self._engines = _Engines()
        self._registry.register(self._engines)

    def watch(self, loaded: Callable[[], Sequence[Loaded]]) -> None:
        """Tell of the backbones that `loaded` returns from now on."""
        self._engines.loaded = loaded

    def saw_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def saw_prediction(self, model: str, images: int, timings_ms: Mapping[str, float]) -> None:
        """Count a prediction and where its time went."""
        if len(self._models) < MODELS:
            self._models.add(model)
        self._predictions.labels(model if model in self._models else OTHERS).inc()
        self._images.inc(images)
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)

    def page(self, jobs: Mapping[tuple[Queue, JobState], int] | None) -> bytes:
        """Return the metrics as Prometheus reads them; without `jobs` those of jobs are left out."""
        if jobs is None:
            self._jobs.clear()
            return generate_latest(self._registry)
        for queue in Queue:
            for state in (JobState.QUEUED, JobState.RUNNING):
                self._jobs.labels(queue.value, state.value).set(jobs.get((queue, state), 0))
        return generate_latest(self._registry)


class _Engines(Collector):
    """What every loaded backbone has done and has before it, read when Prometheus asks."""

    def __init__(self) -> None:
        self.loaded: Callable[[], Sequence[Loaded]] = tuple

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each number; `backbone` is the beginning of its digest."""
        labels = ["backbone", "precision"]
        busy = CounterMetricFamily("espalier_engine_busy_seconds", "Time that the engine computed.", labels=labels)
        batches = CounterMetricFamily("espalier_engine_batches", "Batches computed.", labels=labels)
        images = CounterMetricFamily("espalier_engine_images", "Images computed.", labels=labels)
        limit = GaugeMetricFamily("espalier_engine_batch_limit", "Most images of a batch.", labels=labels)
        queued = GaugeMetricFamily("espalier_engine_queued_images", "Images that wait.", labels=labels)
        oldest = GaugeMetricFamily("espalier_engine_queue_age_seconds", "Wait of the oldest.", labels=labels)
        memory = GaugeMetricFamily("espalier_shelf_bytes", "Memory of a loaded backbone.", labels=labels)
        models = GaugeMetricFamily("espalier_shelf_models", "Models loaded on a backbone.", labels=labels)
        for one in self.loaded():
            names = [one.digest[:12], one.precision.value]
            busy.add_metric(names, one.batcher.busy_s)
            batches.add_metric(names, one.batcher.batches)
            images.add_metric(names, one.batcher.images)
            limit.add_metric(names, one.batcher.limit)
            queued.add_metric(names, one.batcher.queued())
            oldest.add_metric(names, one.batcher.oldest_s())
            memory.add_metric(names, one.size_bytes)
            models.add_metric(names, one.models)
        yield from (busy, batches, images, limit, queued, oldest, memory, models)
