from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import records
from records import PRINCIPAL, digest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from artifacts.store import Digest
from errors import NoChampion, NotFound
from models import registry
from models import run as runs
from models.project import Principal
from models.registry import CHAMPION, Backbone, Model, ModelVersion, RegistryRevision, Weights
from models.session import Database
from recipes.catalogue import BackboneName


def add_version(session: Session, run_id: str, name: str = "flowers", *, can_be_champion: bool = True) -> ModelVersion:
    bundle, backbone = digest(f"bundle of {run_id}"), digest("backbone")
    return registry.add_model_version(
        session, PRINCIPAL, name, run_id, bundle, backbone, can_be_champion=can_be_champion
    )


def finished_version(session: Session, name: str = "flowers", *, can_be_champion: bool = True) -> ModelVersion:
    """Add a finished run with its model version."""
    run = records.running_run(session, records.ready_version(session, f"set of {records.count(session, runs.Run)}"))
    runs.succeed_run(session, run.id, {}, 1.0)
    return add_version(session, run.id, name, can_be_champion=can_be_champion)


def revision(session: Session) -> int:
    return session.scalars(select(RegistryRevision.revision)).one()


def backbone(content: str, **key: object) -> Backbone:
    fields = {
        "network": BackboneName.VGG16,
        "weights_sha256": digest("weights"),
        "cut": "block5",
        "size": 224,
        "export_version": 1,
    }
    return Backbone(sha256=digest(content), manifest={"made": content}, **{**fields, **key})


# --- models --------------------------------------------------------------------------------------------------------


def test_the_first_version_of_a_model_is_its_champion(database: Database) -> None:
    with database.writing() as session:
        first = finished_version(session)
        second = finished_version(session)
        other = finished_version(session, "trees")
    with database.reading() as session:
        model = registry.get_model(session, PRINCIPAL, "flowers")
        assert registry.get_alias(session, model, CHAMPION).id == first.id
        assert registry.get_aliases(session, model.id) == {first.id: [CHAMPION]}
        assert [version.id for version in registry.get_model_versions(session, model.id)] == [second.id, first.id]
        assert (first.number, second.number, other.number) == (1, 2, 1)
        assert registry.get_model_version(session, model, 2).id == second.id
        found = registry.find_run_version(session, second.run_id)
        assert found is not None and found.id == second.id
        assert registry.find_run_version(session, "run_0") is None


def test_a_bad_version_becomes_no_champion_by_itself_and_the_first_good_one_does(database: Database) -> None:
    with database.writing() as session:
        bad, worse, good, later = (
            finished_version(session, can_be_champion=is_good) for is_good in (False, False, True, True)
        )
        model = registry.get_model(session, PRINCIPAL, "flowers")
        assert registry.get_alias(session, model, CHAMPION).id == good.id
        alone = finished_version(session, "trees", can_be_champion=False)
        trees = registry.get_model(session, PRINCIPAL, "trees")
        with pytest.raises(
            NoChampion, match=r'PUT /api/v1/models/trees/aliases/champion with \{"version": 1\}'
        ) as caught:
            registry.get_alias(session, trees, CHAMPION)
        assert caught.value.extra == {"version": 1}
        registry.move_alias(session, trees, CHAMPION, alone)
        assert registry.get_alias(session, trees, CHAMPION).id == alone.id
        assert [version.number for version in (bad, worse, good, later)] == [1, 2, 3, 4]


def test_an_alias_is_made_and_moved(database: Database) -> None:
    with database.writing() as session:
        first, second = finished_version(session), finished_version(session)
        model = registry.get_model(session, PRINCIPAL, "flowers")
        registry.move_alias(session, model, "trial", first)
        registry.move_alias(session, model, CHAMPION, second)
    with database.reading() as session:
        assert registry.get_alias(session, model, "trial").id == first.id
        assert registry.get_alias(session, model, CHAMPION).id == second.id
    with database.writing() as session:
        registry.move_alias(session, model, "trial", second)
    with database.reading() as session:
        assert registry.get_aliases(session, model.id) == {second.id: [CHAMPION, "trial"]}


def test_what_is_not_there_is_not_found(database: Database) -> None:
    with database.writing() as session:
        finished_version(session)
        model = registry.get_model(session, PRINCIPAL, "flowers")
        with pytest.raises(NotFound, match="'trees'"):
            registry.get_model(session, PRINCIPAL, "trees")
        with pytest.raises(NotFound, match="'flowers'"):
            registry.get_model(session, Principal("prj_other"), "flowers")
        with pytest.raises(NotFound, match="no version 2"):
            registry.get_model_version(session, model, 2)
        with pytest.raises(NotFound, match="no alias 'trial'"):
            registry.get_alias(session, model, "trial")


def test_a_run_makes_one_version(database: Database) -> None:
    with database.writing() as session:
        version = finished_version(session)
    with pytest.raises(IntegrityError), database.writing() as session:
        add_version(session, version.run_id)
    with database.reading() as session:
        assert records.count(session, ModelVersion) == 1
        assert revision(session) == 1


