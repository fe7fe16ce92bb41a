"""Stored files in a bucket that machines share, by the protocol of S3; the local folder is a cache of it.

A file is uploaded before it is named in the folder, so that what is named here is in the bucket, too. What is read is
looked for in the folder first. The files not used for longest make room for others there; a reader that has one of them
open keeps it. Keys of the bucket are `ab/ab12…` below its prefix, as paths are in a folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from artifacts.store import Digest, Store, StoreAddress, StoredFile, digest_at, disk_errors, files_in, is_digest
from errors import Corrupt, NotFound, StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

T = TypeVar("T")

CONNECT_S = 5.0
"""Seconds to wait for a connection to the bucket."""
STALL_S = 20.0
"""Seconds that an answer of the bucket, or a piece of one, may take: as long as uploading one part may."""

# A request may stand still and not last long: of a large file every piece comes in time.
_REQUEST_S = 3600.0
_RETRIES = 2
# None is tried once more after this, so that one that hangs is told after its first wait.
_RETRY_WITHIN_S = 5.0
_CHUNK_BYTES = 1024 * 1024
# In 20 s it needs 400 kB a second. S3 takes at most 10,000 parts, which makes 80 GiB.
_PART_BYTES = 8 * 1024 * 1024
_PARTS_AT_ONCE = 4
# An image is on its way for some 20 ms, of which the processor has one.
_FILES_AT_ONCE = 8

# What was found a moment ago stays, since whoever asked is about to open it.
_RECENTLY_USED_S = 60.0
_TARGET_FILL = 0.9
_CHECK_AFTER_SHARE = 0.05


_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]+[a-z0-9])(?:/(?P<prefix>.*?))?/?")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_MARKER_KEY = "in-use"
_REASON_LENGTH = 300


def open_store(address: StoreAddress) -> Store:
    """Open a store where it is said to be. Raises StoreRefused; a bucket that is away may come back later."""
    if address.url is None:
        return Store(Path(address.folder))
    store = BucketStore(address)
    try:
        store.check()
    except StoreUnavailable as error:
        if isinstance(error, StoreRefused):
            raise
    return store


def parse_url(url: str) -> tuple[str, str]:
    """Return the bucket and the prefix of `s3://bucket/prefix`. Raises ValueError."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError(f"Expected a bucket as s3://name or s3://name/prefix. Received {url!r}.")
    return found["bucket"], found["prefix"] or ""


