from __future__ import annotations

import secrets
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import records
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from waiting import until

from errors import DiskFull, Unavailable
from models import dataset as datasets
from models.dataset import Dataset, DatasetVersion
from models.registry import RegistryRevision
from models.session import Database, after_commit, wal_is_safe
from ops.migrate import upgrade

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    """A migrated SQLite file."""
    file = tmp_path / "one.db"
    database = Database(f"sqlite:///{file}")
    upgrade(database)
    database.close()
    return file


def revision(database: Database) -> int:
    with database.reading() as session:
        return session.scalars(select(RegistryRevision.revision)).one()


def test_writing_commits_at_its_end_and_not_before(database: Database) -> None:
    with database.writing() as session:
        session.execute(update(RegistryRevision).values(revision=5))
        if not database.is_sqlite:  # SQLite's readers have their own test
            assert revision(database) == 0
    assert revision(database) == 5


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def fail_half_way() -> None:
        with database.writing() as session:
            records.waiting_version(session)
            session.execute(update(RegistryRevision).values(revision=5))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert revision(database) == 0
    with database.reading() as session:
        assert records.count(session, Dataset) == 0


def test_what_cannot_be_rolled_back_waits_for_the_commit(database: Database) -> None:
    seen: list[int] = []

    def look(own: Session) -> None:
        seen.extend(own.scalars(select(RegistryRevision.revision)))

    def fail_half_way() -> None:
        with database.writing() as session:
            after_commit(session, look)
            session.execute(update(RegistryRevision).values(revision=4))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert seen == []
    with database.writing() as session:
        after_commit(session, look)
        session.execute(update(RegistryRevision).values(revision=5))
        assert seen == []
    assert seen == [5]


def test_a_commit_is_not_taken_back_by_what_follows_it(database: Database) -> None:
    def fail(own: Session) -> None:
        raise Unavailable("The database is away again.")

    with database.writing() as session:
        after_commit(session, fail)
        session.execute(update(RegistryRevision).values(revision=5))
    assert revision(database) == 5


class Deaf(Database):
    """A database that loses the answer to the first commit."""

    is_deaf = True

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with super()._transaction() as session:
            yield session
        if self.is_deaf:
            self.is_deaf = False
            raise Unavailable("The connection was cut during COMMIT.")


def test_what_follows_a_commit_also_follows_one_whose_answer_is_lost(database: Database) -> None:
    seen: list[int] = []
    deaf = Deaf(database.engine.url)

    def write() -> None:
        with deaf.writing() as session:
            after_commit(session, lambda own: seen.append(own.scalars(select(RegistryRevision.revision)).one()))
            session.execute(update(RegistryRevision).values(revision=5))

    with pytest.raises(Unavailable, match="during COMMIT"):
        write()
    deaf.close()
    assert seen == [5]


def test_a_reader_sees_no_uncommitted_row(database: Database) -> None:
    with database.writing() as writer:
        records.waiting_version(writer)
        with database.reading() as reader:
            assert records.count(reader, Dataset) == 0
    with database.reading() as reader:
        assert records.count(reader, Dataset) == 1


def test_reading_keeps_no_change(database: Database) -> None:
    with database.reading() as session:
        session.add(datasets.Dataset(project_id=records.PRINCIPAL.project_id, name="flowers"))
        session.flush()
    with database.reading() as session:
        assert records.count(session, Dataset) == 0


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(DatasetVersion(dataset_id="ds_nobody", number=1))


# --- full disks ----------------------------------------------------------------------------------------------------


def until_it_is_full(database: Database, session: Session) -> None:
    """Write until the disk of the database is full. On PostgreSQL, raise its error instead."""
    session.execute(update(RegistryRevision).values(revision=5))
    if not database.is_sqlite:
        session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$"))
    session.execute(text("PRAGMA max_page_count = 1"))  # as many as there are now
    for _ in range(10_000):
        records.waiting_version(session, secrets.token_hex(8))  # whose insert has a savepoint of its own


def test_a_database_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(database: Database) -> None:
    with pytest.raises(DiskFull, match="nothing was written"), database.writing() as session:
        until_it_is_full(database, session)
    assert revision(database) == 0
    with database.writing() as session:
        if database.is_sqlite:
            session.execute(text("PRAGMA max_page_count = 1000000"))
        session.execute(update(RegistryRevision).values(revision=7))
        records.waiting_version(session)
    assert revision(database) == 7


# --- SQLite --------------------------------------------------------------------------------------------------------


