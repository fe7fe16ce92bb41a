"""Files named by the SHA-256 of what is in them. Knows nothing of what the bytes mean.

A file is written under a temporary name, synced, then renamed: a digest either names the whole file or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import NewType

from errors import Corrupt, DiskFull, NotFound

Digest = NewType("Digest", str)

_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest: 64 lower-case hexadecimal digits. Raises ValueError otherwise."""
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"Expected 64 hexadecimal digits. Received: {text!r}")
    return Digest(text)


def digest_of(data: bytes) -> Digest:
    """Return the SHA-256 of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())


class Store:
    """The files in one folder of a local or shared file system, each at `ab/ab12…`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

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
        """Remove what writers that were killed left behind; return how many files."""
        dropped = 0
        for file in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer ends just now, or another process drops it too
                if file.stat().st_mtime < time.time() - older_than_s:
                    file.unlink()
                    dropped += 1
        return dropped

    def has(self, digest: Digest) -> bool:
        """Say whether the file is here."""
        return self.place(digest).exists()

    def path(self, digest: Digest) -> Path:
        """Return where the file lies on this machine. Raises NotFound."""
        place = self.place(digest)
        if not place.exists():
            raise NotFound(f"No stored file has the digest {digest}.")
        return place

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
        return self.place(digest)

    def delete(self, digest: Digest) -> None:
        """Remove the file if it is here."""
        self.place(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every stored file."""
        for folder in sorted(self.root.glob("??")):
            for file in sorted(folder.iterdir()):
                yield parse_digest(file.name)

    def place(self, digest: Digest) -> Path:
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

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Raises DiskFull."""
        with disk_errors():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    def commit(self) -> Digest:
        """Sync the file, name it by its digest and return that. Raises DiskFull."""
        digest = Digest(self._hash.hexdigest())
        place = self._store.place(digest)
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            place.parent.mkdir(exist_ok=True)
            os.replace(self._temporary, place)
            _sync_folder(place.parent)
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


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _corrupt(digest: Digest) -> Corrupt:
    return Corrupt(f"The stored file {digest} is not what its digest says. Restore it from a backup.")
