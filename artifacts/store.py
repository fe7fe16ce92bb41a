"""Stores files in a folder under the SHA-256 of their content, the digest. Knows no file formats and no buckets.

A file is written under a temporary name, synced and then renamed, so a file under a digest is always complete. Many
files are written into a lent store and synced together when they are imported, which takes a hundredth of the time.
`artifacts.bucket_store` has the same methods for files in a bucket.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import NewType

from errors import Corrupt, DiskFull, NotFound

Digest = NewType("Digest", str)

_DIGEST = re.compile(r"[0-9a-f]{64}")
# A file system writes its journal once for all syncs that wait for it: 1,000 small files took 3.5 ms each one after the
# other, 0.13 ms each with 16 at once.
_SYNCS_AT_ONCE = 16


def parse_digest(text: str) -> Digest:
    """Return a text as a digest. Raises ValueError if it is not 64 lower-case hexadecimal digits."""
    if not is_digest(text):
        raise ValueError(f"Expected 64 hexadecimal digits. Received {text!r}.")
    return Digest(text)


def is_digest(text: str) -> bool:
    """Return whether a text has the form of a digest: 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes) -> Digest:
    """Return the SHA-256 of bytes."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_at(path: Path) -> Digest:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class StoreAddress:
    """Where the files of a store are. The values can be sent to a child process, since they contain no access keys.

    Attributes:
        folder: the folder of the files; with a `url`, the folder of their local copies.
        url: the bucket, as `s3://bucket/prefix`; None if files are only in the folder.
        endpoint: the address of an S3-compatible server; None for AWS.
        region: the region of the bucket.
        cache_bytes: maximum bytes of local copies.
    """

    folder: str
    url: str | None = None
    endpoint: str | None = None
    region: str = "us-east-1"
    cache_bytes: int = 50 * 1024**3


@dataclass(frozen=True)
class StoredFile:
    """A stored file with its size. `written_at` is in seconds since 1970 by the store's clock."""

    digest: Digest
    size_bytes: int
    written_at: float


