"""FastAPI dependencies of the routes: the services of this process, and the principal of a request.

The dependencies are coroutines, because FastAPI runs plain functions on its thread pool, whose threads may all be busy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api import engine_probe
from api.metrics import Metrics
from api.middleware import ShutdownState
from api.prediction_queue import PredictionQueue
from api.version_resolver import VersionResolver
from artifacts.store import Store
from dispatch import Dispatcher
from inference.shelf import Shelf
from models.project import Principal
from models.session import Database
from settings import Settings


@dataclass(frozen=True)
class Services:
    """The objects that all requests of one API process share. Routes receive them as a dependency."""

    settings: Settings
    database: Database
    store: Store
    dispatcher: Dispatcher
    shelf: Shelf
    version_resolver: VersionResolver
    prediction_queue: PredictionQueue
    metrics: Metrics
    shutdown: ShutdownState
    probe_engine: Callable[[], str] = engine_probe.cpu


async def get_services(request: Request) -> Services:
    """Return the services that `create_app` has stored in the application."""
    found: Services = request.app.state.services
    return found


async def get_principal() -> Principal:
    """Return the sender of the request. Today every sender works in the same project."""
    return Principal()


ServicesDep = Annotated[Services, Depends(get_services)]
PrincipalDep = Annotated[Principal, Depends(get_principal)]
