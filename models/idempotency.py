"""Stored answers to requests with an `Idempotency-Key`: a repeated request receives the first answer again.

The transaction that makes a request's change also stores its answer. Until then, on PostgreSQL, a claim with an
expiring lease shows that the key is in use; the clock of the database measures leases. See the IETF draft "The
Idempotency-Key HTTP Header Field" (draft-ietf-httpapi-idempotency-key-header).
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, String, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from errors import KeyReused
from models.base import Base, Json, now
from models.project import Principal, owner

KEPT_FOR = timedelta(days=7)
LEASE = timedelta(seconds=45)


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


class Claim(Base):
    """The request that holds a key while it is being answered; `token` identifies it."""

    __tablename__ = "key_claim"

    project_id: Mapped[str] = owner(primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    token: Mapped[str] = mapped_column(String(32))
    expires_at: Mapped[datetime]


def try_claim(session: Session, principal: Principal, key: str, token: str) -> bool:
    """Claim a key on PostgreSQL; return False if another request's claim has not expired."""
    values = {"token": token, "expires_at": func.now() + LEASE}
    session.execute(delete(Claim).where(Claim.expires_at < func.now() - KEPT_FOR))
    claim = (
        insert(Claim)
        .values(project_id=principal.project_id, key=key, **values)
        .on_conflict_do_update(
            index_elements=[Claim.project_id, Claim.key], set_=values, where=Claim.expires_at < func.now()
        )
        .returning(Claim.token)
    )
    return session.scalar(claim) is not None


def renew_claims(session: Session, tokens: Collection[str]) -> None:
    """Extend the leases of claims that no other request has taken over."""
    session.execute(update(Claim).where(Claim.token.in_(tokens)).values(expires_at=func.now() + LEASE))


def confirm_claim(session: Session, token: str) -> bool:
    """Return whether a claim still holds its key, and lock it until the transaction ends."""
    return session.scalar(select(Claim.token).where(Claim.token == token).with_for_update()) is not None


def release_claim(session: Session, token: str) -> None:
    """Free the key of a claim."""
    session.execute(delete(Claim).where(Claim.token == token))


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
