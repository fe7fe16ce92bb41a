"""Which version answers: kept in memory, moved within a second, and the old one stays until the new one is warm."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import records
from fastapi.testclient import TestClient
from flat import PNG, Loads, add_model, flat_bundle, serve
from waiting import until

from api.dependencies import Services
from api.switchboard import LOOK_EVERY_S, Switchboard
from errors import NotFound, Unavailable
from inference.shelf import Shelf
from models import registry
from models.registry import CHAMPION
from models.session import Database

NAME = "flowers"


@pytest.fixture
def loads() -> Iterator[Loads]:
    found = Loads()
    yield found
    found.gate.set()


@pytest.fixture
def board(client: TestClient, services: Services, loads: Loads) -> Iterator[Switchboard]:
    """A process of its own, with a model of two versions on one backbone whose alias is at the first."""
    backbone = services.store.put(b"a network")
    for seed in (1, 2):
        add_model(services, NAME, flat_bundle(backbone, seed=seed))
    board = Switchboard(services.database, Shelf(services.store, 1, 10**9, loads), look_every_s=0.05)
    board.start()
    yield board
    loads.gate.set()
    board.close()


def move(services: Services, version: int, alias: str = CHAMPION) -> None:
    """Move an alias as another process does."""
    with services.database.writing() as session:
        model = registry.get_model(session, records.PRINCIPAL, NAME)
        registry.move_alias(session, model, alias, registry.get_model_version(session, model, version))


def answers(board: Switchboard, alias: str = CHAMPION) -> int:
    return board.find(records.PRINCIPAL, NAME, None, alias).version


def test_an_alias_that_moved_is_followed_at_the_next_look_as_its_head_can_be_loaded(
    board: Switchboard, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, has_moved = board.look, threading.Event()
    after_looks: list[int] = []

    def look_and_tell() -> None:
        is_after = has_moved.is_set()
        look()
        if is_after:
            after_looks.append(answers(board))

    monkeypatch.setattr(board, "look", look_and_tell)
    first = board.find(records.PRINCIPAL, NAME, None, CHAMPION)
    assert first.version == 1
    board._shelf.predictor(first.bundle)
    move(services, 2)
    has_moved.set()
    until(lambda: after_looks)
    assert after_looks[0] == 2 and LOOK_EVERY_S < 1
    moved = board.find(records.PRINCIPAL, NAME, None, CHAMPION)
    assert board._shelf.find(moved.bundle) is not None, "nobody waits for it"


def test_until_a_cold_backbone_is_warm_the_old_version_answers(
    board: Switchboard, services: Services, loads: Loads
) -> None:
    cold = services.store.put(b"another network")
    loads.held.add(cold)
    add_model(services, NAME, flat_bundle(cold, seed=3))
    assert answers(board) == 1
    move(services, 3)
    until(lambda: cold in loads.seen)
    assert answers(board) == 1 and not board.serves(records.PRINCIPAL, NAME, CHAMPION, 3)
    loads.gate.set()
    until(lambda: answers(board) == 3)
    assert loads.seen.count(cold) == 1


def test_an_alias_moved_again_meanwhile_goes_where_it_points_last(
    board: Switchboard, services: Services, loads: Loads
) -> None:
    cold = services.store.put(b"another network")
    loads.held.add(cold)
    add_model(services, NAME, flat_bundle(cold, seed=3))
    board._shelf.predictor(board.find(records.PRINCIPAL, NAME, None, CHAMPION).bundle)
    move(services, 3)
    until(lambda: cold in loads.seen)
    move(services, 2)
    until(lambda: answers(board) == 2)
    loads.gate.set()
    until(lambda: cold in [one.digest for one in board._shelf.loaded()])
    time.sleep(0.2)
    assert answers(board) == 2


def test_a_version_that_cannot_be_served_leaves_the_old_one_and_is_tried_again(
    board: Switchboard, services: Services, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.switchboard.AGAIN_S", 0.1)
    network = services.store.put(b"another network")
    add_model(services, NAME, flat_bundle(network, seed=3))
    whole = services.store.path(network).read_bytes()
    services.store.path(network).write_bytes(b"harmed")
    assert answers(board) == 1
    move(services, 3)
    time.sleep(0.5)
    assert answers(board) == 1 and network not in loads.seen
    services.store.path(network).write_bytes(whole)
    until(lambda: answers(board) == 3)


def test_a_version_whose_golden_output_does_not_come_out_leaves_the_old_one(
    board: Switchboard, services: Services, loads: Loads
) -> None:
    bundle = flat_bundle(services.store.put(b"another network"), seed=3)
    add_model(services, NAME, replace(bundle, golden_output=bundle.golden_output + 100))
    assert answers(board) == 1
    move(services, 3)
    until(lambda: bundle.backbone in loads.seen)
    time.sleep(0.3)
    assert answers(board) == 1


def test_names_that_are_known_are_answered_while_the_database_is_away(
    board: Switchboard, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(board) == 1
    assert board.find(records.PRINCIPAL, NAME, 2, CHAMPION).version == 2

    def away(self: Database) -> None:
        raise Unavailable("The database is away.")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "reading", away)
        time.sleep(0.2)
        assert answers(board) == 1
        assert board.find(records.PRINCIPAL, NAME, 2, CHAMPION).version == 2
        with pytest.raises(Unavailable):
            board.find(records.PRINCIPAL, NAME, 1, CHAMPION)
    board._shelf.predictor(board.find(records.PRINCIPAL, NAME, None, CHAMPION).bundle)
    move(services, 2)
    until(lambda: answers(board) == 2)


def test_what_does_not_exist_is_told_and_found_once_it_does(board: Switchboard, services: Services) -> None:
    with pytest.raises(NotFound, match="no alias 'beta'"):
        answers(board, "beta")
    with pytest.raises(NotFound, match="no version 9"):
        board.find(records.PRINCIPAL, NAME, 9, CHAMPION)
    move(services, 2, "beta")
    assert answers(board, "beta") == 2


def test_over_http_an_alias_says_who_answers_and_no_request_fails_meanwhile(
    client: TestClient, services: Services, loads: Loads
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
