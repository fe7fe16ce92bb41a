"""The route that streams the events of a run while it trains, as server-sent events. Reads them from the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api import problems
from api.dependencies import PrincipalDep, Services, ServicesDep
from api.schemas import LARGEST_NUMBER
from errors import Unavailable
from models import run as runs
from models.run import EventKind, RunEvent

_LOOK_EVERY_S = 0.5
_AWAY_S = 2.0

router = APIRouter(prefix="/api/v1/runs", tags=["runs"])


After = Annotated[int, Header(alias="Last-Event-ID", ge=0, le=LARGEST_NUMBER)]


def existing_run_id(services: ServicesDep, principal: PrincipalDep, run_id: str, after: After = 0) -> str:
    """Check that a run exists and that the client has not received all its events; return the run's id.

    This is a dependency, because a stream that has begun can no longer send a status. Raises NotFound, or HTTPException
    with status 204 if the run is over and the client has received its last event. A browser reconnects after every end
    of a stream, unless it gets status 204.
    """
    with services.database.reading() as session:
        run = runs.get_run(session, principal, run_id)
        if run.state.is_final and after and not runs.get_events(session, run.id, after, limit=1):
            raise HTTPException(204)
        return run.id


_NO_MORE: dict[int | str, dict[str, Any]] = {
    204: {"description": "The run is over, and the client has received its last event. No body."}
}


@router.get("/{run_id}/events", response_class=EventSourceResponse, responses=_NO_MORE)
async def stream_events(
    services: ServicesDep,
    run_id: Annotated[str, Depends(existing_run_id)],
    after: After = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Stream the `progress`, `epoch`, `fold` and `state` events of a run until the run is over.

    The stream starts with the first event, or with the event after `Last-Event-ID`. If the run is over and has no
    further events, the answer is 204.
    """
    while True:
        try:
            events, is_over = await run_in_threadpool(_read_events, services, run_id, after)
        except Unavailable:  # an error would end the stream, and a browser does not reconnect after an error
            await asyncio.sleep(_AWAY_S)
            continue
        for event in events:
            after = event.seq
            yield ServerSentEvent(event=event.kind.value, id=str(event.seq), data=_payload(event))
        if is_over and not events:
            return
        if not events:
            await asyncio.sleep(_LOOK_EVERY_S)


def _read_events(services: Services, run_id: str, after: int) -> tuple[list[RunEvent], bool]:
    """Return the events of a run after number `after`, and whether the run is over."""
    with services.database.reading() as session:
        # The state is read before the events. On PostgreSQL, a run may end between the two queries. If the events were
        # read first, the last one would be missed.
        is_over = session.get_one(runs.Run, run_id).state.is_final
        return list(runs.get_events(session, run_id, after)), is_over


def _payload(event: RunEvent) -> dict[str, object]:
    payload = {**event.payload, "at": event.at.isoformat()}
    if event.kind is EventKind.STATE:
        payload["error"] = problems.stored_problem(event.payload.get("error"))
    return payload
