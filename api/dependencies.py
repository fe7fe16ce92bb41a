"""FastAPI dependencies of the routes: the services of this process, and the principal of a request.

The dependencies are coroutines, because FastAPI runs plain functions on its thread pool, whose threads may all be busy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api import engine_probe
from api.key_claims import KeyClaims
from api.metrics import Metrics
from api.middleware import ShutdownState
from api.prediction_queue import PredictionQueue
from api.problems import short_repr
from api.thumbnails import ThumbnailMaker
from api.version_resolver import VersionResolver
from artifacts.store import Store
from dispatch import Dispatcher
from errors import RequestInvalid
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
    thumbnails: ThumbnailMaker
    metrics: Metrics
    shutdown: ShutdownState
    key_claims: KeyClaims
    probe_engine: Callable[[], str] = engine_probe.cpu


async def get_services(request: Request) -> Services:
    """Return the services that `create_app` has stored in the application."""
    found: Services = request.app.state.services
    return found


async def get_principal() -> Principal:
    """Return the sender of the request. Today every sender works in the same project."""
    return Principal()


async def refuse_unknown_query(request: Request) -> None:
    """Refuse query parameters that the route does not document, or that are repeated.

    A filter that is ignored would list what the client did not ask for.
    """
    if not request.query_params or not request.url.path.startswith("/api/v1/"):
        return
    documented = request.app.openapi()["paths"].get(request.scope["route"].path, {})
    parameters = documented.get(request.method.lower(), {}).get("parameters", ())
    known = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            raise RequestInvalid(
                f"{name}: Expected {' or '.join(known) if known else 'no query parameters'}. "
                f"Received a query parameter {short_repr(name)}.",
                field=name,
            )
        values = request.query_params.getlist(name)
        if len(values) > 1:
            raise RequestInvalid(f"{name}: Expected one value. Received {len(values)}.", field=name)


ServicesDep = Annotated[Services, Depends(get_services)]
PrincipalDep = Annotated[Principal, Depends(get_principal)]
