"""Checks API keys, and answers an address that sent many wrong ones by 429. Knows no routes."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from errors import EspalierError, KeyThrottled, Unauthorized

# An address may send so many wrong keys at once, and one more after each pause.
_WRONG_KEYS = 10
_PAUSE_S = 6.0
_ADDRESSES = 10_000
_IPV6_BITS = 64


@dataclass
class _Address:
    """How many wrong keys an address may still send as of `at`, and whether it ever sent the right one."""

    left: float
    at: float
    is_known: bool = False


class KeyGuard:
    """Knows the key. An address that never sent the right one is not even compared while it has to wait.

    One that did is always compared: many clients may share it behind a proxy, and one of them with an old key must not
    shut the others out.
    """

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key.encode()
        self._clock = clock
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def check(self, authorization: str, host: str) -> EspalierError | None:
        """Return why a request with this Authorization header, from this host, is refused; None if it is not."""
        kind, _, key = authorization.partition(" ")
        if not key:
            return Unauthorized("Expected the header 'Authorization: Bearer <API key>'. Received none.")
        address = self._address(host)
        if address.left < 1 and not address.is_known:
            return self._throttled(address)
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key):
            address.is_known = True
            return None
        if address.left < 1:
            return self._throttled(address)
        address.left -= 1
        return Unauthorized("The API key is wrong.")

    def _address(self, host: str) -> _Address:
        """Return what is known of an address, with what it may send by now. The least recently seen is forgotten."""
        now, name = self._clock(), _network(host)
        address = self._addresses.setdefault(name, _Address(_WRONG_KEYS, now))
        self._addresses.move_to_end(name)
        if len(self._addresses) > _ADDRESSES:
            self._addresses.popitem(last=False)
        address.left = min(_WRONG_KEYS, address.left + (now - address.at) / _PAUSE_S)
        address.at = now
        return address

    def _throttled(self, address: _Address) -> KeyThrottled:
        return KeyThrottled(
            "Too many requests with a wrong API key came from this address. Correct the key, and wait "
            f"{_PAUSE_S:.0f} s.",
            retry_after_s=(1 - address.left) * _PAUSE_S,
        )


def _network(host: str) -> str:
    """Return the part of an address that one client cannot choose freely."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(int(address) >> (128 - _IPV6_BITS))
