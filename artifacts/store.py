"""Files named by the SHA-256 of what is in them, in a folder. Knows nothing of what the bytes mean, nor of buckets.

A file is written under a temporary name, synced, then renamed: a digest either names the whole file or nothing.
`artifacts.bucket_store` keeps them in a bucket behind the same methods.
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
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import NewType

from errors import Corrupt, DiskFull, NotFound

Digest = NewType("Digest", str)

_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest: 64 lower-case hexadecimal digits. Raises ValueError otherwise."""
    if not is_digest(text):
        raise ValueError(f"Expected 64 hexadecimal digits. Received: {text!r}")
    return Digest(text)


def is_digest(text: str) -> bool:
    """Return whether `text` could be a digest."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes) -> Digest:
    """Return the SHA-256 of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_at(path: Path) -> Digest:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class StoreAddress:
    """Where stored files are, as processes and children are told it: plain values, no keys.

    Without a `url` (`s3://bucket/prefix`) that is the folder; with one the folder is a cache of the bucket, of at most
    `cache_bytes`. `endpoint` is an S3-compatible server's; None means that of AWS in the region.
    """

    folder: str
    url: str | None = None
    endpoint: str | None = None
    region: str = "us-east-1"
    cache_bytes: int = 50 * 1024**3


@dataclass(frozen=True)
class StoredFile:
    """A stored file, and when it was written: seconds since 1970 by the clock of what keeps it."""

    digest: Digest
    size_bytes: int
    written_at: float


