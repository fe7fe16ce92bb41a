"""A store that keeps files in an S3 bucket, which several machines share, and copies of them in a local folder.

A file is uploaded before it is added to the folder, so every file in the folder is also in the bucket. A read uses the
copy in the folder if there is one. The least recently used copies are evicted; a copy that is open stays readable. The
key of a file in the bucket is the prefix and `ab/ab12…`, like its path in the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
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

from artifacts.store import Digest, Store, StoreAddress, StoredFile, check_lent, disk_errors, files_in, is_digest, sync
from errors import Corrupt, NotFound, StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

T = TypeVar("T")

CONNECT_S = 5.0
"""Seconds to wait for a connection to the bucket."""
STALL_S = 20.0
"""Maximum seconds for the bucket to send a response or the next piece of it, or to receive one part of an upload."""

# Maximum seconds for a whole request, even for a large file. `STALL_S` limits each piece of it.
_REQUEST_S = 3600.0
_RETRIES = 2
# Maximum seconds after which a request is still retried. It is shorter than `STALL_S`, so that a bucket that hangs is
# reported after the first timeout.
_RETRY_WITHIN_S = 5.0
_CHUNK_BYTES = 1024 * 1024
# To upload a part within `STALL_S`, 400 kB/s are needed. S3 allows 10,000 parts, so a file may have up to 80 GiB.
_PART_BYTES = 8 * 1024 * 1024
_PARTS_AT_ONCE = 4
# Number of parallel downloads. An image takes about 20 ms, but only 1 ms of processor time.
_FILES_AT_ONCE = 8

# Seconds for which a copy is not evicted after it was used, because the caller may be about to open it.
_RECENTLY_USED_S = 60.0
_TARGET_FILL = 0.9
_CHECK_AFTER_SHARE = 0.05


_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]+[a-z0-9])(?:/(?P<prefix>.*?))?/?")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_MARKER_KEY = "in-use"
_REASON_LENGTH = 300


def open_store(address: StoreAddress) -> Store:
    """Open the store at an address.

    Raises StoreRefused if the bucket does not exist or denies access. A bucket that does not respond is no error yet.
    """
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
    """Return the bucket and the prefix in a URL such as `s3://bucket/prefix`. Raises ValueError if it is malformed."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError(f"Expected a bucket as s3://name or s3://name/prefix. Received {url!r}.")
    return found["bucket"], found["prefix"] or ""


class BucketStore(Store):
    """A store whose files are in a bucket. Copies of recently used files are in a folder on this machine.

    Methods raise StoreUnavailable if they need the bucket and it does not respond. Reading a copy needs no bucket.
    """

    def __init__(self, address: StoreAddress) -> None:
        """Open a store with the access keys in the environment. Raises StoreRefused if a key is missing."""
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
        """Check that the bucket can be read. If it was never used before, also check that it can be written."""
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
        """Yield the digests whose files are not in the bucket, in the given order."""
        asked = list(digests)
        for digest, has in zip(asked, _map_concurrently(self.has, asked), strict=True):
            if not has:
                yield digest

    def files(self) -> Iterator[StoredFile]:
        """Yield all stored files in the bucket, sorted by digest."""
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
        """Return the path of the local copy of a file; download it if necessary. Raises NotFound or Corrupt."""
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
            with contextlib.suppress(FileNotFoundError):  # the copy was evicted just after it was found
                return self.path_for(digest).open("rb")
        return self._download(digest)

    def read(self, digest: Digest) -> bytes:
        return self._read_or_refetch(super().read, digest)

    def verified_path(self, digest: Digest) -> Path:
        return self._read_or_refetch(super().verified_path, digest)

    def _read_or_refetch(self, read: Callable[[Digest], T], digest: Digest) -> T:
        """Read a file. If its local copy is damaged, download the file again. Raises NotFound or Corrupt."""
        try:
            return read(digest)
        except Corrupt:
            self.drop_cached([digest])
            return read(digest)

    def _download(self, digest: Digest) -> BufferedReader:
        """Download a file and return the copy open for reading, because it may be evicted at once.

        Raises NotFound or Corrupt.
        """
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
                    f"The file {digest} in the bucket {self._address.url} does not match its digest. Restore it from "
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
        """Upload a complete temporary file, then move it into the folder under its digest. Raises DiskFull."""
        size_bytes = temporary.stat().st_size
        self._upload(temporary, digest)
        self._folder.add_file(temporary, digest)
        self._make_room_for(size_bytes)

    def _upload(self, file: Path, digest: Digest) -> None:
        """Upload a file, even if the bucket has it already.

        This repairs a damaged file, and keeps garbage collection from deleting it as an old one.
        """
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
                raise self._unavailable("it lost a part of an upload") from error

    def _link(self, found: Path, place: Path) -> None:
        os.link(found, place)  # `found` may be evicted meanwhile

    def import_files(self, lent: Store, digests: Iterable[Digest]) -> Iterator[Digest]:
        """Upload files from a store that `lend_store` has lent, and yield each digest once its file is uploaded.

        Files that were imported before are not uploaded again. Raises Corrupt if a file does not match its digest.
        """

        def import_one(digest: Digest) -> Digest:
            place = lent.path_for(digest)
            if place.exists():
                check_lent(place, digest)
                with disk_errors():
                    sync(place)
                self.add_file(place, digest)
            return digest

        return _map_concurrently(import_one, list(dict.fromkeys(digests)))

    def now(self) -> float:
        """Return the time by the bucket's clock, in seconds since 1970.

        To read the clock, a marker object is written, and the time of its last change is read.
        """
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
        """If the copies exceed the budget of the cache, evict the least recently used; return how many were evicted."""
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
        """Count bytes that were added to the folder, and call `make_room` once they exceed 5 % of the cache's budget.

        `make_room` reads the whole folder, because other processes add files too.
        """
        with self._lock:
            self._added_bytes += size_bytes
            if self._added_bytes < _CHECK_AFTER_SHARE * self._address.cache_bytes:
                return
            self._added_bytes = 0
        self.make_room()

    def _touch_cached(self, digest: Digest) -> bool:
        """Return whether the folder has a copy of the file. If so, mark the copy as used now."""
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
        """Convert errors of requests in the block to NotFound, StoreRefused or StoreUnavailable."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreRefused(
                f"The bucket {self._address.url} denies access. Check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, and that this key may list, read, write and delete objects there."
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
            f"The bucket {self._address.url} is unavailable: {reason}. Check that its server runs and that this "
            "machine can reach it. Waiting jobs then continue by themselves."
        )


def _bucket(address: StoreAddress) -> S3Store:
    assert address.url is not None
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing:
        raise StoreRefused(
            f"The bucket {address.url} needs keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Set "
            f"{' and '.join(missing)}."
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
    """Return the first line of an error message, shortened to `_REASON_LENGTH`."""
    first = str(error).partition("\n")[0].strip().rstrip(".")
    return first if len(first) <= _REASON_LENGTH else f"{first[:_REASON_LENGTH]}…"


def _map_concurrently(do: Callable[[Digest], T], digests: Sequence[Digest]) -> Iterator[T]:
    """Call a function for each digest on several threads, and yield the results in order.

    After an error, no further calls start.
    """
    pool = ThreadPoolExecutor(_FILES_AT_ONCE, "bucket")
    try:
        yield from pool.map(do, digests)
    finally:
        pool.shutdown(cancel_futures=True)
