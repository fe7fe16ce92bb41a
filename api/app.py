"""Builds and serves the FastAPI application: its services, middleware and routes. Run as `python -m api.app`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from socket import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import Depends, FastAPI
from fastapi_swagger import patch_fastapi
from uvicorn.config import STARTUP_FAILURE

import logs
from api import openapi, problems
from api.connections import Acceptor, Connections, connection_limits, listen
from api.dependencies import Services, refuse_unknown_query
from api.key_claims import KeyClaims
from api.metrics import Metrics
from api.middleware import RequestMiddleware, ShutdownState
from api.prediction_queue import PredictionQueue
from api.routes import comparisons, datasets, events, models, networks, operations, predictions, runs, views
from api.socket_drain import ACCEPT_BACKLOG_S, DRAIN_S, stop_accepting
from api.thumbnails import ThumbnailMaker
from api.version_resolver import VersionResolver
from artifacts.bucket_store import open_store
from artifacts.decode_memory import DecodeMemory
from broker import CeleryBroker
from dispatch import Dispatcher, NoDispatcher, ThreadDispatcher
from inference import freed_memory
from inference.engine_choice import choose_engine_loader
from inference.shelf import Shelf
from settings import Settings
from startup import exit_with_a_sentence, load_settings, open_database, prepare_folder

_DESCRIPTION = """
Upload labelled images, train a model by transfer learning, read an honest score, ask for predictions.
Every error is `application/problem+json` with a stable `type`.
"""


_REMOVED_SETTING = "ESPALIER_API_PROCESSES"

log = structlog.get_logger()


def create_app(settings: Settings, dispatcher: Dispatcher | None = None) -> FastAPI:
    """Return the FastAPI application with its services, middleware and routes.

    Args:
        settings: the settings of this process.
        dispatcher: sends due jobs to workers. By default, a new one that uses the broker in the settings, if any.

    Raises:
        StoreRefused: the bucket of stored files does not exist or denies access.
        EngineMissing: the engine that the settings name is not installed.
        CannotStart: the database cannot be opened.
    """
    database = open_database(settings)
    store = open_store(settings.store)
    shelf = Shelf(store, settings.engine_threads, settings.shelf_bytes, choose_engine_loader(settings.engine))
    metrics, shutdown = Metrics(), ShutdownState()
    metrics.watch(shelf.loaded)
    connections = Connections(connection_limits(settings), metrics.count_closed_connection)
    version_resolver = VersionResolver(database, shelf)
    decode_memory = DecodeMemory(settings.decode_bytes)
    prediction_queue = PredictionQueue(settings, shelf, decode_memory)
    thumbnails = ThumbnailMaker(store, settings.image_limits, decode_memory)
    key_claims = KeyClaims(database)
    own_dispatcher: ThreadDispatcher | None = None
    if dispatcher is None and settings.redis_url:
        own_dispatcher = ThreadDispatcher(database, CeleryBroker(settings.redis_url), settings.live_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        version_resolver.start()
        key_claims.start()
        if own_dispatcher is not None:
            own_dispatcher.start()
        yield
        version_resolver.close()
        key_claims.close()
        prediction_queue.close()
        thumbnails.close()
        shelf.close()
        if own_dispatcher is not None:
            own_dispatcher.close()
        database.close()

    app = FastAPI(
        title="Espalier",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(refuse_unknown_query)],
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        strict_content_type=False,  # curl declares any body as a form, so the declared type is not trusted
    )
    app.state.services = Services(
        settings=settings,
        database=database,
        store=store,
        dispatcher=dispatcher or own_dispatcher or NoDispatcher(),
        shelf=shelf,
        version_resolver=version_resolver,
        prediction_queue=prediction_queue,
        thumbnails=thumbnails,
        metrics=metrics,
        shutdown=shutdown,
        key_claims=key_claims,
    )
    for group in (datasets, runs, views, events, networks, comparisons, models, predictions, operations):
        app.include_router(group.router)
    patch_fastapi(app)
    problems.install(app)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    openapi.install(app, has_key=key is not None)
    app.state.connections = connections
    app.add_middleware(
        RequestMiddleware,
        hosts=settings.hosts,
        api_key=key,
        metrics=metrics,
        shutdown=shutdown,
        connections=connections,
    )
    return app


class DrainingServer(uvicorn.Server):
    """A uvicorn server that accepts connections within their limits, and loses no request when it shuts down.

    After SIGTERM, it keeps serving for a second and closes each connection after an answer, so that clients reconnect
    to another server. Ctrl-C stops it at once.
    """

    def __init__(self, config: uvicorn.Config, shutdown: ShutdownState, connections: Connections) -> None:
        super().__init__(config)
        self._shutdown = shutdown
        self._connections = connections
        self._acceptors: list[Acceptor] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM:
            super().handle_exit(sig, frame)
        elif not self._shutdown.is_draining:  # a second SIGTERM does not start another timer
            self._shutdown.is_draining = True
            threading.Timer(DRAIN_S, super().handle_exit, (sig, frame)).start()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start the application, then listen. uvicorn itself listens to nothing: it would accept without a limit."""
        await super().startup(sockets=[])
        if self.should_exit:
            return
        try:
            listening = sockets or listen(self.config.host, self.config.port, self.config.backlog)
        except OSError as error:
            log.error("cannot listen", host=self.config.host, port=self.config.port, error=str(error))
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self._acceptors = [Acceptor(one, self._connections, self._make_protocol) for one in listening]

    def _make_protocol(self) -> asyncio.Protocol:
        return self._connections.make_protocol(self.config, self.server_state, self.lifespan.state)

    async def on_tick(self, counter: int) -> bool:
        if counter % _SWEEP_TICKS == 0:
            self._connections.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting connections, serve those in the backlog, and finish the requests that have begun."""
        for acceptor in self._acceptors:
            stop_accepting(acceptor.listening.fileno())
        await asyncio.sleep(ACCEPT_BACKLOG_S)
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)


# Number of the server's ticks, a tenth of a second each, between two checks of the connections.
_SWEEP_TICKS = 10

# Proxies usually keep idle connections for 60 s. The server must keep them longer: if the server closed a connection
# first, a request that the proxy is sending at that moment would be lost.
_KEEP_ALIVE_S = 75


def make_server(settings: Settings) -> uvicorn.Server:
    """Return a server for the application, not started yet. Raises what `create_app` raises."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_level="warning",
        access_log=False,
        server_header=False,
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.predict_deadline_s) + 5,
        ws="none",
    )
    return DrainingServer(config, app.state.services.shutdown, app.state.connections)


def main() -> None:
    """Serve the API until SIGTERM or Ctrl-C."""
    logs.configure()
    freed_memory.give_back_large_pieces()
    if os.environ.get(_REMOVED_SETTING, "1") != "1":
        log.warning(
            f"{_REMOVED_SETTING} is ignored: one command starts one API process. To use more, start several containers "
            "behind a proxy (docs/deploy.md)"
        )
    with exit_with_a_sentence(), suppress(KeyboardInterrupt):
        settings = load_settings()
        prepare_folder(settings.var)
        make_server(settings).run()


if __name__ == "__main__":
    main()
