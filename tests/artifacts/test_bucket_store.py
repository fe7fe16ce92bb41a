"""A store with a bucket: two machines, local copies, damaged files, and a bucket that is unavailable."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from buckets import KEYS, Bucket, NetworkProxy
from waiting import until

from artifacts import bucket_store
from artifacts.bucket_store import BucketStore, open_store, parse_url
from artifacts.store import Store, StoreAddress, digest_of
from errors import Corrupt, NotFound, StoreRefused, StoreUnavailable

ROOT = Path(__file__).parent.parent.parent
DATA = b"some bytes"
LARGE = bytes(range(256)) * 80_000  # three parts


@pytest.fixture
def there(bucket: Bucket, tmp_path: Path) -> BucketStore:
    """A store of another machine with the same bucket."""
    return bucket.seen_from(tmp_path / "there").store()


def age(store: Store, *files: str) -> None:
    """Make copies look unused for an hour, the first one for the longest time."""
    for place, name in enumerate(files):
        an_hour_ago = time.time() - 3600 + place
        os.utime(store.root / name[:2] / name, (an_hour_ago, an_hour_ago))


# --- two machines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", DATA, LARGE], ids=["nothing", "a little", "several parts"])
def test_what_one_machine_stores_another_reads(bucket: Bucket, there: BucketStore, data: bytes) -> None:
    here = bucket.store()
    digest = here.put(data)
    assert bucket.objects() == {f"some/where/{digest[:2]}/{digest}": data}
    assert not there.path_for(digest).exists() and there.has(digest)
    assert there.read(digest) == data
    assert there.path_for(digest).read_bytes() == data and not list((there.root / "incoming").iterdir())


@pytest.mark.parametrize("ask", ["path", "open", "verified_path"])
def test_every_way_to_a_file_brings_it_here(bucket: Bucket, there: BucketStore, ask: str) -> None:
    digest = bucket.store().put(DATA)
    found = getattr(there, ask)(digest)
    if isinstance(found, Path):
        assert found == there.path_for(digest) and found.read_bytes() == DATA
    else:
        with found:
            assert found.read() == DATA


def test_files_are_brought_here_together_and_not_twice(bucket: Bucket, line: NetworkProxy, tmp_path: Path) -> None:
    here = bucket.store()
    files = [here.put(bytes([number]) * 100) for number in range(32)]
    far = bucket.seen_from(tmp_path / "far", line.endpoint).store()
    line.hangs = True
    with ThreadPoolExecutor(1) as pool:
        bringing = pool.submit(far.prefetch, files * 2)
        until(lambda: line.in_flight == bucket_store._FILES_AT_ONCE > 1)
        line.mend()
        bringing.result()
    assert line.requests == len(files)
    line.cut()
    far.prefetch(files)
    assert [far.read(file) for file in files] == [bytes([number]) * 100 for number in range(32)]
    with pytest.raises(StoreUnavailable):
        far.prefetch([digest_of(DATA)])


def test_what_is_removed_on_one_machine_is_gone_from_the_bucket(bucket: Bucket, there: BucketStore) -> None:
    digest = bucket.store().put(DATA)
    there.read(digest)
    there.delete(digest)
    assert bucket.objects() == {} and not there.path_for(digest).exists()
    assert not bucket.store().has(digest), "a copy that is left in a cache is none"


def test_many_processes_store_one_file_at_once(bucket: Bucket) -> None:
    code = (
        "import sys; from artifacts.bucket_store import open_store; from artifacts.store import StoreAddress;"
        "store = open_store(StoreAddress(*sys.argv[1:5])); sys.stdin.readline();"
        "print(store.put(bytes(range(256)) * 80_000))"
    )
    address = bucket.address
    told = [address.folder, address.url, address.endpoint, address.region]
    command = [sys.executable, "-c", code, *map(str, told)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("now\n")
        process.stdin.flush()
    said = [process.communicate()[0].strip() for process in processes]
    assert said == [digest_of(LARGE)] * 2
    assert bucket.objects() == {f"some/where/{said[0][:2]}/{said[0]}": LARGE}
    assert not list((bucket.folder / "incoming").iterdir())


# --- harm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["read", "verified_path"])
@pytest.mark.parametrize("harm", [b"Some bytes", b"some", b"", b"some bytes\0"])
def test_a_copy_that_was_harmed_is_fetched_again(bucket: Bucket, ask: str, harm: bytes) -> None:
    store = bucket.store()
    digest = store.put(DATA)
    store.path_for(digest).write_bytes(harm)
    getattr(store, ask)(digest)
    assert store.path_for(digest).read_bytes() == DATA


@pytest.mark.parametrize("ask", ["path", "open", "read", "verified_path"])
def test_a_harmed_object_is_told_and_never_named_here(bucket: Bucket, there: BucketStore, ask: str) -> None:
    digest = bucket.store().put(DATA)
    bucket.write(digest, b"Some bytes")
    with pytest.raises(Corrupt, match=f"{digest} in the bucket s3://{bucket.name}"):
        getattr(there, ask)(digest)
    assert [path for path in there.root.rglob("*") if path.is_file()] == []
    there.put(DATA)
    assert bucket.digests() == {digest} and bucket.seen_from(there.root / "fresh").store().read(digest) == DATA


def test_what_a_borrower_stores_is_nowhere_until_it_is_taken_over(bucket: Bucket) -> None:
    store = bucket.store()
    archive = store.put(b"archive")
    with store.lend_store(archive) as lent:
        file = Store(lent.root).put(DATA)
        assert bucket.digests() == {archive} and not store.path_for(file).exists()
    assert not store.has(file) and not lent.root.exists()
    assert store.read(archive) == b"archive"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_to_its_budget_and_drops_what_was_not_used_for_longest(bucket: Bucket) -> None:
    store = replace(bucket, cache_bytes=10_000).store()
    files = [store.put(bytes([number]) * 1000) for number in range(10)]
    age(store, *files)
    store.read(files[0])  # used just now
    store.put(b"more" * 250)
    kept = {file.digest for file in store.cached()}
    assert len(kept) == 9 and files[0] in kept and not {files[1], files[2]} & kept
    assert bucket.digests() >= set(files), "the bucket keeps everything"
    assert store.read(files[1]) == bytes([1]) * 1000


def test_a_reader_keeps_the_file_that_it_has_open(bucket: Bucket) -> None:
    store = replace(bucket, cache_bytes=1000).store()
    digest = store.put(LARGE)
    with store.open(digest) as file:
        first = file.read(1000)
        age(store, digest)
        assert store.make_room() == 1 and not store.path_for(digest).exists()
        assert first + file.read() == LARGE


def test_what_was_used_a_moment_ago_stays_though_it_is_too_much(bucket: Bucket) -> None:
    store = replace(bucket, cache_bytes=1000).store()
    digest = store.put(LARGE)
    assert store.make_room() == 0 and store.path_for(digest).exists()


def test_readers_and_those_who_make_room_do_not_disturb_each_other(bucket: Bucket) -> None:
    store = bucket.store()
    files = [store.put(bytes([number]) * 1000) for number in range(4)]
    over = Event()

    def drop() -> None:
        while not over.wait(0.002):
            store.drop_cached(files)

    with ThreadPoolExecutor(3) as pool:
        dropping = pool.submit(drop)
        try:
            found = list(pool.map(store.read, files * 30))
        finally:
            over.set()
        dropping.result()
    assert found == [bytes([number]) * 1000 for number in range(4)] * 30


def test_what_is_cached_can_be_dropped_and_is_still_there(bucket: Bucket) -> None:
    store = bucket.store()
    digest = store.put(DATA)
    (copy,) = store.cached()
    assert copy.digest == digest
    store.drop_cached([digest])
    assert list(store.cached()) == [] and store.read(digest) == DATA


# --- a bucket that is away -------------------------------------------------------------------------------------------


@pytest.fixture
def far(bucket: Bucket, line: NetworkProxy, tmp_path: Path) -> BucketStore:
    """A store that reaches its bucket through a connection that the test can cut."""
    return bucket.seen_from(tmp_path / "far", line.endpoint).store()


@pytest.mark.parametrize("carried", [0, 3_000_000], ids=["before", "in the middle"])
def test_a_bucket_that_goes_away_during_an_upload_leaves_no_file(
    bucket: Bucket, far: BucketStore, line: NetworkProxy, carried: int
) -> None:
    far.check()
    line.cut(up_bytes=carried, down_bytes=carried)
    with pytest.raises(StoreUnavailable, match="continue by themselves") as told:
        far.put(LARGE)
    assert told.value.is_transient and told.value.is_parked
    assert bucket.digests() == set()
    assert [path for path in far.root.rglob("*") if path.is_file()] == []
    line.mend()
    assert far.read(far.put(LARGE)) == LARGE and bucket.digests() == {digest_of(LARGE)}


@pytest.mark.parametrize("carried", [0, 3_000_000], ids=["before", "in the middle"])
def test_a_bucket_that_goes_away_during_a_download_leaves_no_file(
    bucket: Bucket, far: BucketStore, line: NetworkProxy, carried: int
) -> None:
    digest = bucket.store().put(LARGE)
    far.check()
    line.cut(up_bytes=carried, down_bytes=carried)
    with pytest.raises(StoreUnavailable, match="is unavailable"):
        far.read(digest)
    assert [path for path in far.root.rglob("*") if path.is_file()] == []
    line.mend()
    assert far.read(digest) == LARGE


def test_what_lies_here_is_read_while_the_bucket_is_away(far: BucketStore, line: NetworkProxy) -> None:
    digest = far.put(DATA)
    line.cut()
    assert far.read(digest) == DATA and far.verified_path(digest) == far.path_for(digest)
    for ask in (far.check, far.now, lambda: far.has(digest), lambda: far.delete(digest), lambda: list(far.files())):
        with pytest.raises(StoreUnavailable):
            ask()
    assert far.path_for(digest).exists()


def test_a_bucket_that_is_away_is_told_after_a_few_tries(far: BucketStore, line: NetworkProxy) -> None:
    line.cut()
    with pytest.raises(StoreUnavailable):
        far.read(digest_of(DATA))
    assert 0 < line.requests <= 1 + bucket_store._RETRIES
    assert bucket_store._RETRY_WITHIN_S <= 5, "and within seconds"


@pytest.mark.slow
def test_a_bucket_that_hangs_is_told_after_the_first_wait(far: BucketStore, line: NetworkProxy) -> None:
    line.hangs = True
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(far.read, digest_of(DATA)), pool.submit(far.put, DATA)]
        for one in asked:
            with pytest.raises(StoreUnavailable):
                one.result(bucket_store.STALL_S + 120)
    assert line.requests == len(asked), "none is tried once more"
    line.mend()


def test_a_store_is_opened_while_its_bucket_is_away(bucket: Bucket, line: NetworkProxy) -> None:
    line.cut()
    store = open_store(replace(bucket.address, endpoint=line.endpoint))
    line.mend()
    assert store.read(store.put(DATA)) == DATA


def test_a_process_that_dies_in_the_middle_of_an_upload_leaves_no_file(bucket: Bucket, line: NetworkProxy) -> None:
    code = (
        "import sys; from artifacts.bucket_store import BucketStore; from artifacts.store import StoreAddress;"
        "BucketStore(StoreAddress(*sys.argv[1:5])).put(bytes(range(256)) * 80_000)"
    )
    address = replace(bucket.address, endpoint=line.endpoint)
    told = [address.folder, address.url, address.endpoint, address.region]
    line.hangs = True
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, told)], cwd=ROOT)
    until(lambda: [path for path in (bucket.folder / "incoming").glob("*") if path.stat().st_size == len(LARGE)])
    until(lambda: line.in_flight)
    process.send_signal(signal.SIGKILL)
    process.wait()
    line.mend()
    store = bucket.store()
    assert list(store.digests()) == [] and list(store.cached()) == []
    assert store.drop_unfinished(older_than_s=-1) == 1
    assert store.read(store.put(LARGE)) == LARGE


# --- what somebody must put right ------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_told_at_once(bucket: Bucket) -> None:
    with pytest.raises(StoreRefused, match=r"no bucket s3://nobody-made-this/x .* ESPALIER_STORE_URL"):
        open_store(replace(bucket.address, url="s3://nobody-made-this/x"))
    with pytest.raises(StoreRefused, match="nobody-made-this"):
        BucketStore(replace(bucket.address, url="s3://nobody-made-this")).put(DATA)


@pytest.mark.parametrize("missing", KEYS)
def test_keys_that_are_not_there_are_told_at_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(StoreRefused, match=f"Set {missing}"):
        open_store(bucket.address)


@pytest.mark.parametrize("status", [401, 403])
def test_keys_that_are_wrong_are_told_at_once_and_not_shown(bucket: Bucket, status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>")

        do_PUT = do_HEAD = do_GET

        def log_message(self, *said: object) -> None:
            logging.getLogger("refusing").debug(*said)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(StoreRefused, match="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as told:
            open_store(replace(bucket.address, endpoint=f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not [value for value in KEYS.values() if value in str(told.value) or value in repr(told.value.record())]


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://my.bucket-1/espalier", ("my.bucket-1", "espalier")),
        ("s3://bucket/a/b/", ("bucket", "a/b")),
    ],
)
def test_a_bucket_and_a_prefix_are_read_from_one_address(url: str, parts: tuple[str, str]) -> None:
    assert parse_url(url) == parts


@pytest.mark.parametrize("url", ["", "bucket", "s3://", "s3://-x", "s3://B", "https://bucket/x", "s3:/bucket"])
def test_what_is_no_address_of_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="Expected a bucket as s3://name"):
        parse_url(url)


def test_an_address_without_a_bucket_is_a_folder(tmp_path: Path) -> None:
    store = open_store(StoreAddress(str(tmp_path / "store")))
    assert type(store) is Store and store.read(store.put(DATA)) == DATA
    with pytest.raises(NotFound):
        store.read(digest_of(b"never stored"))