class Store:
    """A store in a folder of a local or shared file system. The file with digest `ab12…` has the path `ab/ab12…`."""

    def __init__(self, root: Path, *, is_durable: bool = True) -> None:
        """Open the store in a folder; not durable, its files may be lost with the power until they are imported."""
        self.root = root
        self.is_durable = is_durable
        self._incoming = root / "incoming"
        with disk_errors():
            self._incoming.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> StoreAddress:
        """The address with which another process can open this store."""
        return StoreAddress(str(self.root))

    def check(self) -> None:
        """Check that the folder of the store exists. Raises NotFound."""
        if not self._incoming.is_dir():
            raise NotFound(f"The folder {self.root} does not exist. Restore it from a backup, then start again.")

    def writer(self) -> Writer:
        """Return a writer for a new file. Use it in a `with` block."""
        return Writer(self, self._incoming / secrets.token_hex(16))

    def put(self, chunks: bytes | Iterable[bytes]) -> Digest:
        """Store chunks of bytes as one file, and return its digest. Raises DiskFull; then nothing is stored."""
        with self.writer() as writer:
            for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
                writer.write(chunk)
            return writer.commit()

    def drop_unfinished(self, older_than_s: float = 86_400.0) -> int:
        """Delete the temporary files and folders that `unfinished` yields; return how many were deleted."""
        dropped = 0
        for left in self.unfinished(older_than_s):
            with contextlib.suppress(FileNotFoundError):  # the writer, or another process, has just removed it
                _remove(left)
                dropped += 1
        return dropped

    def unfinished(self, older_than_s: float) -> Iterator[Path]:
        """Yield temporary files and folders that did not change for `older_than_s` seconds.

        They are left over from processes that were killed while they wrote them.
        """
        for left in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _touched_at(left) < time.time() - older_than_s:
                    yield left

    @contextlib.contextmanager
    def lend_store(self, digest: Digest) -> Iterator[Store]:
        """Yield a store that contains a file, for a child process. It is in a folder and needs no access keys.

        The child process may write files to it. `import_files` then moves these files into this store; the others are
        lost.
        """
        found = self.path(digest)
        lent = Store(self._incoming / secrets.token_hex(16), is_durable=False)
        try:
            place = lent.path_for(digest)
            with disk_errors():
                place.parent.mkdir()
                self._link(found, place)
            yield lent
        finally:
            shutil.rmtree(lent.root, ignore_errors=True)

    def _link(self, found: Path, place: Path) -> None:
        place.symlink_to(found.absolute())

    def import_files(self, lent: Store, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Add files from a store that `lend_store` has lent, and yield each digest once its file is stored.

        All files are synced together, then moved. Files that were imported before are skipped. A file that the store
        has already is replaced, so that garbage collection does not delete it as an old one. Raises DiskFull, or
        Corrupt if a file does not match its digest; then nothing is moved.
        """

        def check(digest: Digest) -> None:
            check_lent(lent.path_for(digest), digest)
            sync(lent.path_for(digest))

        wanted = list(dict.fromkeys(digests))
        files = [digest for digest in wanted if lent.path_for(digest).exists()]
        with disk_errors(), ThreadPoolExecutor(_SYNCS_AT_ONCE, "sync") as pool:
            list(pool.map(check, files))
            folders = {self.path_for(digest).parent for digest in files}
            missing = [folder for folder in folders if not folder.exists()]
            for folder in missing:
                folder.mkdir(exist_ok=True)
            if missing:
                sync(self.root)
            for digest in files:
                os.replace(lent.path_for(digest), self.path_for(digest))
            list(pool.map(sync, folders))
        yield from wanted

    def has(self, digest: Digest) -> bool:
        """Return whether the store has a file with this digest."""
        return self.path_for(digest).exists()

    def missing(self, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Yield the digests whose files the store does not have, in the given order."""
        return (digest for digest in digests if not self.has(digest))

    def path(self, digest: Digest) -> Path:
        """Return the local path of a stored file. Raises NotFound."""
        place = self.path_for(digest)
        if not place.exists():
            raise NotFound(f"No stored file has the digest {digest}.")
        return place

    def prefetch(self, digests: Iterable[Digest]) -> None:
        """Download files that are not on this machine, so that later reads do not wait. Raises NotFound.

        Does nothing in a store without a bucket.
        """

    def open(self, digest: Digest) -> BufferedReader:
        """Open a stored file for reading. Raises NotFound."""
        return self.path(digest).open("rb")

    def read(self, digest: Digest) -> bytes:
        """Return the content of a file after checking it against the digest. Raises NotFound or Corrupt."""
        with self.open(digest) as file:
            data = file.read()
        if digest_of(data) != digest:
            raise _corrupt(digest)
        return data

    def verified_path(self, digest: Digest) -> Path:
        """Return the local path of a file after checking its content against the digest.

        Raises NotFound or Corrupt.
        """
        with self.open(digest) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _corrupt(digest)
        return self.path_for(digest)

    def delete(self, *digests: Digest) -> None:
        """Delete files. Digests without a file are ignored."""
        for digest in digests:
            self.path_for(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[Digest]:
        """Yield the digests of all stored files in ascending order."""
        return (file.digest for file in self.files())

    def files(self) -> Iterator[StoredFile]:
        """Yield all stored files, sorted by digest."""
        return files_in(self.root)

    def find(self, digest: Digest) -> StoredFile | None:
        """Return the size and the time of a stored file; None if there is no file with this digest."""
        try:
            status = self.path_for(digest).stat()
        except FileNotFoundError:
            return None
        return StoredFile(digest, status.st_size, status.st_mtime)

    def now(self) -> float:
        """Return the current time by the store's clock, in seconds since 1970.

        `StoredFile.written_at` is by the same clock. On a network file system, it is not this machine's clock.
        """
        os.utime(self._incoming)
        return self._incoming.stat().st_mtime

    def cached(self) -> Iterator[StoredFile]:
        """Yield the local copies of files in a bucket. A store without a bucket has none."""
        return iter(())

    def drop_cached(self, digests: Sequence[Digest]) -> None:
        """Delete local copies. The files in the bucket stay."""

    def add_file(self, temporary: Path, digest: Digest) -> None:
        """Move a complete and synced temporary file into the store. Raises DiskFull."""
        place = self.path_for(digest)
        with disk_errors():
            if not place.parent.exists():
                place.parent.mkdir(exist_ok=True)
                self._sync(self.root)
            os.replace(temporary, place)
            self._sync(place.parent)

    def _sync(self, folder: Path) -> None:
        if self.is_durable:
            sync(folder)

    def path_for(self, digest: Digest) -> Path:
        """Return the path at which the folder has, or would have, the file with this digest."""
        return self.root / digest[:2] / digest


class Writer:
    """Writes a new file. The store has the file only after `commit`."""

    def __init__(self, store: Store, temporary: Path) -> None:
        self.size_bytes = 0
        self._store = store
        self._temporary = temporary
        self._hash = hashlib.sha256()
        with disk_errors():
            self._file = temporary.open("xb")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()

    @property
    def digest(self) -> Digest:
        """The digest of the bytes that were written so far."""
        return Digest(self._hash.hexdigest())

    def write(self, chunk: bytes) -> None:
        """Append bytes to the file. Raises DiskFull."""
        with disk_errors():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    def reader(self) -> BufferedReader:
        """Open the file for reading the bytes that were written so far."""
        with disk_errors():
            self._file.flush()
        return self._temporary.open("rb")

    def commit(self) -> Digest:
        """Sync the file, add it to the store and return its digest. Raises DiskFull."""
        digest = self.digest
        with disk_errors():
            self._file.flush()
            if self._store.is_durable:
                os.fsync(self._file.fileno())
            self._file.close()
        self._store.add_file(self._temporary, digest)
        return digest

    def discard(self) -> None:
        """Delete the temporary file. Does nothing after `commit`."""
        with contextlib.suppress(OSError):  # on a full disk, the last flush fails; the file is deleted anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Convert errors in the block to DiskFull if the disk or a quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("The disk is full, so nothing was stored. Free some space, then try again.") from error
        raise


def files_in(root: Path) -> Iterator[StoredFile]:
    """Yield the files in a store's folder, sorted by digest. Files whose names are not digests are left out."""
    for folder in sorted(root.glob("??")):
        for file in sorted(folder.iterdir()):
            if is_digest(file.name):
                with contextlib.suppress(FileNotFoundError):  # another process has just deleted the file
                    status = file.stat()
                    yield StoredFile(Digest(file.name), status.st_size, status.st_mtime)


def _touched_at(left: Path) -> float:
    """Return the time of the last change of a file, or of a folder and the files in it."""
    inside = [entry.stat().st_mtime for entry in os.scandir(left)] if left.is_dir() else []
    return max([left.stat().st_mtime, *inside])


def _remove(left: Path) -> None:
    if left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink()


def sync(place: Path) -> None:
    """Sync a file, or a folder so that the renaming of a file in it survives a power failure."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_lent(place: Path, digest: Digest) -> None:
    """Check that what a child process has written is a file, no link, and matches its digest. Raises Corrupt."""
    if place.is_symlink() or digest_at(place) != digest:
        raise Corrupt(f"A file from a child process does not match its digest {digest}. Run the job again.")


def _corrupt(digest: Digest) -> Corrupt:
    return Corrupt(f"The stored file {digest} does not match its digest. Restore it from a backup.")
