"""What Prometheus may ask: requests, predictions, jobs. Names are ours to keep stable."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from models.job import JobState, Queue


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
        self._stages = Histogram(
            "espalier_prediction_stage_seconds", "Time of a prediction by stage.", ["stage"], registry=self._registry
        )
        self._jobs = Gauge("espalier_jobs", "Unfinished jobs.", ["queue", "state"], registry=self._registry)

    def saw_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def saw_prediction(self, images: int, timings_ms: Mapping[str, float]) -> None:
        """Count a prediction and where its time went."""
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
