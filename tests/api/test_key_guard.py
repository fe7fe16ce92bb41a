"""How many wrong keys an address may send, by a clock that is turned by hand."""

from __future__ import annotations

import pytest

from api.key_guard import KeyGuard
from errors import KeyThrottled, Unauthorized

RIGHT, WRONG = "Bearer the right key", "Bearer another key"


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def guard(now: list[float]) -> KeyGuard:
    return KeyGuard("the right key", lambda: now[0])


def wrong(guard: KeyGuard, times: int, host: str = "10.0.0.1") -> list[type]:
    return [type(guard.check(WRONG, host)) for _ in range(times)]


def test_after_a_pause_one_more_key_is_compared(guard: KeyGuard, now: list[float]) -> None:
    assert wrong(guard, 11) == [Unauthorized] * 10 + [KeyThrottled]
    now[0] = 6.0
    assert guard.check(RIGHT, "10.0.0.1") is None


def test_another_address_is_not_throttled(guard: KeyGuard) -> None:
    wrong(guard, 20)
    assert guard.check(RIGHT, "10.0.0.2") is None


def test_a_client_with_an_old_key_does_not_shut_out_the_others_behind_its_proxy(guard: KeyGuard) -> None:
    assert guard.check(RIGHT, "10.0.0.1") is None
    assert wrong(guard, 11) == [Unauthorized] * 10 + [KeyThrottled]
    assert guard.check(RIGHT, "10.0.0.1") is None


def test_all_addresses_of_one_ipv6_client_count_as_one(guard: KeyGuard) -> None:
    found = [wrong(guard, 1, f"2001:db8::{number:x}") for number in range(11)]
    assert found[-1] == [KeyThrottled]
    assert wrong(guard, 1, "2001:db8:0:1::1") == [Unauthorized]


def test_ipv4_clients_of_a_socket_for_both_versions_count_one_by_one(guard: KeyGuard) -> None:
    assert wrong(guard, 11, "::ffff:10.0.0.1")[-1] is KeyThrottled
    assert guard.check(RIGHT, "::ffff:10.0.0.2") is None
    assert wrong(guard, 1, "10.0.0.1") == [KeyThrottled]


def test_only_so_many_addresses_are_remembered(guard: KeyGuard) -> None:
    wrong(guard, 11)
    for number in range(10_000):
        guard.check(WRONG, f"host-{number}")
    assert wrong(guard, 1) == [Unauthorized]
