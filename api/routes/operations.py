"""Routes for operators: liveness, readiness, metrics, workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta

import redis
import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.dependencies import Services, ServicesDep
from api.paging import CursorQuery, LimitQuery, page_of
from api.schemas import Check, Page, Readiness, WorkerOut
from artifacts.addresses import hide_password
from errors import EspalierError
from models import job as jobs
from models import outbox
from models import worker as workers
from models.base import now
from models.schema_revision import applied_revision, needed_revision

log = structlog.get_logger()

router = APIRouter(tags=["operations"])

# Seconds after which a worker that was not seen again counts as not alive. Live workers report every few seconds.
_WORKER_SEEN_S = 60
_WORKERS_SHOWN = 200
# A publish job that finds no server is tried again within minutes.
_MLFLOW_WAITING_S = 900
_REASON_SHOWN = 500
_DECISIVE = ("database", "schema", "disk", "engine", "process")


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Report that the process is alive. Checks nothing else."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(services: ServicesDep, request: Request, response: Response) -> Readiness:
    """Report whether this process is ready for requests, with one check for each part of the service.

    If the service has an API key, only requests with the key see the details of the checks.
    """
    checks = {
        "database": _checked(_database, services),
        "schema": _checked(_schema, services),
        "disk": _checked(_disk, services),
        "process": _process(services),
        "store": _checked(_store, services),
        "engine": _checked(_engine, services),
        "broker": _checked(_broker, services),
        "workers": _checked(_workers, services),
        "mlflow": _checked(_mlflow, services),
    }
    ready = all(checks[name].ok for name in _DECISIVE)
    response.status_code = 200 if ready else 503
    if not request.state.may_see_details:
        checks = {name: Check(ok=check.ok, detail=None) for name, check in checks.items()}
    return Readiness(ready=ready, checks=checks)


@router.get("/metrics", response_class=Response)
def metrics(services: ServicesDep) -> Response:
    """Return metrics in Prometheus' text format. If the database does not answer, metrics of jobs are left out."""
    counts = None
    try:
        with services.database.reading() as session:
            counts = jobs.count_jobs(session)
    except Exception as error:  # the other metrics do not need the database
        log.warning("jobs not counted", error=str(error))
    return Response(services.metrics.render(counts), media_type=CONTENT_TYPE_LATEST)


@router.get("/api/v1/workers")
def list_workers(services: ServicesDep, limit: LimitQuery = 50, cursor: CursorQuery = None) -> Page[WorkerOut]:
    """List the workers of the last days with the queues that they serve, the most recently seen first."""
    with services.database.reading() as session:
        found = workers.list_workers(session, _WORKERS_SHOWN)
        alive_since = now() - timedelta(seconds=_WORKER_SEEN_S)
        items = [
            WorkerOut(
                name=worker.name,
                queues=worker.queues,
                is_alive=worker.looked_at > alive_since,
                started_at=worker.started_at,
                looked_at=worker.looked_at,
            )
            for worker in found
        ]
    return page_of(items, lambda worker: worker.name, limit, cursor)


def _checked(check: Callable[[Services], Check], services: Services) -> Check:
    try:
        return check(services)
    except EspalierError as error:
        return Check(ok=False, detail=error.detail)
    except Exception as error:  # the answer is public, so it names only the type of the error
        log.warning("check failed", check=check.__name__.strip("_"), exc_info=error)
        return Check(ok=False, detail=f"{type(error).__name__}; the API's log has the details")


def _database(services: Services) -> Check:
    services.database.ping()
    return Check(ok=True, detail="answers")


def _schema(services: Services) -> Check:
    needed = needed_revision()
    with services.database.reading() as session:
        applied = applied_revision(session)
    detail = f"revision {applied}"
    if applied != needed:
        detail += f", expected {needed}: run the migrations"
    return Check(ok=applied == needed, detail=detail)


def _disk(services: Services) -> Check:
    free = shutil.disk_usage(services.store.root).free
    return Check(ok=free > services.settings.free_disk_bytes, detail=f"{free / 1024**3:.1f} GiB free")


def _process(services: Services) -> Check:
    """Check that the process is not shutting down; report its process id."""
    return Check(
        ok=not services.shutdown.is_draining,
        detail="is shutting down" if services.shutdown.is_draining else f"process {os.getpid()}",
    )


def _store(services: Services) -> Check:
    services.store.check()
    return Check(ok=True, detail=services.store.address.url or "a folder of this machine")


def _engine(services: Services) -> Check:
    return Check(ok=True, detail=f"{services.probe_engine()}, {services.settings.engine_threads} threads")


def _broker(services: Services) -> Check:
    if services.settings.redis_url is None:
        return Check(ok=False, detail="REDIS_URL is not set, so this process cannot send jobs to workers")
    try:
        with redis.Redis.from_url(_redis_url(services.settings.redis_url), socket_timeout=1) as client:
            client.ping()
    except redis.RedisError as error:
        return Check(ok=False, detail=f"{hide_password(str(error))}; jobs wait until the broker answers")
    return Check(ok=True, detail="answers")


def _redis_url(url: str) -> str:
    """Return the broker's address as the redis client expects it. Kombu writes unix sockets differently."""
    return url.replace("redis+socket://", "unix://", 1)


def _workers(services: Services) -> Check:
    with services.database.reading() as session:
        alive_since = now() - timedelta(seconds=_WORKER_SEEN_S)
        recent = workers.list_workers(session, _WORKERS_SHOWN)
        alive = [worker.name for worker in recent if worker.looked_at > alive_since]
    return Check(ok=bool(alive), detail=", ".join(alive) or "no worker was seen within a minute")


def _mlflow(services: Services) -> Check:
    """Report what MLflow does not have: what waits, and what it refused for good."""
    with services.database.reading() as session:
        found = outbox.summarize_outbox(session)
    details = ["knows of everything"] if not found.waiting else []
    waiting_s = (now() - found.waiting_since).total_seconds() if found.waiting_since else 0.0
    if found.waiting:
        details.append(f"{found.waiting} facts about runs wait to be sent, the oldest for {waiting_s:.0f} s")
    if found.last_refusal is not None:
        last = found.last_refusal
        details.append(
            f"refused {found.refused} for good, the last of {last.run_id}: {last.payload['what']}: "
            f"{last.payload['reason'][:_REASON_SHOWN]}"
        )
    return Check(ok=waiting_s < _MLFLOW_WAITING_S, detail="; ".join(details))