def test_sqlite_writers_that_read_first_wait_for_each_other(sqlite_file: Path) -> None:
    database = Database(f"sqlite:///{sqlite_file}")
    together = threading.Barrier(6)

    def count_up() -> None:
        together.wait()
        for _ in range(5):
            with database.writing() as session:
                row = session.scalars(select(RegistryRevision)).one()
                row.revision += 1

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(count_up) for _ in range(6)]:
            done.result()
    assert revision(database) == 30
    database.close()


def test_a_second_sqlite_writer_waits_and_then_goes_on(sqlite_file: Path) -> None:
    database = Database(f"sqlite:///{sqlite_file}")
    order: list[str] = []

    def second() -> None:
        with database.writing() as session:
            session.execute(update(RegistryRevision).values(revision=RegistryRevision.revision * 2))
            order.append("second")

    thread = threading.Thread(target=second)
    with database.writing() as session:
        session.execute(select(RegistryRevision))
        thread.start()
        time.sleep(0.2)
        session.execute(update(RegistryRevision).values(revision=RegistryRevision.revision + 1))
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert revision(database) == 2
    database.close()


def test_an_sqlite_file_that_stays_locked_is_unavailable(sqlite_file: Path) -> None:
    database = Database(f"sqlite:///{sqlite_file}", busy_timeout_s=0.2)
    other = sqlite3.connect(sqlite_file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"), database.writing() as session:
        session.execute(select(1))
    assert time.monotonic() - started > 0.15
    other.execute("ROLLBACK")
    with database.writing() as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 200, "milliseconds"
        session.execute(update(RegistryRevision).values(revision=1))
    assert revision(database) == 1
    other.close()
    database.close()


def test_sqlite_is_opened_as_safely_as_its_version_allows(sqlite_file: Path) -> None:
    database = Database(f"sqlite:///{sqlite_file}")
    for transaction in (database.reading, database.writing):
        with transaction() as session:
            found = {name: session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")}
            assert found == {
                "journal_mode": "wal" if wal_is_safe(sqlite3.sqlite_version_info) else "delete",
                "synchronous": 2,  # FULL
            }
            assert session.scalar(text("PRAGMA foreign_keys")) == 1
    database.close()


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 49, 9), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_wal_is_used_only_where_the_wal_reset_bug_is_mended(version: tuple[int, ...], is_safe: bool) -> None:
    assert wal_is_safe(version) is is_safe


def test_an_sqlite_folder_is_made_when_it_is_missing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'deeper' / 'one.db'}")
    upgrade(database)
    assert revision(database) == 0
    database.close()


# --- PostgreSQL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transaction", ["reading", "writing"])
def test_a_postgresql_that_is_away_is_unavailable(transaction: str) -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(Unavailable, match="cannot be reached"), getattr(database, transaction)() as session:
        session.execute(select(1))
    database.close()


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_a_connection_that_is_cut_is_unavailable_once(empty_database: Database) -> None:
    def be_cut() -> None:
        with empty_database.writing() as session:
            victim = session.scalar(text("SELECT pg_backend_pid()"))
            with empty_database.writing() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": victim})
            session.execute(select(1))

    with pytest.raises(Unavailable):
        be_cut()
    with empty_database.writing() as session:
        assert session.scalar(select(1)) == 1


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_connections_that_were_cut_while_idle_are_replaced_unnoticed(empty_database: Database) -> None:
    with empty_database.reading() as first, empty_database.reading() as second:
        victim = first.scalar(text("SELECT pg_backend_pid()"))
        second.execute(select(1))
    with empty_database.reading() as one, empty_database.reading() as other:
        survivor = next(s for s in (one, other) if s.scalar(text("SELECT pg_backend_pid()")) != victim)
        survivor.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": victim})
    with empty_database.reading() as one, empty_database.reading() as other:
        assert one.scalar(select(1)) == other.scalar(select(1)) == 1


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_name_is_held_by_one_at_a_time(database: Database) -> None:
    with database.exclusive("one") as is_held, database.exclusive("one") as again, database.exclusive("two") as other:
        assert (is_held, again, other) == (True, False, True)
    with database.exclusive("one") as is_held:
        assert is_held


def test_a_name_is_held_among_processes_and_goes_with_the_process(database: Database) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    program = (
        "import sys, time; from models.session import Database; database = Database(sys.argv[1])\n"
        "with database.exclusive('one') as is_held:\n"
        "    print(is_held, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with database.exclusive("one") as is_held:
            assert not is_held
        process.kill()
        process.wait()

    def is_free() -> bool:
        with database.exclusive("one") as is_held:
            return is_held

    until(is_free)
