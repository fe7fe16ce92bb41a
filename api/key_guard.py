"""Checks the API key of requests, and limits how many wrong keys one address may send. Knows no routes."""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address

from errors import EspalierError, KeyThrottled, Unauthorized

# An address may send this many wrong keys at once, and after that one in each pause.
_WRONG_KEYS = 10
_PAUSE_S = 6.0
# Number of addresses that are remembered.
_ADDRESSES = 10_000
# Providers give each IPv6 client a network of this many leading bits, in which it may choose any address.
_IPV6_BITS = 64


@dataclass
class _Address:
    """What is known of one address.

    Attributes:
        left: how many wrong keys it may still send, as of the time `at`; fractions grow during a pause.
        at: the time of its last request, in seconds.
        is_known: whether it has ever sent the right key.
    """

    left: float
    at: float
    is_known: bool = False


class KeyGuard:
    """Compares the keys of requests with the API key.

    After too many wrong keys, an address has to wait. While it waits, its keys are not compared, so that it cannot try
    more of them. The exception is an address that has sent the right key before. Its keys are always compared: many
    clients may share the address behind a proxy, and one client with an old key must not lock out the others.
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
        """Return what is known of an address, with `left` as of now. Forget the one that was not seen for longest."""
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
    """Return the part of an address that one client cannot choose freely, as a key of a dictionary."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:  # how a socket for both versions names an IPv4 client
        return str(address.ipv4_mapped)
    return str(int(address) >> (128 - _IPV6_BITS))
