"""Stores: a file under a digest is always complete, whatever happens while it is written.

What takes `store` holds for each kind, what takes `folder` for the one that is only a folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from buckets import EACH_STORE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.bucket_store import open_store
from artifacts.store import Store, digest_of, disk_errors, parse_digest
from errors import Corrupt, DiskFull, NotFound

ROOT = Path(__file__).parent.parent.parent
DATA = b"some bytes"
NOWHERE = digest_of(b"never stored")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(store: Store) -> list[Path]:
    """Return every file below the store's folder."""
    return [path for path in store.root.rglob("*") if path.is_file()]


def open_paths() -> list[str]:
    """Return the paths of all files that this process has open, including deleted ones."""
    paths = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now, by whoever else is at work here
            paths.append(os.readlink(handle))
    return paths


# --- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_is_the_sha256_in_lower_case() -> None:
    assert digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert parse_digest(digest_of(DATA)) == digest_of(DATA)


@pytest.mark.parametrize(
    "text",
    ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", " " + "a" * 63, "../" + "a" * 61, "٣" * 64],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected 64 hexadecimal digits"):
        parse_digest(text)


# --- putting and getting ---------------------------------------------------------------------------------------------


@EACH_STORE
def test_a_stored_file_is_found_by_its_digest(store: Store) -> None:
    digest = store.put(DATA)
    assert digest == hashlib.sha256(DATA).hexdigest()
    assert store.has(digest)
    assert store.read(digest) == DATA
    with store.open(digest) as file:
        assert file.read() == DATA
    assert store.path(digest) == store.verified_path(digest) == store.root / digest[:2] / digest
    assert store.path_for(digest) == store.path(digest)
    assert list(store.digests()) == [digest]


@EACH_STORE
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(chunks=st.lists(st.binary(max_size=5000), max_size=5))
def test_it_does_not_matter_in_which_pieces_a_file_comes(store: Store, chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert store.put(chunks) == store.put(iter(chunks)) == store.put(whole) == digest_of(whole)
    assert store.read(digest_of(whole)) == whole


@EACH_STORE
def test_a_file_stored_twice_is_kept_once(store: Store) -> None:
    assert store.put(DATA) == store.put(DATA)
    assert leftovers(store) == [store.path(digest_of(DATA))]


@EACH_STORE
def test_many_who_store_one_file_at_once_do_not_disturb_each_other(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda _: store.put([DATA] * 1000), range(32)))
    assert set(digests) == {digest_of(DATA * 1000)}
    assert leftovers(store) == [store.verified_path(digests[0])]


@EACH_STORE
def test_a_store_finds_what_an_earlier_one_stored(store: Store) -> None:
    digests = sorted(store.put(bytes([number])) for number in range(20))
    again = Store(store.root)
    assert list(again.digests()) == digests
    assert again.read(digests[7]) == store.read(digests[7])


@EACH_STORE
def test_a_deleted_file_is_gone_and_may_be_deleted_again(store: Store) -> None:
    digest, other = store.put(DATA), store.put(b"other")
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)
    assert list(store.digests()) == [other]
    assert store.put(DATA) == digest and store.read(digest) == DATA


@EACH_STORE
@pytest.mark.parametrize("ask", ["path", "open", "read", "verified_path"])
def test_a_file_that_is_not_here_is_not_found(store: Store, ask: str) -> None:
    assert not store.has(NOWHERE) and store.find(NOWHERE) is None
    with pytest.raises(NotFound, match=NOWHERE):
        getattr(store, ask)(NOWHERE)
    assert leftovers(store) == []


@EACH_STORE
def test_several_files_are_asked_for_and_removed_at_once(store: Store) -> None:
    here = [store.put(bytes([number])) for number in range(20)]
    assert list(store.missing([NOWHERE, *here[:3], digest_of(b"nor this")])) == [NOWHERE, digest_of(b"nor this")]
    store.delete()
    assert sorted(store.digests()) == sorted(here)
    store.delete(*here[1:], NOWHERE)
    assert list(store.digests()) == here[:1]


