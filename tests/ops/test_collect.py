from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import records
from buckets import Bucket
from running import ROOT
from sqlalchemy import update

from artifacts.store import Store
from errors import Crashed
from models import run as runs
from models.base import now
from models.garbage import GARBAGE_COLLECTION
from models.run import Run
from models.session import Database
from ops.migrate import upgrade


def collect(var: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops.collect", *arguments],
        cwd=ROOT,
        env=os.environ | {"ESPALIER_VAR": str(var)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'espalier.db'}")
    upgrade(database)
    return database


def test_an_operator_sees_what_would_go_then_removes_it(tmp_path: Path, database: Database) -> None:
    store = Store(tmp_path / "store")
    old, fresh, checkpoint = store.put(bytes(3 * 2**20)), store.put(b"fresh"), store.put(b"checkpoint")
    (store.root / "incoming" / "left").touch()
    for path in (store.path_for(old), store.path_for(checkpoint), store.root / "incoming" / "left"):
        os.utime(path, (0, 0))
    with database.writing() as session:
        run = records.running_run(session, records.ready_version(session))
        runs.add_checkpoint(session, run.id, 0, 1, checkpoint, 10)
        runs.fail_run(session, run.id, Crashed("It died.").record())
        session.execute(update(Run).values(finished_at=now() - timedelta(days=8)))
    dry = collect(tmp_path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout == (
        "Would remove 1 unreferenced files that are older than 24 h (3.0 MiB), 1 unfinished files, "
        "0 expired idempotency answers, checkpoints of 1 runs that failed more than 7 days ago, and then the files "
        "of these checkpoints.\n"
    )
    assert set(store.digests()) == {old, fresh, checkpoint}
    done = collect(tmp_path)
    assert done.stdout.startswith("Removed 2 unreferenced files") and done.returncode == 0
    assert list(store.digests()) == [fresh] and not list((store.root / "incoming").iterdir())
    again = collect(tmp_path)
    assert again.stdout.startswith("Removed 0 unreferenced files")
    database.close()


def test_while_a_worker_collects_an_operator_is_told_so(tmp_path: Path, database: Database) -> None:
    with database.exclusive(GARBAGE_COLLECTION) as is_held:
        assert is_held
        done = collect(tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        "Another process is collecting garbage now. See the logs of the workers, or try again later.\n",
    )
    database.close()


def test_a_bucket_is_collected_and_one_that_refuses_is_told(tmp_path: Path, database: Database, bucket: Bucket) -> None:
    bucket.store().put(b"of nobody")
    address = bucket.address
    shared = {"ESPALIER_STORE_ENDPOINT": bucket.endpoint, "ESPALIER_STORE_REGION": address.region}
    done = collect(tmp_path, ESPALIER_STORE_URL=address.url or "", ESPALIER_COLLECT_AFTER_S="0.001", **shared)
    assert re.match(r"Removed [01] unreferenced files", done.stdout), done.stderr
    wrong = collect(tmp_path, ESPALIER_STORE_URL="s3://nobody-made-this", **shared)
    assert wrong.returncode == 1 and "no bucket s3://nobody-made-this" in wrong.stderr and wrong.stdout == ""
    database.close()
