"""The version resolver: which model version answers, also after an alias is moved and while the database is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import records
from fastapi.testclient import TestClient
from flat_models import PNG, CountingLoader, add_model, flat_bundle, serve
from waiting import until

from api.dependencies import Services
from api.version_resolver import REFRESH_EVERY_S, VersionResolver
from errors import NotFound, Unavailable
from inference.shelf import Shelf
from models import registry
from models.registry import CHAMPION
from models.session import Database

NAME = "flowers"


@pytest.fixture
def loads() -> Iterator[CountingLoader]:
    found = CountingLoader()
    yield found
    found.gate.set()


@pytest.fixture
def resolver(client: TestClient, services: Services, loads: CountingLoader) -> Iterator[VersionResolver]:
    """A resolver and a model with two versions on one backbone. The alias points to the first version."""
    backbone = services.store.put(b"a network")
    for seed in (1, 2):
        add_model(services, NAME, flat_bundle(backbone, seed=seed))
    resolver = VersionResolver(services.database, Shelf(services.store, 1, 10**9, loads), refresh_every_s=0.05)
    resolver.start()
    yield resolver
    loads.gate.set()
    resolver.close()


def move(services: Services, version: int, alias: str = CHAMPION) -> None:
    """Move an alias in the database, as another process would."""
    with services.database.writing() as session:
        model = registry.get_model(session, records.PRINCIPAL, NAME)
        registry.move_alias(session, model, alias, registry.get_model_version(session, model, version))


def answers(resolver: VersionResolver, alias: str = CHAMPION) -> int:
    return resolver.resolve(records.PRINCIPAL, NAME, None, alias).version


def test_an_alias_that_moved_is_followed_at_the_next_refresh_as_its_head_can_be_loaded(
    resolver: VersionResolver, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh, has_moved = resolver.refresh, threading.Event()
    answers_after_move: list[int] = []

    def refresh_and_record() -> None:
        is_after = has_moved.is_set()
        refresh()
        if is_after:
            answers_after_move.append(answers(resolver))

    monkeypatch.setattr(resolver, "refresh", refresh_and_record)
    first = resolver.resolve(records.PRINCIPAL, NAME, None, CHAMPION)
    assert first.version == 1
    resolver._shelf.predictor(first.bundle)
    move(services, 2)
    has_moved.set()
    until(lambda: answers_after_move)
    assert answers_after_move[0] == 2 and REFRESH_EVERY_S < 1
    moved = resolver.resolve(records.PRINCIPAL, NAME, None, CHAMPION)
    assert resolver._shelf.find(moved.bundle) is not None, "nobody waits for it"


def test_until_a_cold_backbone_is_warm_the_old_version_answers(
    resolver: VersionResolver, services: Services, loads: CountingLoader
) -> None:
    cold = services.store.put(b"another network")
    loads.held.add(cold)
    add_model(services, NAME, flat_bundle(cold, seed=3))
    assert answers(resolver) == 1
    move(services, 3)
    until(lambda: cold in loads.seen)
    assert answers(resolver) == 1 and not resolver.serves(records.PRINCIPAL, NAME, CHAMPION, 3)
    loads.gate.set()
    until(lambda: answers(resolver) == 3)
    assert loads.seen.count(cold) == 1


def test_an_alias_moved_again_meanwhile_goes_where_it_points_last(
    resolver: VersionResolver, services: Services, loads: CountingLoader
) -> None:
    cold = services.store.put(b"another network")
    loads.held.add(cold)
    add_model(services, NAME, flat_bundle(cold, seed=3))
    resolver._shelf.predictor(resolver.resolve(records.PRINCIPAL, NAME, None, CHAMPION).bundle)
    move(services, 3)
    until(lambda: cold in loads.seen)
    move(services, 2)
    until(lambda: answers(resolver) == 2)
    loads.gate.set()
    until(lambda: cold in [one.digest for one in resolver._shelf.loaded()])
    time.sleep(0.2)
    assert answers(resolver) == 2


def test_a_version_that_cannot_be_served_leaves_the_old_one_and_is_tried_again(
    resolver: VersionResolver, services: Services, loads: CountingLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.version_resolver.RETRY_AFTER_S", 0.1)
    network = services.store.put(b"another network")
    add_model(services, NAME, flat_bundle(network, seed=3))
    whole = services.store.path(network).read_bytes()
    services.store.path(network).write_bytes(b"harmed")
    assert answers(resolver) == 1
    move(services, 3)
    time.sleep(0.5)
    assert answers(resolver) == 1 and network not in loads.seen
    services.store.path(network).write_bytes(whole)
    until(lambda: answers(resolver) == 3)


def test_a_version_whose_golden_output_does_not_come_out_leaves_the_old_one(
    resolver: VersionResolver, services: Services, loads: CountingLoader
) -> None:
    bundle = flat_bundle(services.store.put(b"another network"), seed=3)
    add_model(services, NAME, replace(bundle, golden_output=bundle.golden_output + 100))
    assert answers(resolver) == 1
    move(services, 3)
    until(lambda: bundle.backbone in loads.seen)
    time.sleep(0.3)
    assert answers(resolver) == 1


def test_names_that_are_known_are_answered_while_the_database_is_away(
    resolver: VersionResolver, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(resolver) == 1
    assert resolver.resolve(records.PRINCIPAL, NAME, 2, CHAMPION).version == 2

    def away(self: Database) -> None:
        raise Unavailable("The database is away.")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "reading", away)
        time.sleep(0.2)
        assert answers(resolver) == 1
        assert resolver.resolve(records.PRINCIPAL, NAME, 2, CHAMPION).version == 2
        with pytest.raises(Unavailable):
            resolver.resolve(records.PRINCIPAL, NAME, 1, CHAMPION)
    resolver._shelf.predictor(resolver.resolve(records.PRINCIPAL, NAME, None, CHAMPION).bundle)
    move(services, 2)
    until(lambda: answers(resolver) == 2)


def test_what_does_not_exist_is_told_and_found_once_it_does(resolver: VersionResolver, services: Services) -> None:
    with pytest.raises(NotFound, match="no alias 'beta'"):
        answers(resolver, "beta")
    with pytest.raises(NotFound, match="no version 9"):
        resolver.resolve(records.PRINCIPAL, NAME, 9, CHAMPION)
    move(services, 2, "beta")
    assert answers(resolver, "beta") == 2


def test_over_http_an_alias_says_who_answers_and_no_request_fails_meanwhile(
    client: TestClient, services: Services, loads: CountingLoader
) -> None:
    warm, cold = services.store.put(b"a network"), services.store.put(b"another network")
    loads.held.add(cold)
    for seed, backbone in ((1, warm), (2, warm), (3, cold)):
        add_model(services, NAME, flat_bundle(backbone, seed=seed))
    serve(client, services.settings, loads)
    url = f"/api/v1/models/{NAME}"

    def predicted() -> int:
        answer = client.post(f"{url}/predict", content=PNG)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["version"])

    assert predicted() == 1
    assert client.put(f"{url}/aliases/champion", json={"version": 2}).json()["serving"] == "new"
    assert predicted() == 2
    assert client.put(f"{url}/aliases/champion", json={"version": 3}).json()["serving"] == "old"
    assert predicted() == 2
    loads.gate.set()
    until(lambda: predicted() == 3)
    assert client.put(f"{url}/aliases/champion", json={"version": 3}).json()["serving"] == "new"
