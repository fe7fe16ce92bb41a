"""Requests that may be sent again: with an `Idempotency-Key`, what was answered before is answered again.

The key is held while the request is answered. What is answered is kept in the transaction that makes it true, so that
a process that dies leaves either both or neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.dependencies import PrincipalDep, Services, ServicesDep
from errors import InFlight
from models import idempotency
from models.project import Principal

Shape = TypeVar("Shape", bound=BaseModel)

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern="^[ -~]+$",
        description="The same request with the same key changes nothing twice; its answer is kept for 7 days.",
    ),
]


class IdempotentRequest:
    """One request with its key, if it has one."""

    def __init__(self, services: Services, principal: Principal, key: str | None, address: str) -> None:
        self._services = services
        self._principal = principal
        self._key = key
        self._address = address
        self._fingerprint = ""

    def find_answer(self, shape: type[Shape], payload: BaseModel | str | None, response: Response) -> Shape | None:
        """Return what this request was answered before; None if it is new or has no key.

        `payload` is its body, or what stands for it. Raises KeyReused if the key came with another request.
        """
        if self._key is None:
            return None
        sent = payload.model_dump(mode="json", exclude_unset=True) if isinstance(payload, BaseModel) else payload
        self._fingerprint = hashlib.sha256(json.dumps([self._address, sent], sort_keys=True).encode()).hexdigest()
        with self._services.database.reading() as session:
            answer = idempotency.find_answer(session, self._principal, self._key, self._fingerprint)
        if answer is None:
            return None
        response.headers["Idempotency-Replayed"] = "true"
        if answer.location is not None:
            response.headers["Location"] = answer.location
        return shape.model_validate(answer.body)

    def keep_answer(self, session: Session, shown: BaseModel, location: str | None) -> None:
        """Keep what is answered, if the request has a key."""
        if self._key is not None:
            body = shown.model_dump(mode="json")
            idempotency.save_answer(session, self._principal, self._key, self._fingerprint, location, body)

    def is_known(self, session: Session) -> bool:
        """Say whether a request with this key was answered before; whether it was this one, `earlier` tells."""
        return self._key is not None and idempotency.has_answer(session, self._principal, self._key)


def idempotent_request(
    request: Request, services: ServicesDep, principal: PrincipalDep, key: Key = None
) -> Iterator[IdempotentRequest]:
    """Hold the request's key until it is answered. Raises InFlight."""
    address = f"{request.method} {request.url.path}?{request.url.query}"
    if key is None:
        yield IdempotentRequest(services, principal, None, address)
        return
    with services.database.exclusive(f"idempotency {principal.project_id} {key}") as is_held:
        if not is_held:
            raise InFlight(f"A request with the Idempotency-Key {key!r} is being answered. Try again in a moment.")
        yield IdempotentRequest(services, principal, key, address)


# The key is free before the answer leaves: whoever has the answer may ask again at once.
IdempotencyDep = Annotated[IdempotentRequest, Depends(idempotent_request, scope="function")]
