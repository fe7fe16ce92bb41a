"""When a worker collects, and what does not keep it from going on. What goes: `tests/models/test_collection.py`."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from buckets import Bucket, NetworkProxy
from structlog.testing import capture_logs
from waiting import until
from working import FullDiskDatabase

from artifacts.store import Digest, Store
from models.garbage import GARBAGE_COLLECTION
from models.session import Database
from worker import garbage_collector as collector_module
from worker.garbage_collector import Collector

DAY_S = 86_400.0


def leave(store: Store, content: bytes) -> Digest:
    """Store a file of long ago that nothing names."""
    file = store.put(content)
    os.utime(store.path_for(file), (0, 0))
    return file


def test_it_collects_at_its_start_and_again_and_again(database: Database, store: Store) -> None:
    collector = Collector(database, store, 0.05, DAY_S)
    unfinished = store.root / "incoming" / "left"
    unfinished.touch()
    os.utime(unfinished, (0, 0))
    first = leave(store, b"first")
    with capture_logs() as logs:
        collector.start()
        until(lambda: not store.has(first) and not unfinished.exists())
        second = leave(store, b"second")
        until(lambda: not store.has(second))
        collector.stop()
    entries = [entry for entry in logs if entry["event"] == "garbage collected"]
    assert [(entry["files"], entry["size_bytes"]) for entry in entries] == [(1, 5), (1, 6)]


def test_one_process_at_a_time_collects(database: Database, store: Store) -> None:
    collector = Collector(database, store, 3600, DAY_S)
    file = leave(store, b"of nobody")
    with database.exclusive(GARBAGE_COLLECTION) as is_held:
        assert is_held and collector.collect() is None and store.has(file)
    assert collector.collect() is not None and not store.has(file)


def test_many_who_collect_at_once_remove_everything_once(database: Database, store: Store) -> None:
    files = [leave(store, b"%d" % number) for number in range(60)]
    collectors = [Collector(database, store, 3600, DAY_S) for _ in range(4)]
    found: list[int] = []

    def collect(one: Collector) -> None:
        if done := one.collect():
            found.append(done.files)

    threads = [threading.Thread(target=collect, args=(one,)) for one in collectors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == len(files) and list(store.digests()) == []


def test_it_goes_on_after_the_bucket_was_away(
    sqlite: Database, bucket: Bucket, line: NetworkProxy, tmp_path: Path
) -> None:
    store = bucket.seen_from(tmp_path / "far", line.endpoint).store()
    store.put(b"of nobody")
    collector = Collector(sqlite, store, 0.05, -60)
    line.cut()
    with capture_logs() as logs:
        collector.start()
        until(lambda: len([entry for entry in logs if entry["event"] == "garbage not collected"]) > 1)
        assert bucket.digests()
        line.mend()
        until(lambda: not bucket.digests())
        collector.stop()
    assert not [entry for entry in logs if entry["log_level"] == "error"]


def test_it_goes_on_after_the_database_was_away_or_full(database: Database, store: Store) -> None:
    full = FullDiskDatabase(database.engine.url)
    full.is_full = True
    collector = Collector(full, store, 0.05, DAY_S)
    file = leave(store, b"of nobody")
    with capture_logs() as logs:
        collector.start()
        until(lambda: [entry for entry in logs if entry["event"] == "garbage not collected"])
        full.is_full = False
        until(lambda: not store.has(file))
        collector.stop()
    full.close()
    assert not [entry for entry in logs if entry["log_level"] == "error"]


def test_it_can_be_stopped_while_the_bucket_hangs(
    sqlite: Database, bucket: Bucket, line: NetworkProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collector_module._STOP_WITHIN_S < 8, "a worker that shuts down needs time for its other steps"
    monkeypatch.setattr(collector_module, "_STOP_WITHIN_S", 0.3)
    store = bucket.seen_from(tmp_path / "far", line.endpoint).store()
    line.hangs = True
    collector = Collector(sqlite, store, 3600, DAY_S)
    before = line.in_flight
    collector.start()
    until(lambda: line.in_flight > before)
    collector.stop()
    assert collector._thread.is_alive(), "it is left behind"
    line.mend()
    collector._thread.join(120)
    assert not collector._thread.is_alive()