def test_every_change_counts_the_revision_up(database: Database) -> None:
    with database.writing() as session:
        version = finished_version(session)
        assert revision(session) == 1
        finished_version(session)
        assert revision(session) == 2
        model = registry.get_model(session, PRINCIPAL, "flowers")
        registry.move_alias(session, model, "trial", version)
        assert revision(session) == 3
        registry.add_backbone(session, backbone("export"))
        assert revision(session) == 4

    def fail_half_way() -> None:
        with database.writing() as session:
            registry.move_alias(session, model, "other", version)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    with database.reading() as session:
        assert revision(session) == 4


def test_runs_that_finish_at_once_get_numbers_of_their_own(database: Database) -> None:
    with database.writing() as session:
        version = records.ready_version(session)
        run_ids = [records.running_run(session, version).id for _ in range(6)]
    together = threading.Barrier(len(run_ids))

    def finish(run_id: str) -> int:
        together.wait()
        with database.writing() as session:
            runs.succeed_run(session, run_id, {}, 1.0)
            return add_version(session, run_id).number

    with ThreadPoolExecutor(len(run_ids)) as pool:
        numbers = list(pool.map(finish, run_ids))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    with database.reading() as session:
        assert records.count(session, Model) == 1
        model = registry.get_model(session, PRINCIPAL, "flowers")
        assert registry.get_alias(session, model, CHAMPION).run_id == run_ids[numbers.index(1)]
        assert revision(session) == 6


# --- backbones and weights -----------------------------------------------------------------------------------------


def test_the_first_export_of_a_key_wins(database: Database) -> None:
    with database.writing() as session:
        assert registry.add_backbone(session, backbone("first")).sha256 == digest("first")
    with database.writing() as session:
        assert registry.add_backbone(session, backbone("second")).sha256 == digest("first")
        assert registry.add_backbone(session, backbone("first")).sha256 == digest("first")
    with database.reading() as session:
        key = (BackboneName.VGG16, digest("weights"), "block5", 224, 1)
        found = registry.find_backbone(session, *key)
        assert found is not None and (found.sha256, found.manifest) == (digest("first"), {"made": "first"})
        assert records.count(session, Backbone) == 1


def test_every_part_of_a_key_makes_another_backbone(database: Database) -> None:
    keys: list[dict[str, object]] = [
        {"network": BackboneName.VGG19},
        {"weights_sha256": digest("other weights")},
        {"cut": "block4"},
        {"size": 160},
        {"export_version": 2},
    ]
    with database.writing() as session:
        registry.add_backbone(session, backbone("first"))
        for key in keys:
            assert registry.add_backbone(session, backbone(str(key), **key)).sha256 == digest(str(key))
        assert records.count(session, Backbone) == 1 + len(keys)


def test_workers_that_export_at_once_agree_on_one(database: Database) -> None:
    together = threading.Barrier(4)

    def export(number: int) -> str:
        together.wait()
        with database.writing() as session:
            return registry.add_backbone(session, backbone(f"export {number}")).sha256

    with ThreadPoolExecutor(4) as pool:
        winners = set(pool.map(export, range(4)))
    with database.reading() as session:
        assert winners == set(session.scalars(select(Backbone.sha256))) and len(winners) == 1


def test_the_first_quantised_copy_serves_all_until_somebody_calibrates_anew(database: Database) -> None:
    def add(name: str, *, image_rule: int = 1, is_anew: bool = False) -> str:
        with database.writing() as session:
            row = registry.add_quantised_backbone(
                session, digest("export"), image_rule, digest(name), {"made": name}, is_anew=is_anew
            )
            return row.sha256

    def newest(image_rule: int = 1) -> tuple[str, int, dict[str, object]] | None:
        with database.reading() as session:
            found = registry.find_quantised_backbone(session, digest("export"), image_rule)
            return (found.sha256, found.generation, found.manifest) if found else None

    assert newest() is None
    assert add("first") == add("second") == digest("first")
    assert newest() == (digest("first"), 1, {"made": "first"})
    assert add("third", is_anew=True) == digest("third")
    assert add("fourth") == digest("third")
    assert newest() == (digest("third"), 2, {"made": "third"})
    assert add("first", is_anew=True) == digest("first")  # calibrating anew may come out as before
    assert newest() == (digest("first"), 3, {"made": "first"})
    assert newest(2) is None and add("of another rule", image_rule=2) == digest("of another rule")


def test_weights_are_found_by_network_and_name_and_replaced(database: Database) -> None:
    def put(content: str) -> None:
        with database.writing() as session:
            row = Weights(network=BackboneName.VGG16, name="mine", sha256=digest(content), source={"kind": content})
            registry.set_weights(session, row)

    def found(network: BackboneName, name: str) -> Digest | None:
        with database.reading() as session:
            row = registry.find_weights(session, network, name)
            return Digest(row.sha256) if row else None

    put("first")
    assert found(BackboneName.VGG16, "mine") == digest("first")
    put("second")
    assert found(BackboneName.VGG16, "mine") == digest("second")
    assert found(BackboneName.VGG16, "yours") is found(BackboneName.VGG19, "mine") is None