class BucketStore(Store):
    """The files in a bucket, with those that were used last in a folder of this machine.

    Every method raises StoreUnavailable while the bucket is away that it needs; what lies in the folder needs none.
    """

    def __init__(self, address: StoreAddress) -> None:
        """Open a store with the keys that stand in the environment. Raises StoreRefused if there are none."""
        assert address.url is not None
        super().__init__(Path(address.folder))
        self._address = address
        self._folder = Store(self.root)
        self._bucket = _bucket(address)
        self._lock = threading.Lock()
        self._added_bytes = 0

    @property
    def address(self) -> StoreAddress:
        return self._address

    def check(self) -> None:
        """Check that the bucket answers and lets us in; the first time, that it can be written."""
        try:
            with self._request_errors():
                obstore.get(self._bucket, _MARKER_KEY).bytes()
        except NotFound:
            self.now()

    # --- reading -----------------------------------------------------------------------------------------------------

    def has(self, digest: Digest) -> bool:
        """Return whether the file is in the bucket."""
        return self.find(digest) is not None

    def find(self, digest: Digest) -> StoredFile | None:
        try:
            with self._request_errors():
                found = obstore.head(self._bucket, _key(digest))
        except NotFound:
            return None
        return StoredFile(digest, found["size"], found["last_modified"].timestamp())

    def missing(self, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Yield those of the files that are not in the bucket."""
        wanted = list(digests)
        for digest, has in zip(wanted, _map_concurrently(self.has, wanted), strict=True):
            if not has:
                yield digest

    def files(self) -> Iterator[StoredFile]:
        """Yield every file of the bucket, in the order of their digests."""
        pages = iter(obstore.list(self._bucket, chunk_size=1000))
        while True:
            with self._request_errors():
                page = next(pages, None)
            if page is None:
                return
            for found in page:
                name = found["path"].rpartition("/")[2]
                if is_digest(name):
                    yield StoredFile(Digest(name), found["size"], found["last_modified"].timestamp())

    def path(self, digest: Digest) -> Path:
        """Return where the file lies on this machine, after downloading it if need be. Raises NotFound or Corrupt."""
        if not self._touch_cached(digest):
            self._download(digest).close()
        return self.path_for(digest)

    def prefetch(self, digests: Iterable[Digest]) -> None:
        list(
            _map_concurrently(
                self.path, [digest for digest in dict.fromkeys(digests) if not self._touch_cached(digest)]
            )
        )

    def open(self, digest: Digest) -> BufferedReader:
        while self._touch_cached(digest):
            with contextlib.suppress(FileNotFoundError):  # it was dropped just when it was found
                return self.path_for(digest).open("rb")
        return self._download(digest)

    def read(self, digest: Digest) -> bytes:
        return self._read_or_refetch(super().read, digest)

    def verified_path(self, digest: Digest) -> Path:
        return self._read_or_refetch(super().verified_path, digest)

    def _read_or_refetch(self, read: Callable[[Digest], T], digest: Digest) -> T:
        """Read a file, from the bucket if the copy on this machine is not what it was. Raises NotFound or Corrupt."""
        try:
            return read(digest)
        except Corrupt:
            self.drop_cached([digest])
            return read(digest)

    def _download(self, digest: Digest) -> BufferedReader:
        """Download the file and return it open, since its name may be dropped at once. Raises NotFound or Corrupt."""
        with self._folder.writer() as writer:
            try:
                with self._request_errors():
                    pieces = iter(obstore.get(self._bucket, _key(digest)).stream(min_chunk_size=_CHUNK_BYTES))
            except NotFound:
                raise NotFound(f"No stored file has the digest {digest}.") from None
            while True:
                with self._request_errors():
                    piece = next(pieces, None)
                if piece is None:
                    break
                writer.write(piece)
            if writer.digest != digest:
                raise Corrupt(
                    f"The file {digest} in the bucket {self._address.url} is not what its digest says. Restore it from "
                    "a backup or from an older version of the object."
                )
            with contextlib.ExitStack() as unless_kept:
                file = unless_kept.enter_context(writer.reader())
                writer.commit()
                self._make_room_for(writer.size_bytes)
                unless_kept.pop_all()
            return file

    # --- writing -----------------------------------------------------------------------------------------------------

    def add_file(self, temporary: Path, digest: Digest) -> None:
        """Upload a file that is written and synced, then name it by its digest. Raises DiskFull."""
        size_bytes = temporary.stat().st_size
        self._upload(temporary, digest)
        self._folder.add_file(temporary, digest)
        self._make_room_for(size_bytes)

    def _upload(self, file: Path, digest: Digest) -> None:
        """Upload a file, even if it is there: that repairs it, and to a collection it is new again."""
        with file.open("rb") as stream:
            try:
                with self._request_errors():
                    obstore.put(
                        self._bucket,
                        _key(digest),
                        stream,
                        chunk_size=_PART_BYTES,
                        max_concurrency=_PARTS_AT_ONCE,
                    )
            except NotFound as error:
                raise self._unavailable("it dropped what was uploaded") from error

    @contextlib.contextmanager
    def lend_store(self, digest: Digest) -> Iterator[Store]:
        """Yield a folder of its own, which no other process makes room in and which goes at the end of the block."""
        lent = Store(self._incoming / secrets.token_hex(16))
        try:
            place, found = lent.path_for(digest), self.path(digest)
            with disk_errors():
                place.parent.mkdir()
                os.link(found, place)
            yield lent
        finally:
            shutil.rmtree(lent.root, ignore_errors=True)

    def import_files(self, lent: Store, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Upload files that were put into a store that was lent, and yield each as soon as that is done.

        Those that were taken over before are passed over. Raises Corrupt if one is not what its digest says.
        """

        def import_one(digest: Digest) -> Digest:
            place = lent.path_for(digest)
            if place.exists():
                if digest_at(place) != digest:
                    raise Corrupt(f"A file that was to be kept is not what its digest {digest} says.")
                self.add_file(place, digest)
            return digest

        return _map_concurrently(import_one, list(dict.fromkeys(digests)))

    def now(self) -> float:
        """Return the time by the bucket's clock, which the stamp of something that is written there shows."""
        with self._request_errors():
            obstore.put(self._bucket, _MARKER_KEY, b"This bucket holds files of Espalier, named by their SHA-256.\n")
            return obstore.head(self._bucket, _MARKER_KEY)["last_modified"].timestamp()

    def delete(self, *digests: Digest) -> None:
        if digests:
            with self._request_errors():
                obstore.delete(self._bucket, [_key(digest) for digest in digests])
            self.drop_cached(digests)

    # --- the folder --------------------------------------------------------------------------------------------------

    def cached(self) -> Iterator[StoredFile]:
        return files_in(self.root)

    def drop_cached(self, digests: Sequence[Digest]) -> None:
        self._folder.delete(*digests)

    def make_room(self) -> int:
        """Drop the copies not used for longest until the others fit well; return how many were dropped."""
        files = sorted(self.cached(), key=lambda file: file.written_at)
        held_bytes = sum(file.size_bytes for file in files)
        if held_bytes <= self._address.cache_bytes:
            return 0
        dropped = 0
        just_now = time.time() - _RECENTLY_USED_S
        for file in files:
            if held_bytes <= _TARGET_FILL * self._address.cache_bytes or file.written_at > just_now:
                break
            self.drop_cached([file.digest])
            held_bytes -= file.size_bytes
            dropped += 1
        return dropped

    def _make_room_for(self, size_bytes: int) -> None:
        """Count what was added; look at the whole folder, which others fill too, once that is a part of the budget."""
        with self._lock:
            self._added_bytes += size_bytes
            if self._added_bytes < _CHECK_AFTER_SHARE * self._address.cache_bytes:
                return
            self._added_bytes = 0
        self.make_room()

    def _touch_cached(self, digest: Digest) -> bool:
        """Return whether the file lies in the folder, and note there that it is used."""
        place = self.path_for(digest)
        try:
            if place.stat().st_mtime < time.time() - _RECENTLY_USED_S / 2:
                os.utime(place)
        except FileNotFoundError:
            return False
        return True

    # --- the bucket --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _request_errors(self) -> Iterator[None]:
        """Turn what goes wrong in a request into NotFound, StoreRefused or StoreUnavailable."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreRefused(
                f"The bucket {self._address.url} does not let this service in. Check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, and that this key may list, read, write and delete there."
            ) from error
        except (BaseError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise StoreRefused(
                    f"There is no bucket {self._address.url} at {self._address.endpoint or self._address.region}. "
                    "Create it, or correct ESPALIER_STORE_URL, ESPALIER_STORE_ENDPOINT or ESPALIER_STORE_REGION."
                ) from error
            if isinstance(error, FileNotFoundError):
                raise NotFound("The bucket has no such file.") from error
            raise self._unavailable(_reason(error)) from error

    def _unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"The bucket {self._address.url} cannot be used just now: {reason}. See that its server runs and that this "
            "machine can reach it; what waits for it goes on by itself then."
        )


def _bucket(address: StoreAddress) -> S3Store:
    assert address.url is not None
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing:
        raise StoreRefused(
            f"Expected the keys of the bucket {address.url} in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. "
            f"Received nothing in {' and '.join(missing)}."
        )
    name, prefix = parse_url(address.url)
    client: ClientConfig = {
        "allow_http": (address.endpoint or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "read_timeout": timedelta(seconds=STALL_S),
        "timeout": timedelta(seconds=_REQUEST_S),
    }
    retries: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_WITHIN_S)}
    config: S3Config = {"region": address.region}
    if address.endpoint is not None:
        config["endpoint"] = address.endpoint
    return S3Store(name, prefix=prefix or None, config=config, client_options=client, retry_config=retries)


def _key(digest: Digest) -> str:
    return f"{digest[:2]}/{digest}"


def _reason(error: Exception) -> str:
    """Return the line of a long message that says what happened."""
    first = str(error).partition("\n")[0].strip().rstrip(".")
    return first if len(first) <= _REASON_LENGTH else f"{first[:_REASON_LENGTH]}…"


def _map_concurrently(do: Callable[[Digest], T], digests: Sequence[Digest]) -> Iterator[T]:
    """Yield what a function returns for each file, in their order; the rest is not begun once one fails."""
    pool = ThreadPoolExecutor(_FILES_AT_ONCE, "bucket")
    try:
        yield from pool.map(do, digests)
    finally:
        pool.shutdown(cancel_futures=True)
