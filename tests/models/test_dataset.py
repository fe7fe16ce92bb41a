from __future__ import annotations

import pytest
import records
from records import PRINCIPAL, accepted, digest
from sqlalchemy import select

from artifacts.layout import Split
from artifacts.manifest import Row
from errors import DatasetRefused, NameTaken, NotFound, NotReady, Refused
from models import dataset as datasets
from models.dataset import Dataset, DatasetState, DatasetVersion, Image, IngestedImage, Membership
from models.job import Job
from models.project import Principal, Project
from models.session import Database
from recipes.defaults import ClassCount
from recipes.recipe import Task


def paths(database: Database, version_id: str) -> list[str]:
    with database.reading() as session:
        query = select(Membership.path).where(Membership.version_id == version_id).order_by(Membership.path)
        return list(session.scalars(query))


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_name_is_taken_until_its_data_set_is_deleted(database: Database) -> None:
    with database.writing() as session:
        first = datasets.create_dataset(session, PRINCIPAL, "flowers")
        with pytest.raises(NameTaken, match=first.id):
            datasets.create_dataset(session, PRINCIPAL, "flowers")
        datasets.delete_dataset(first)
    with database.writing() as session:
        with pytest.raises(NotFound, match=first.id):
            datasets.get_dataset(session, PRINCIPAL, first.id)
        second = datasets.create_dataset(session, PRINCIPAL, "flowers")
        assert datasets.get_dataset(session, PRINCIPAL, second.id) is second
        datasets.delete_dataset(second)
    with database.reading() as session:  # two deleted ones of one name are in nobody's way
        assert records.count(session, Dataset) == 2


def test_a_data_set_of_which_nothing_was_taken_leaves_its_name_to_the_next(database: Database) -> None:
    error = DatasetRefused("No images.").record()
    with database.writing() as session:
        first = records.waiting_version(session)
        with pytest.raises(NameTaken):
            datasets.create_dataset(session, PRINCIPAL, "flowers")
        datasets.mark_rejected(session, first.id, error)
        datasets.check_name(session, PRINCIPAL, "flowers")
        assert datasets.get_dataset(session, PRINCIPAL, first.dataset_id).name == "flowers", "until it is replaced"
    with database.writing() as session:
        second = records.ready_version(session)
        assert [job.kind for job in session.scalars(select(Job).where(Job.subject_id == first.dataset_id))] == ["purge"]
        with pytest.raises(NotFound):
            datasets.get_dataset(session, PRINCIPAL, first.dataset_id)
        found = datasets.get_dataset(session, PRINCIPAL, second.dataset_id)
        datasets.mark_rejected(session, datasets.add_version(session, found, digest("more")).id, error)
        with pytest.raises(NameTaken, match=found.id):  # its first version is ready
            datasets.create_dataset(session, PRINCIPAL, "flowers")


def test_another_project_sees_neither_data_sets_nor_their_names(database: Database) -> None:
    with database.writing() as session:
        session.add(Project(id="prj_other", name="other"))
        session.flush()
        mine = datasets.create_dataset(session, PRINCIPAL, "flowers")
        other = Principal("prj_other")
        theirs = datasets.create_dataset(session, other, "flowers")
        with pytest.raises(NotFound):
            datasets.get_dataset(session, other, mine.id)
        with pytest.raises(NotFound):
            datasets.get_dataset(session, PRINCIPAL, theirs.id)


# --- versions ------------------------------------------------------------------------------------------------------


def test_versions_count_from_one_and_build_on_the_newest_ready_one(database: Database) -> None:
    with database.writing() as session:
        first = records.ready_version(session)
        dataset = records.dataset_of(session, first)
        second = datasets.add_version(session, dataset, digest("more"))
        datasets.start_ingest(session, second.id)
        datasets.mark_rejected(session, second.id, DatasetRefused("too few").record())
        third = records.make_ready(session, datasets.add_version(session, dataset, digest("other")))
        fourth = datasets.add_version(session, dataset, digest("last"))
        versions = datasets.get_versions(session, dataset.id)
        assert [version.number for version in versions] == [4, 3, 2, 1]
        assert [version.parent_id for version in versions] == [third.id, first.id, first.id, None]
        assert datasets.current_version(versions) is third
        assert (fourth.state, fourth.archive_sha256) == (DatasetState.UPLOADED, digest("last"))


def test_a_version_waits_until_the_one_before_is_in(database: Database) -> None:
    with database.writing() as session:
        version = records.waiting_version(session)
        dataset = records.dataset_of(session, version)
        for _ in ("uploaded", "ingesting"):
            with pytest.raises(NotReady, match="still ingesting"):
                datasets.add_version(session, dataset, digest("more"))
            datasets.start_ingest(session, version.id)
            session.flush()
        datasets.mark_rejected(session, version.id, {})
        assert datasets.add_version(session, dataset, digest("more")).number == 2


def test_a_data_set_shows_its_newest_ready_version_else_its_newest(database: Database) -> None:
    with database.writing() as session:
        version = records.waiting_version(session)
        dataset = records.dataset_of(session, version)
        assert datasets.current_version(datasets.get_versions(session, dataset.id)) is version
        records.make_ready(session, version)
        datasets.add_version(session, dataset, digest("more"))
        assert datasets.current_version(datasets.get_versions(session, dataset.id)) is version


