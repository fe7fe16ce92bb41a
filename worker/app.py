"""The Celery app of the worker. Run as `celery -A worker.app worker -Q cpu`; the rest is configured in the app.

A worker process has one slot. Each job runs in a child process. A sweeper, a dispatcher and a garbage collector run as
threads.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from celery import Celery, bootsteps, signals

import logs
from artifacts.bucket_store import open_store
from artifacts.store import Store
from broker import LOCAL_URL, CeleryBroker, make_celery
from clock import Clock
from dispatch import ThreadDispatcher
from errors import StoreRefused
from models.job import JobKind, Queue
from models.session import Database
from settings import Settings
from worker.child_process import clear_left_folders
from worker.garbage_collector import Collector
from worker.handlers.compare import Compare
from worker.handlers.ingest import Ingest, IngestLimits, Purge
from worker.handlers.tracking import Publish, TrackingSettings
from worker.handlers.train import Train, TrainingSettings
from worker.handlers.view import ComputeView
from worker.job_runner import JobRunner, Outcome
from worker.lease import Handler, Timings
from worker.messages import WeightsSource
from worker.sweeper import Sweeper
from worker.tasks import add_tasks

log = structlog.get_logger()

# Supervisors must wait longer than this before they kill the process.
_DRAIN_S = 24.0
# A child that is kept for the next part of its run stops after so many sweeps without one.
_IDLE_SWEEPS = 2


class WorkerService:
    """A worker without Celery: runs jobs, sweeps, sends due jobs and collects garbage."""

    def __init__(self, settings: Settings, name: str, queues: Sequence[Queue]) -> None:
        """Prepare a worker. Raises StoreRefused if the bucket of stored files denies access."""
        self._store = open_store(settings.store)
        self._clock = Clock()
        self._database = Database(settings.database)
        self._queues = queues
        timings = Timings(
            look_every_s=settings.look_every_s,
            renew_every_s=settings.renew_every_s,
            lease_s=settings.lease_s,
            let_go_s=settings.let_go_s,
            cancel_every_s=settings.cancel_every_s,
            stall_s=settings.stall_s,
        )
        handlers = make_handlers(settings, self._store)
        self._idle_s = _IDLE_SWEEPS * settings.look_every_s
        broker = CeleryBroker(settings.redis_url or LOCAL_URL)
        self._dispatcher = ThreadDispatcher(self._database, broker, settings.live_s)
        request = self._dispatcher.request
        self._runner = JobRunner(self._database, queues, handlers, name, timings, self._clock, after=request)
        self._sweeper = Sweeper(self._database, queues, handlers, name, timings, self._clock, after=self._after_sweep)
        self._collector = Collector(self._database, self._store, settings.collect_every_s, settings.collect_after_s)
        self._is_idle = self._clock.flag()
        self._is_idle.set()
        self._deadline = threading.Timer(_DRAIN_S, _exit)
        self._deadline.daemon = True

    def start(self) -> None:
        """Start the threads; Celery tasks call `run` for each job."""
        clear_left_folders()
        self._dispatcher.start()
        self._sweeper.start()
        self._collector.start()
        log.info("worker started", queues=[queue.value for queue in self._queues])

    def run(self, job_id: str) -> Outcome:
        """Run a job and return how it ended. Raises JobFailed."""
        self._is_idle.clear()
        try:
            return self._runner.run(job_id)
        finally:
            self._is_idle.set()

    def drain(self) -> None:
        """Give the current job back and accept no more jobs. From now on the process has 24 s to end."""
        self._runner.drain()
        if self._deadline.ident is None:
            self._deadline.start()

    def stop(self) -> None:
        """Drain, stop all threads, and have another worker take the job that was given back."""
        self.drain()
        self._is_idle.wait()
        self._runner.close()
        self._sweeper.stop()
        self._dispatcher.request()
        self._dispatcher.close()
        self._collector.stop()
        self._database.close()
        self._deadline.cancel()
        log.info("worker stopped")

    def _after_sweep(self) -> None:
        self._runner.stop_idle_child(self._idle_s)
        self._dispatcher.request()


def _exit() -> None:
    """End a process that does not end by itself: its child ends with it, and another worker takes the job over."""
    log.error("worker did not stop in time, so the process is ended", within_s=_DRAIN_S)
    os._exit(1)


def make_handlers(settings: Settings, store: Store) -> Mapping[JobKind, Handler]:
    """Return the handler of each kind of job."""
    limits = IngestLimits(
        archive=settings.archive_limits,
        image=settings.image_limits,
        classes=settings.classes,
        decode_cpu_s=settings.decode_cpu_s,
        memory_bytes=settings.ingest_memory_bytes,
    )
    source = WeightsSource(
        url=settings.weights_url,
        cache=str(settings.weights_cache),
        connect_s=settings.weights_connect_s,
        stall_s=settings.weights_stall_s,
    )
    training_settings = TrainingSettings(
        features=str(settings.features_folder.absolute()),
        pixels=str(settings.pixels_folder.absolute()),
        pixels_bytes=settings.pixels_bytes,
        image_limits=settings.image_limits,
        threads=settings.engine_threads,
        source=source,
        checkpoint_share=settings.checkpoint_share,
    )
    train = Train(store, training_settings)
    tracking = TrackingSettings(settings.mlflow, settings.mlflow_timeout_s, settings.api_public)
    return {
        JobKind.INGEST: Ingest(store, limits),
        JobKind.PURGE: Purge(store),
        JobKind.TRAIN: train,
        JobKind.FOLD: train,
        JobKind.FINAL: train,
        JobKind.COMPARE: Compare(store, settings.engine_threads),
        JobKind.VIEW: ComputeView(store, training_settings.features, settings.image_limits, settings.engine_threads),
        JobKind.PUBLISH: Publish(store, tracking),
    }


def make_app(load_settings: Callable[[], Settings] = Settings) -> Celery:
    """Return the Celery app of workers; its settings are loaded when a worker starts."""
    app = make_celery(lambda: load_settings().redis_url or LOCAL_URL, lambda: load_settings().queues)
    running: list[WorkerService] = []

    class Service(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts a `WorkerService` with a Celery worker, and drains it when the worker shuts down for any reason."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            if worker.concurrency != 1:
                log.critical("a worker runs one job at a time: start more workers instead", slots=worker.concurrency)
                raise SystemExit(1)

        def start(self, worker: Any) -> None:
            """Start the service before Celery fetches the first message."""
            queues = [Queue(name) for name in app.amqp.queues.consume_from]
            # In a container a new process may have the host name and the number of the one that was killed.
            name = f"{worker.hostname} {os.getpid()}-{secrets.token_hex(3)}"
            try:
                service = WorkerService(load_settings(), name, queues)
            except StoreRefused as error:
                log.critical("worker cannot start", error=error.detail)
                raise SystemExit(1) from error
            running.append(service)
            # This signal comes at once, while the steps are closed only after the consumer has returned.
            signals.worker_shutting_down.connect(lambda **_: service.drain(), weak=False)
            service.start()

        def close(self, worker: Any) -> None:
            """Give the current job back as soon as a shutdown begins."""
            for service in running:
                service.drain()

        def stop(self, worker: Any) -> None:
            """Stop the service after the consumer and before the pool."""
            for service in running:
                service.stop()

        def terminate(self, worker: Any) -> None:
            """Stop in the same way when Celery is told to end at once: there is nothing that could be left out."""
            self.stop(worker)

    app.steps["worker"].add(Service)
    add_tasks(app, lambda job_id: running[-1].run(job_id))
    return app


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logs(**_: Any) -> None:
    logs.configure()


app = make_app()