@EACH_STORE
def test_files_tell_their_size_and_when_they_were_written_by_the_clock_of_the_store(store: Store) -> None:
    started = store.now()
    digest = store.put(DATA)
    (file,) = store.files()
    assert (file.digest, file.size_bytes) == (digest, len(DATA)) and store.find(digest) == file
    assert started - 1 <= file.written_at <= store.now() + 1
    assert abs(store.now() - time.time()) < 60


@EACH_STORE
def test_a_file_that_is_stored_again_counts_as_new(store: Store) -> None:
    digest = store.put(DATA)
    before = store.files().__next__().written_at
    time.sleep(1.1)  # a bucket counts in seconds
    assert store.put(DATA) == digest
    assert store.files().__next__().written_at > before


@EACH_STORE
def test_what_is_no_file_of_the_store_is_passed_over(store: Store) -> None:
    digest = store.put(DATA)
    store.path_for(digest).with_name(".DS_Store").touch()
    (store.root / "zz").mkdir()
    (store.root / "zz" / "readme.txt").touch()
    assert list(store.digests()) == [digest]


@EACH_STORE
def test_a_store_that_can_be_used_says_so(store: Store) -> None:
    store.check()
    store.check()
    assert open_store(store.address).put(DATA) == digest_of(DATA)
    assert store.read(digest_of(DATA)) == DATA


def test_a_folder_that_is_gone_is_told(folder: Store) -> None:
    (folder.root / "incoming").rmdir()
    with pytest.raises(NotFound, match=re.escape(str(folder.root))):
        folder.check()


# --- lending ---------------------------------------------------------------------------------------------------------


@EACH_STORE
def test_what_a_borrower_stores_is_kept_once_it_is_taken_over(store: Store) -> None:
    archive = store.put(b"archive")
    with store.lend_store(archive) as lent:
        borrower = Store(Path(str(lent.root)))  # another process, which is told a folder
        assert borrower.verified_path(archive).read_bytes() == b"archive"
        files = [borrower.put(bytes([number])) for number in range(20)]
        adopted = list(store.import_files(lent, [files[0], *files[:10]])) + list(
            store.import_files(lent, [files[0], *files[10:19]])
        )
        assert set(adopted) == set(files[:19])
    assert not list(store.missing(files[:19]))
    assert [store.read(file) for file in files[:19]] == [bytes([number]) for number in range(19)]
    assert not list((store.root / "incoming").iterdir())


@EACH_STORE
@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_borrower_made_up_is_not_taken_over(store: Store, is_link: bool) -> None:
    archive = store.put(b"archive")
    other = store.put(b"somebody's model")
    with store.lend_store(archive) as lent:
        place = lent.path_for(other)
        place.parent.mkdir(exist_ok=True)
        if is_link:  # which matches its digest now
            place.symlink_to(store.path(other).absolute())
        else:
            place.write_bytes(b"poison")
        with pytest.raises(Corrupt, match=other):
            list(store.import_files(lent, [other]))
    assert store.read(other) == b"somebody's model" and not store.path(other).is_symlink()
    assert set(store.digests()) == {archive, other}


@EACH_STORE
def test_what_is_not_here_cannot_be_lent(store: Store) -> None:
    with pytest.raises(NotFound, match=NOWHERE), store.lend_store(NOWHERE):
        pass
    assert leftovers(store) == []


