"""Stored answers to requests with an `Idempotency-Key`: a repeated request receives the first answer again.

The transaction that makes a request's change also stores its answer. See the IETF draft "The Idempotency-Key HTTP
Header Field" (draft-ietf-httpapi-idempotency-key-header).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, String, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from errors import KeyReused
from models.base import Base, Json, now
from models.project import Principal, owner

KEPT_FOR = timedelta(days=7)


class Answer(Base):
    """The answer to the first request with an Idempotency-Key.

    `fingerprint` is a hash of that request: a later request with the key is a repetition if its hash is equal.
    """

    __tablename__ = "answer"

    project_id: Mapped[str] = owner(primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    location: Mapped[str | None] = mapped_column(String(255))
    body: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


def has_answer(session: Session, principal: Principal, key: str) -> bool:
    """Return whether an answer to any request with this Idempotency-Key is stored."""
    return _find(session, principal, key) is not None


def find_answer(session: Session, principal: Principal, key: str, fingerprint: str) -> Answer | None:
    """Return the stored answer to a request, or None. Raises KeyReused if a different request used the key."""
    answer = _find(session, principal, key)
    if answer is None:
        return None
    if answer.fingerprint != fingerprint:
        raise KeyReused(
            f"The Idempotency-Key {key!r} was already used by a different request. Send that request, or use a new key."
        )
    return answer


def save_answer(
    session: Session, principal: Principal, key: str, fingerprint: str, location: str | None, body: dict[str, Any]
) -> None:
    """Store the answer to a request. Call it in the transaction that makes the change which the answer reports."""
    drop_expired_answers(session)
    session.add(Answer(project_id=principal.project_id, key=key, fingerprint=fingerprint, location=location, body=body))
    session.flush()


def drop_expired_answers(session: Session) -> int:
    """Delete the responses stored for idempotency keys that are older than `KEPT_FOR`; return how many were deleted."""
    dropped = session.execute(delete(Answer).where(Answer.created_at < now() - KEPT_FOR))
    assert isinstance(dropped, CursorResult)
    return dropped.rowcount


def count_expired_answers(session: Session) -> int:
    """Return how many stored answers are older than `KEPT_FOR`."""
    return session.scalar(select(func.count()).select_from(Answer).where(Answer.created_at < now() - KEPT_FOR)) or 0


def _find(session: Session, principal: Principal, key: str) -> Answer | None:
    answer = session.get(Answer, (principal.project_id, key))
    return None if answer is None or answer.created_at < now() - KEPT_FOR else answer
