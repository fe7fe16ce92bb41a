"""The worker process: Celery for the bell, one loop per queue for the work. Run as `python -m worker.app`."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping

import structlog
from celery import signals

import bell
import logs
from artifacts.bucket_store import open_store
from artifacts.store import Store
from errors import StoreRefused
from models.job import JobKind, Queue
from models.session import Database
from settings import Settings
from worker.child_process import clear_left_folders
from worker.garbage_collector import Collector
from worker.handlers.compare import Compare
from worker.handlers.ingest import Ingest, IngestLimits, Purge
from worker.handlers.tracking import Publish, TrackingPlace
from worker.handlers.train import Train, TrainingPlace
from worker.handlers.view import Look
from worker.lease import Handler, Timings
from worker.loop import Loop
from worker.messages import WeightsSource
from worker.sweeper import Sweeper
from worker.tasks import add_task

log = structlog.get_logger()

# Supervisors wait longer than this before they kill.
_DRAIN_S = 25.0


class WorkerService:
    """Everything of a worker but Celery: usable without a broker."""

    def __init__(self, settings: Settings) -> None:
        self.database = Database(settings.database)
        self.queues = [Queue(name) for name in settings.queues]
        name = f"{socket.gethostname()}-{os.getpid()}"
        timings = Timings(
            look_every_s=settings.look_every_s,
            renew_every_s=settings.renew_every_s,
            lease_s=settings.lease_s,
            let_go_s=settings.let_go_s,
            cancel_every_s=settings.cancel_every_s,
            stall_s=settings.stall_s,
        )
        self._store = open_store(settings.store)
        handlers = make_handlers(settings, self._store)
        self._loops = [Loop(self.database, queue, handlers, name, timings) for queue in self.queues]
        self._sweeper = Sweeper(self.database, self.queues, handlers, name, timings)
        self._collector = Collector(self.database, self._store, settings.collect_every_s, settings.collect_after_s)

    def start(self) -> None:
        """Begin to work."""
        clear_left_folders()
        for loop in self._loops:
            loop.start()
        self._sweeper.start()
        self._collector.start()
        log.info("worker started", queues=[queue.value for queue in self.queues])

    def wake(self) -> None:
        """Look for work now."""
        for loop in self._loops:
            loop.ring()

    def drain(self) -> None:
        """Give the present jobs back and take no more."""
        for loop in self._loops:
            loop.drain()

    def stop(self) -> None:
        """Drain and wait for the end of it."""
        self.drain()
        until = time.monotonic() + _DRAIN_S
        for loop in self._loops:
            loop.join(max(0.0, until - time.monotonic()))
        self._sweeper.stop()
        self._collector.stop()
        self.database.close()
        log.info("worker stopped")


def make_handlers(settings: Settings, store: Store) -> Mapping[JobKind, Handler]:
    """Return what does each kind of job."""
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
    place = TrainingPlace(
        features=str(settings.features_folder.absolute()),
        pixels=str(settings.pixels_folder.absolute()),
        pixels_bytes=settings.pixels_bytes,
        image_limits=settings.image_limits,
        threads=settings.engine_threads,
        source=source,
        checkpoint_share=settings.checkpoint_share,
    )
    train = Train(store, place)
    tracking = TrackingPlace(settings.mlflow, settings.mlflow_timeout_s, settings.api_public)
    return {
        JobKind.INGEST: Ingest(store, limits),
        JobKind.PURGE: Purge(store),
        JobKind.TRAIN: train,
        JobKind.FOLD: train,
        JobKind.FINAL: train,
        JobKind.COMPARE: Compare(store, settings.engine_threads),
        JobKind.VIEW: Look(store, place.features, settings.image_limits, settings.engine_threads),
        JobKind.PUBLISH: Publish(store, tracking),
    }


def main() -> None:
    """Run until told to stop."""
    logs.configure()
    settings = Settings()
    try:
        service = WorkerService(settings)
    except StoreRefused as error:
        sys.exit(error.detail)
    celery = bell.celery_app(settings.redis_url or "redis://127.0.0.1:6379/0")
    celery.conf.worker_redirect_stdouts = False
    add_task(celery, service.wake)
    # Before Celery connects: the loops work without a broker, and Celery keeps trying.
    signals.worker_init.connect(lambda **_: service.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: service.drain(), weak=False)
    signals.worker_shutdown.connect(lambda **_: service.stop(), weak=False)
    celery.worker_main(
        [
            "worker",
            "--pool=threads",
            "--concurrency=1",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=WARNING",
            f"--queues={','.join(bell.celery_queue(queue.value) for queue in service.queues)}",
        ]
    )


if __name__ == "__main__":
    main()
