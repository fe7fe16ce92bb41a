"""Requests with an `Idempotency-Key`: a repeated request gets the answer of the first one and changes nothing.

A request claims its key while it is being answered (`api.key_claims`). The answer is stored in the transaction that
makes the request's change, so that a process that dies leaves either both or neither.
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
from api.key_claims import KeyClaim
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
        description="A repeated request with the same key changes nothing and gets the first answer, for 7 days.",
    ),
]


class IdempotentRequest:
    """A request that may have an `Idempotency-Key`. Without a key, no answer is found or stored."""

    def __init__(
        self, services: Services, principal: Principal, key: str | None, address: str, claim: KeyClaim | None = None
    ) -> None:
        self._services = services
        self._principal = principal
        self._key = key
        self._address = address
        self._claim = claim
        self._fingerprint = ""

    def find_answer(self, shape: type[Shape], payload: BaseModel | str | None, response: Response) -> Shape | None:
        """Return the stored answer to this request, or None if the request is new or has no key.

        Args:
            shape: the type of the answer.
            payload: the body of the request, or the digest of an uploaded file.
            response: receives the headers of the stored answer.

        Raises:
            KeyReused: the key was used for a different request before.
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
        """Store the answer to this request, if it has a key. Call it in the transaction that makes the change.

        Raises InFlight if another request has taken over the key.
        """
        if self._key is not None:
            if self._claim is not None:
                self._claim.confirm(session)
            body = shown.model_dump(mode="json")
            idempotency.save_answer(session, self._principal, self._key, self._fingerprint, location, body)

    def is_known(self, session: Session) -> bool:
        """Return whether any request with this key was answered before.

        `find_answer` tells whether that request was the same as this one.
        """
        return self._key is not None and idempotency.has_answer(session, self._principal, self._key)


def idempotent_request(
    request: Request, services: ServicesDep, principal: PrincipalDep, key: Key = None
) -> Iterator[IdempotentRequest]:
    """Claim the Idempotency-Key of a request until the request is answered, and yield the request.

    Raises InFlight if another request with the key is being answered.
    """
    address = f"{request.method} {request.url.path}?{request.url.query}"
    if key is None:
        yield IdempotentRequest(services, principal, None, address)
        return
    with services.key_claims.hold(principal, key) as claim:
        if claim is None:
            raise InFlight(f"A request with the Idempotency-Key {key!r} is being answered. Try again in a moment.")
        yield IdempotentRequest(services, principal, key, address, claim)


# Scope "function" releases the key before the answer is sent, so that a client with the answer can repeat the request.
IdempotencyDep = Annotated[IdempotentRequest, Depends(idempotent_request, scope="function")]