class Store:
    """The files in one folder of a local or shared file system, each at `ab/ab12…`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / "incoming"
        with disk_errors():
            self._incoming.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> StoreAddress:
        """What another process must be told to open this store."""
        return StoreAddress(str(self.root))

    def check(self) -> None:
        """Check that the store can be used. Raises NotFound."""
        if not self._incoming.is_dir():
            raise NotFound(f"The folder {self.root} is gone. Restore it from a backup, then start the service again.")

    def writer(self) -> Writer:
        """Return a writer for a new file; use it in a `with` block."""
        return Writer(self, self._incoming / secrets.token_hex(16))

    def put(self, chunks: bytes | Iterable[bytes]) -> Digest:
        """Store `chunks` as one file and return its digest. Raises DiskFull, leaving nothing behind."""
        with self.writer() as writer:
            for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
                writer.write(chunk)
            return writer.commit()

    def drop_unfinished(self, older_than_s: float = 86_400.0) -> int:
        """Remove what writers and borrowers that were killed left behind; return how many files and folders."""
        dropped = 0
        for left in self.unfinished(older_than_s):
            with contextlib.suppress(FileNotFoundError):  # its writer ends just now, or another process drops it too
                _remove(left)
                dropped += 1
        return dropped

    def unfinished(self, older_than_s: float) -> Iterator[Path]:
        """Yield what has been on its way for so long that its writer or borrower must have been killed."""
        for left in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _touched_at(left) < time.time() - older_than_s:
                    yield left

    @contextlib.contextmanager
    def lend_store(self, digest: Digest) -> Iterator[Store]:
        """Yield a store for a process that is told a folder and nothing else; the file is in it.

        What that process puts there is this store's once it is taken over, by `adopt`.
        """
        self.path(digest)
        yield self

    def import_files(self, lent: Store, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Take over files that were put into a store that was lent, and yield each as soon as it is kept."""
        yield from digests

    def has(self, digest: Digest) -> bool:
        """Return whether the file is here."""
        return self.path_for(digest).exists()

    def missing(self, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Yield those of the files that are not here."""
        return (digest for digest in digests if not self.has(digest))

    def path(self, digest: Digest) -> Path:
        """Return where the file lies on this machine. Raises NotFound."""
        place = self.path_for(digest)
        if not place.exists():
            raise NotFound(f"No stored file has the digest {digest}.")
        return place

    def prefetch(self, digests: Iterable[Digest]) -> None:
        """Have files lie on this machine, so that whoever reads them next waits for none. Raises NotFound."""

    def open(self, digest: Digest) -> BufferedReader:
        """Open the file for reading. Raises NotFound."""
        return self.path(digest).open("rb")

    def read(self, digest: Digest) -> bytes:
        """Return the whole file, checked against its digest. Raises NotFound or Corrupt."""
        with self.open(digest) as file:
            data = file.read()
        if digest_of(data) != digest:
            raise _corrupt(digest)
        return data

    def verified_path(self, digest: Digest) -> Path:
        """Return where the file lies, after reading it once against its digest. Raises NotFound or Corrupt."""
        with self.open(digest) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _corrupt(digest)
        return self.path_for(digest)

    def delete(self, *digests: Digest) -> None:
        """Remove those of the files that are here."""
        for digest in digests:
            self.path_for(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every stored file, in their order."""
        return (file.digest for file in self.files())

    def files(self) -> Iterator[StoredFile]:
        """Yield every stored file, in the order of their digests."""
        return files_in(self.root)

    def find(self, digest: Digest) -> StoredFile | None:
        """Return what is known of a stored file; None if it is not here."""
        try:
            status = self.path_for(digest).stat()
        except FileNotFoundError:
            return None
        return StoredFile(digest, status.st_size, status.st_mtime)

    def now(self) -> float:
        """Return the time by the clock that stamps the files: on a network's file system that is not this machine's."""
        os.utime(self._incoming)
        return self._incoming.stat().st_mtime

    def cached(self) -> Iterator[StoredFile]:
        """Yield the files that lie on this machine as copies of what is kept elsewhere."""
        return iter(())

    def drop_cached(self, digests: Sequence[Digest]) -> None:
        """Remove copies from this machine."""

    def add_file(self, temporary: Path, digest: Digest) -> None:
        """Name a file that is written and synced by its digest. Raises DiskFull."""
        place = self.path_for(digest)
        with disk_errors():
            if not place.parent.exists():
                place.parent.mkdir(exist_ok=True)
                _sync_folder(self.root)
            os.replace(temporary, place)
            _sync_folder(place.parent)

    def path_for(self, digest: Digest) -> Path:
        """Return where a file of this digest belongs, whether it is here or not."""
        return self.root / digest[:2] / digest


class Writer:
    """A file on its way into a store; it exists there only after `commit`."""

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
        """The digest of what was written so far."""
        return Digest(self._hash.hexdigest())

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises DiskFull."""
        with disk_errors():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    def reader(self) -> BufferedReader:
        """Open for reading what was written so far."""
        with disk_errors():
            self._file.flush()
        return self._temporary.open("rb")

    def commit(self) -> Digest:
        """Sync the file, name it by its digest and return that. Raises DiskFull."""
        digest = self.digest
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._store.add_file(self._temporary, digest)
        return digest

    def discard(self) -> None:
        """Drop what was written; does nothing after `commit`."""
        with contextlib.suppress(OSError):  # a full disk fails the last flush too, and the file goes anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn "no space left" inside the block into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("The disk is full. Free some space, then send it again; nothing was kept.") from error
        raise


def files_in(root: Path) -> Iterator[StoredFile]:
    """Yield the files of a folder that are named by their digests, in the order of these."""
    for folder in sorted(root.glob("??")):
        for file in sorted(folder.iterdir()):
            if is_digest(file.name):
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    status = file.stat()
                    yield StoredFile(Digest(file.name), status.st_size, status.st_mtime)


def _touched_at(left: Path) -> float:
    """Return when something was last written to a file, or into a folder of files."""
    inside = [entry.stat().st_mtime for entry in os.scandir(left)] if left.is_dir() else []
    return max([left.stat().st_mtime, *inside])


def _remove(left: Path) -> None:
    if left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _corrupt(digest: Digest) -> Corrupt:
    return Corrupt(f"The stored file {digest} is not what its digest says. Restore it from a backup.")
