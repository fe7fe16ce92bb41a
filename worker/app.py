"""The Celery app of the worker. Start a worker with `celery -A worker.app worker -Q cpu`; it needs no other options.

A worker does one job at a time, in a child process. The worker itself also runs a sweeper, a dispatcher and a garbage
collector, each in a thread.
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
from settings import Settings
from startup import CannotStart, load_settings_or_exit, open_database, prepare_folder
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

# The time that a worker has to shut down. A supervisor must wait longer than this before it kills the worker.
_DRAIN_S = 24.0
# Celery pools that run tasks in the process of the worker, where `WorkerService` is. `prefork` would run them in forked
# processes, without its lease threads and its database connections.
_POOLS = ("celery.concurrency.thread", "celery.concurrency.solo")
# A child process that waits for the next part of its run is stopped after this many sweeps.
_IDLE_SWEEPS = 2


class WorkerService:
    """All that a worker does besides receiving Celery messages: runs jobs, sweeps, sends due jobs, collects garbage."""

    def __init__(self, settings: Settings, name: str, queues: Sequence[Queue]) -> None:
        """Prepare the service; `start` starts its threads. Raises StoreRefused or CannotStart."""
        self._store = open_store(settings.store)
        self._clock = Clock()
        self._database = open_database(settings)
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
        """Start the sweeper, the dispatcher and the garbage collector. Celery tasks then call `run` for each job."""
        clear_left_folders()
        self._dispatcher.start()
        self._sweeper.start()
        self._collector.start()
        log.info("worker started", queues=[queue.value for queue in self._queues])

    def run(self, job_id: str) -> Outcome:
        """Run the job with this id and return how the attempt ended. Raises JobFailed if the job failed for good."""
        self._is_idle.clear()
        try:
            return self._runner.run(job_id)
        finally:
            self._is_idle.set()

    def drain(self) -> None:
        """Put the current job back into its queue and accept no more jobs. The process exits by force after 24 s."""
        self._runner.drain()
        if self._deadline.ident is None:
            self._deadline.start()

    def stop(self) -> None:
        """Drain, wait for the current job, stop all threads, and send the returned job to another worker."""
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
    """Exit at once. The child process ends too, and another worker takes over the job when its lease expires."""
    log.error("worker did not stop in time, so the process exits by force", within_s=_DRAIN_S)
    os._exit(1)


def make_handlers(settings: Settings, store: Store) -> Mapping[JobKind, Handler]:
    """Return the object that handles each kind of job."""
    limits = IngestLimits(
        archive=settings.archive_limits,
        image=settings.image_limits,
        classes=settings.classes,
        decode_cpu_s=settings.decode_cpu_s,
        memory_bytes=settings.ingest_memory_bytes,
        refused_share=settings.refused_share,
    )
    source = WeightsSource(
        url=settings.weights_url,
        cache=str(settings.weights_cache),
        connect_s=settings.weights_connect_s,
        stall_s=settings.weights_stall_s,
    )
    training = TrainingSettings(
        features=str(settings.features_folder.absolute()),
        pixels=str(settings.pixels_folder.absolute()),
        pixels_bytes=settings.pixels_bytes,
        image_limits=settings.image_limits,
        threads=settings.engine_threads,
        source=source,
        checkpoint_share=settings.checkpoint_share,
    )
    train = Train(store, training)
    tracking = TrackingSettings(settings.mlflow, settings.mlflow_timeout_s, settings.api_public)
    return {
        JobKind.INGEST: Ingest(store, limits),
        JobKind.PURGE: Purge(store),
        JobKind.TRAIN: train,
        JobKind.FOLD: train,
        JobKind.FINAL: train,
        JobKind.COMPARE: Compare(store, settings.engine_threads),
        JobKind.VIEW: ComputeView(store, training.features, settings.image_limits, settings.engine_threads),
        JobKind.PUBLISH: Publish(store, tracking),
    }


def make_app(load_settings: Callable[[], Settings] = load_settings_or_exit) -> Celery:
    """Return the Celery app of workers. It calls `load_settings` when a worker starts, not at import."""
    app = make_celery(lambda: load_settings().redis_url or LOCAL_URL, lambda: load_settings().queues)
    running: list[WorkerService] = []

    class Service(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts a `WorkerService` with the Celery worker, and drains it when that worker shuts down."""

        requires = ("celery.worker.components:Pool",)

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            if worker.pool_cls.__module__ not in _POOLS:
                log.critical(
                    "worker cannot start: jobs need the pool 'threads', which is the default, so leave out --pool",
                    pool=worker.pool_cls.__module__,
                )
                raise SystemExit(1)
            if worker.concurrency != 1:
                log.critical(
                    "worker cannot start: a worker does one job at a time, so leave out --concurrency and "
                    "start more workers instead",
                    slots=worker.concurrency,
                )
                raise SystemExit(1)

        def start(self, worker: Any) -> None:
            """Start the service before Celery fetches the first message."""
            queues = [Queue(name) for name in app.amqp.queues.consume_from]
            # In a container, a new process can have the same host name and process id as one that was killed before.
            name = f"{worker.hostname} {os.getpid()}-{secrets.token_hex(3)}"
            try:
                prepare_folder(load_settings().var)
                service = WorkerService(load_settings(), name, queues)
            except (CannotStart, StoreRefused) as error:
                log.critical("worker cannot start", error=str(error))
                raise SystemExit(1) from error
            running.append(service)
            # Celery sends this signal at once. It calls `close` below only after the consumer has returned.
            signals.worker_shutting_down.connect(lambda **_: service.drain(), weak=False)
            service.start()

        def close(self, worker: Any) -> None:
            """Put the current job back into its queue as soon as a shutdown begins."""
            for service in running:
                service.drain()

        def stop(self, worker: Any) -> None:
            """Stop the service. Celery calls this after it stops the consumer and before it stops the pool."""
            for service in running:
                service.stop()

        def terminate(self, worker: Any) -> None:
            """Stop the service as `stop` does. A forced shutdown needs the same steps as an ordinary one."""
            self.stop(worker)

    app.steps["worker"].add(Service)
    add_tasks(app, lambda job_id: running[-1].run(job_id))
    return app


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logs(**_: Any) -> None:
    logs.configure()


app = make_app()