def test_only_a_ready_version_may_be_trained_on(database: Database) -> None:
    with database.writing() as session:
        version = records.waiting_version(session)
        dataset = records.dataset_of(session, version)
        with pytest.raises(NotReady, match=r"is uploaded\. Wait"):
            datasets.ready_version(session, dataset, None)
        datasets.start_ingest(session, version.id)
        with pytest.raises(NotReady, match=r"is ingesting\. Wait"):
            datasets.ready_version(session, dataset, 1)
        records.make_ready(session, version)
        second = datasets.add_version(session, dataset, digest("more"))
        assert datasets.ready_version(session, dataset, None) is version
        assert datasets.ready_version(session, dataset, 1) is version
        with pytest.raises(NotReady, match=r"is uploaded\. Wait"):
            datasets.ready_version(session, dataset, 2)
        with pytest.raises(NotFound, match="no version 3"):
            datasets.ready_version(session, dataset, 3)
        datasets.mark_rejected(session, second.id, DatasetRefused("Received 1 class.").record())
        with pytest.raises(NotReady, match="cannot be trained on: Received 1 class"):
            datasets.ready_version(session, dataset, 2)


# --- states --------------------------------------------------------------------------------------------------------


def test_a_version_that_is_closed_is_not_ingested_again(database: Database) -> None:
    with database.writing() as session:
        ready = records.ready_version(session, "ready")
        rejected = records.waiting_version(session, "rejected")
        datasets.mark_rejected(session, rejected.id, {})
        withdrawn = records.waiting_version(session, "withdrawn")
        datasets.cancel_ingest(session, withdrawn.id)
        session.flush()
        for version in (ready, rejected, withdrawn):
            with pytest.raises(RuntimeError, match="not waiting for ingest"):
                datasets.start_ingest(session, version.id)


def test_an_interrupted_version_waits_again(database: Database) -> None:
    with database.writing() as session:
        version = records.waiting_version(session)
        datasets.start_ingest(session, version.id)
        session.flush()
        datasets.requeue_ingest(session, version.id)
        session.refresh(version)
        assert version.state == "uploaded"
        records.make_ready(session, version)
        datasets.requeue_ingest(session, version.id)  # closed meanwhile: stays so
        session.refresh(version)
        assert version.state == "ready"


def test_a_ready_version_keeps_what_ingest_found(database: Database) -> None:
    refused = [Refused(f"x/{number}.png", "it is empty") for number in range(datasets.REFUSED_SHOWN + 5)]
    with database.writing() as session:
        version = records.waiting_version(session)
        datasets.start_ingest(session, version.id)
        datasets.set_progress(session, version.id, {"stage": "reading", "fraction": 0.5, "eta_s": 3.0})
        datasets.mark_ready(
            session,
            version.id,
            manifest=digest("manifest"),
            task=Task.REGRESSION,
            images=7,
            duplicates=2,
            ignored=3,
            classes=[ClassCount("daisy", 4, 3), ClassCount("rose", 3, 3)],
            target={"min": 0.5, "max": 2.0, "mean": 1.0},
            refused=refused,
        )
    with database.reading() as session:
        version = session.get_one(DatasetVersion, version.id)
        assert (version.state, version.task) == (DatasetState.READY, Task.REGRESSION)
        assert (version.images, version.duplicates, version.ignored) == (7, 2, 3)
        assert version.class_counts == [ClassCount("daisy", 4, 3), ClassCount("rose", 3, 3)]
        assert version.target == {"min": 0.5, "max": 2.0, "mean": 1.0}
        assert version.refused[0] == {"path": "x/0.png", "reason": "it is empty"}
        assert (len(version.refused), version.refused_total) == (datasets.REFUSED_SHOWN, len(refused))
        assert version.progress is None and version.ready_at is not None


def test_a_rejected_version_keeps_why(database: Database) -> None:
    error = DatasetRefused("Expected 2 to 1,000 classes. Received 1.").record()
    with database.writing() as session:
        version = records.waiting_version(session)
        datasets.set_progress(session, version.id, {"stage": "reading"})
        datasets.mark_rejected(session, version.id, error, [Refused("a.png", "it is empty")], ignored=4)
    with database.reading() as session:
        version = session.get_one(DatasetVersion, version.id)
        assert (version.state, version.error, version.ignored) == (DatasetState.REJECTED, error, 4)
        assert (version.refused, version.refused_total) == ([{"path": "a.png", "reason": "it is empty"}], 1)
        assert version.progress is None and version.ready_at is None


def test_a_deleted_data_set_forgets_its_files(database: Database) -> None:
    with database.writing() as session:
        ready = records.ready_version(session)
        dataset = records.dataset_of(session, ready)
        waiting = datasets.add_version(session, dataset, digest("more"))
        other = records.ready_version(session, "other")
        files = datasets.drop_files(session, dataset.id)
        assert {digest(f"manifest of {ready.id}"), digest("more")} <= set(files)
        assert digest(f"manifest of {other.id}") not in files
        assert ready.manifest_sha256 is waiting.archive_sha256 is None
        assert datasets.drop_files(session, dataset.id) == []