@pytest.mark.parametrize("harm", [lambda data: b"S" + data[1:], lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_corrupt_file_is_told_from_a_whole_one(folder: Store, harm: Callable[[bytes], bytes]) -> None:
    digest = folder.put(DATA)
    folder.path_for(digest).write_bytes(harm(DATA))
    with pytest.raises(Corrupt, match=digest):
        folder.read(digest)
    with pytest.raises(Corrupt, match=digest):
        folder.verified_path(digest)
    assert folder.put(DATA) == digest
    assert folder.read(digest) == DATA, "storing the file again repairs it"


# --- writers ---------------------------------------------------------------------------------------------------------


@EACH_STORE
def test_a_file_exists_from_its_commit_on(store: Store) -> None:
    with store.writer() as writer:
        writer.write(DATA[:3])
        writer.write(DATA[3:])
        assert writer.size_bytes == len(DATA)
        assert list(store.digests()) == [] and not store.has(digest_of(DATA))
        digest = writer.commit()
        assert store.read(digest) == DATA
    assert leftovers(store) == [store.path(digest)], "leaving the block after the commit keeps the file"


@EACH_STORE
def test_a_writer_that_is_not_committed_leaves_nothing(store: Store) -> None:
    with store.writer() as writer:
        writer.write(DATA)
    assert leftovers(store) == []


@EACH_STORE
def test_an_interrupted_write_leaves_nothing(store: Store) -> None:
    def chunks() -> Iterator[bytes]:
        yield DATA * 100_000
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        store.put(chunks())
    assert leftovers(store) == []


@EACH_STORE
def test_writers_side_by_side_keep_their_bytes_apart(store: Store) -> None:
    with store.writer() as one, store.writer() as other:
        one.write(b"a")
        other.write(b"b")
        one.write(b"c")
        assert (one.commit(), other.commit()) == (digest_of(b"ac"), digest_of(b"b"))


def test_a_process_that_dies_while_writing_leaves_no_digest(folder: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; from artifacts.store import Store;"
        "writer = Store(Path(sys.argv[1])).writer(); writer.write(bytes(10**6)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder.root)], cwd=ROOT).returncode == 9
    assert list(Store(folder.root).digests()) == []
    assert not folder.has(digest_of(bytes(10**6)))


@EACH_STORE
def test_what_killed_writers_left_is_dropped_after_a_day(store: Store) -> None:
    kept = store.put(DATA)
    yesterday = time.time() - 90_000
    for name in ("one", "two", "fresh"):
        (store.root / "incoming" / name).write_bytes(b"half a file")
        if name != "fresh":
            os.utime(store.root / "incoming" / name, (yesterday, yesterday))
    os.utime(store.path(kept), (yesterday, yesterday))
    with store.writer() as writer:
        writer.write(b"under way")
        assert store.drop_unfinished() == 2
        assert store.drop_unfinished() == 0
        assert store.read(writer.commit()) == b"under way"
    assert (store.root / "incoming" / "fresh").exists() and store.read(kept) == DATA


@EACH_STORE
def test_many_who_clear_away_at_once_do_not_disturb_each_other(store: Store) -> None:
    for number in range(300):
        file = store.root / "incoming" / str(number)
        file.touch()
        os.utime(file, (0, 0))
    with ThreadPoolExecutor(8) as pool:
        dropped = list(pool.map(lambda _: store.drop_unfinished(), range(8)))
    assert sum(dropped) == 300 and leftovers(store) == []


# --- full disks ------------------------------------------------------------------------------------------------------


@EACH_STORE
@pytest.mark.parametrize("size_bytes", [1, 10**6], ids=["at the commit", "while writing"])
def test_a_full_disk_is_told_and_leaves_nothing(
    store: Store, fill_disk: Callable[[Path], None], size_bytes: int
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"the beginning"
        fill_disk(store.root / "incoming")
        yield bytes(size_bytes)

    with pytest.raises(DiskFull, match="nothing was stored"):
        store.put(chunks())
    assert leftovers(store) == []
    full_or_here = ("/dev/full", str(store.root.resolve()))
    assert not [path for path in open_paths() if path.startswith(full_or_here)], "the file was closed"
    assert store.read(store.put(DATA)) == DATA


def test_a_file_above_the_limit_of_the_process_leaves_nothing(folder: Store) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from artifacts.store import Store;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); store = Store(Path(sys.argv[1]))\n"
        "try:\n store.put([bytes(10**4)] * 100)\n"
        "except OSError:\n print('stopped', store.put(b'small'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.root)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["stopped", digest_of(b"small")]
    assert leftovers(folder) == [folder.path(digest_of(b"small"))]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_a_full_disk(number: int) -> None:
    with pytest.raises(DiskFull) as caught, disk_errors():
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_device_that_is_full_is_a_full_disk() -> None:
    with pytest.raises(DiskFull), disk_errors():
        Path("/dev/full").write_bytes(DATA)


def test_other_errors_of_a_disk_stay_what_they_are() -> None:
    with pytest.raises(PermissionError), disk_errors():
        raise PermissionError(errno.EACCES, "not yours")
    with disk_errors():
        pass
