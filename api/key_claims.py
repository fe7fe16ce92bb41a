"""Claims of Idempotency-Keys while their requests are being answered, which may take as long as an upload.

On SQLite, a claim is a lock on a file: it costs no write, and the kernel frees it with its process. On PostgreSQL, it
is a row with an expiring lease (`models.idempotency`), since a lock would hold a connection during the whole upload. A
thread renews the leases of this process, so a process that dies frees its keys within `LEASE`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog
import uuid_utils
from sqlalchemy.orm import Session

from errors import DiskFull, InFlight, Unavailable
from models import idempotency
from models.project import Principal
from models.session import Database

RENEW_EVERY_S = 10.0

log = structlog.get_logger()


class KeyClaim:
    """The claim of one request on its Idempotency-Key."""

    def __init__(self, token: str | None) -> None:
        """`token` identifies the row of the claim; None if the claim is a lock."""
        self._token = token

    def confirm(self, session: Session) -> None:
        """Keep the claim until this transaction ends. Raises InFlight if another request has taken it over."""
        if self._token is not None and not idempotency.confirm_claim(session, self._token):
            raise InFlight(
                "Another request with this Idempotency-Key has taken its place, because this one could not reach the "
                "database for a while. This one changed nothing. Send it again."
            )


class KeyClaims:
    """The claims of all requests that this process is answering."""

    def __init__(self, database: Database, renew_every_s: float = RENEW_EVERY_S) -> None:
        self._database = database
        self._renew_every_s = renew_every_s
        self._tokens: set[str] = set()
        self._ending = threading.Event()
        self._renewing: threading.Thread | None = None

    def start(self) -> None:
        """Start to renew leases. On SQLite there are none."""
        if not self._database.is_sqlite:
            self._renewing = threading.Thread(target=self._renew, name="key-claims", daemon=True)
            self._renewing.start()

    def close(self) -> None:
        """Stop renewing."""
        self._ending.set()
        if self._renewing is not None:
            self._renewing.join()

    @contextmanager
    def hold(self, principal: Principal, key: str) -> Iterator[KeyClaim | None]:
        """Hold a key for the block; yield None if another request of any process holds it.

        Raises Unavailable if the database cannot be reached.
        """
        if self._database.is_sqlite:
            with self._database.exclusive(f"idempotency {principal.project_id} {key}") as is_held:
                yield KeyClaim(None) if is_held else None
            return
        token = uuid_utils.uuid7().hex
        with self._database.writing() as session:
            is_held = idempotency.try_claim(session, principal, key, token)
        if not is_held:
            yield None
            return
        self._tokens.add(token)
        try:
            yield KeyClaim(token)
        finally:
            self._tokens.discard(token)
            with suppress(Unavailable, DiskFull), self._database.writing() as session:  # else its lease expires
                idempotency.release_claim(session, token)

    def _renew(self) -> None:
        while not self._ending.wait(self._renew_every_s):
            tokens = list(self._tokens)
            if not tokens:
                continue
            try:
                with self._database.writing() as session:
                    idempotency.renew_claims(session, tokens)
            except Exception as error:  # whatever it is, the next renewal may succeed
                log.warning("claims of Idempotency-Keys not renewed", claims=len(tokens), error=str(error))