# --- images --------------------------------------------------------------------------------------------------------


def test_an_image_is_one_row_however_often_it_is_named(database: Database) -> None:
    with database.writing() as session:
        one = records.ready_version(session, "one", [accepted("daisy/1.png", "same"), accepted("daisy/2.png", "same")])
        two = records.ready_version(session, "two", [accepted("rose/9.png", "same"), accepted("rose/8.png")])
    with database.reading() as session:
        assert records.count(session, Image) == 2
        image = session.scalars(select(Image).where(Image.sha256 == digest("same"))).one()
        assert (image.size_bytes, image.width, image.height, image.format) == (123, 40, 30, "PNG")
    assert paths(database, one.id) == ["daisy/1.png", "daisy/2.png"]
    assert paths(database, two.id) == ["rose/8.png", "rose/9.png"]


def test_images_that_are_written_twice_are_there_once(database: Database) -> None:
    images = [accepted("1.png"), accepted("2.png", "same"), accepted("3.png", "same")]
    with database.writing() as session:
        old = records.ready_version(session, images=images)
        new = datasets.add_version(session, records.dataset_of(session, old), digest("more"))
    for _ in range(2):
        with database.writing() as session:
            datasets.add_images(session, PRINCIPAL.project_id, old.id, images)
            assert datasets.copy_memberships(session, old.id, new.id, "", limit=2) == "2.png"
    assert paths(database, old.id) == ["1.png", "2.png", "3.png"]
    assert paths(database, new.id) == ["1.png", "2.png"]
    with database.reading() as session:
        assert records.count(session, Image) == 2


def test_adding_no_images_changes_nothing(database: Database) -> None:
    with database.writing() as session:
        datasets.add_images(session, PRINCIPAL.project_id, records.waiting_version(session).id, [])
        assert records.count(session, Image) == records.count(session, Membership) == 0


def test_a_membership_holds_labels_or_a_target(database: Database) -> None:
    plain = accepted("1.png")
    several = IngestedImage(
        Row("2.png", digest("2"), ("sand", "sea"), None, "beach", Split.TEST), plain.facts, plain.size_bytes
    )
    none = IngestedImage(Row("3.png", digest("3"), (), None, None, Split.TRAIN), plain.facts, plain.size_bytes)
    number = IngestedImage(Row("4.png", digest("4"), (), 0.25, None, Split.VALIDATION), plain.facts, plain.size_bytes)
    with database.writing() as session:
        version = records.ready_version(session, images=[plain, several, none, number])
        columns = (Membership.label, Membership.target, Membership.group, Membership.split)
        rows = session.execute(select(*columns).where(Membership.version_id == version.id).order_by(Membership.path))
        assert [tuple(row) for row in rows] == [
            ("daisy", None, None, Split.TRAIN),
            ("sand|sea", None, "beach", Split.TEST),
            ("", None, None, Split.TRAIN),
            (None, 0.25, None, Split.VALIDATION),
        ]


def test_memberships_are_copied_page_by_page(database: Database) -> None:
    # Names in which databases' collations differ: upper case, accents, punctuation.
    names = ["a/1.png", "B/2.png", "a/Z.png", "a-b/3.png", "é/4.png", "e/5.png", "_/6.png"]
    with database.writing() as session:
        old = records.ready_version(session, images=[accepted(name) for name in names])
        new = datasets.add_version(session, records.dataset_of(session, old), digest("more"))
    after: str | None = ""
    pages = 0
    while after is not None:
        with database.writing() as session:
            after = datasets.copy_memberships(session, old.id, new.id, after, limit=3)
        pages += 1
    assert pages == 4  # 3 + 3 + 1, and the end
    assert paths(database, new.id) == paths(database, old.id)
    with database.reading() as session:
        rows = select(Membership.image_id, Membership.label, Membership.split).order_by(Membership.path)
        of = {
            version.id: session.execute(rows.where(Membership.version_id == version.id)).all() for version in (old, new)
        }
        assert of[old.id] == of[new.id]


def test_dropping_memberships_gives_back_only_orphaned_files(database: Database) -> None:
    with database.writing() as session:
        kept = records.ready_version(session, "kept", [accepted("a.png", "shared"), accepted("b.png", "kept")])
        going = records.ready_version(
            session, "going", [accepted("1.png", "shared"), accepted("2.png", "twice"), accepted("3.png", "twice")]
        )
    orphans: list[str] = []
    dropped = []
    while True:
        with database.writing() as session:
            count, files = datasets.drop_memberships(session, [going.id], limit=1)
        orphans += files
        if not count:
            break
        dropped.append(count)
    assert dropped == [1, 1, 1]
    assert orphans == [digest("twice")]  # once, after its second row went
    assert paths(database, going.id) == [] and paths(database, kept.id) == ["a.png", "b.png"]
    with database.reading() as session:
        assert set(session.scalars(select(Image.sha256))) == {digest("shared"), digest("kept")}
