"""Reads zip, tar and tar.gz archives safely. Never extracts files to disk, so the name of a member is only text.

Names and sizes are checked before any member is read. While members are read, their unpacked bytes are counted, because
headers may lie. `artifacts.layout` interprets the folders, and `artifacts.images` decodes the images.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from artifacts.file_names import find_code_page, is_litter
from errors import ArchiveRefused, Refused

MIB = 1024 * 1024
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ArchiveLimits:
    """Upper limits for an archive. A ratio is the number of unpacked bytes per stored byte.

    Attributes:
        entries: number of files, and also number of folders.
        depth: number of parts in a path.
        part_bytes: length of one part of a path.
        path_bytes: length of a whole path.
        inflated_bytes: size of all files when unpacked.
        inflated_ratio: ratio of the whole archive.
        inflated_ratio_from_bytes: an archive may unpack to this size, whatever its ratio.
        member_bytes: size of one file when unpacked.
        member_ratio: ratio of one file in a zip.
    """

    entries: int = 200_000
    depth: int = 8
    part_bytes: int = 255
    path_bytes: int = 1024
    inflated_bytes: int = 20 * 1024 * MIB
    inflated_ratio: int = 50
    inflated_ratio_from_bytes: int = 64 * MIB
    member_bytes: int = 64 * MIB
    member_ratio: int = 100
    member_ratio_from_bytes: int = 8 * MIB


@dataclass(frozen=True)
class Entry:
    """One regular file of an archive. Its `path` has passed `check_path`; `size_bytes` is its unpacked size."""

    path: str
    size_bytes: int


class Archive(Protocol):
    """An archive whose names and sizes were checked.

    Attributes:
        entries: the files that can be read.
        refused: files that cannot be read, by their paths or, if the path itself is wrong, by their names.
        ignored: number of hidden files and files of operating systems, which are in neither.
    """

    entries: tuple[Entry, ...]
    refused: tuple[Refused, ...]
    ignored: int

    def read(self, paths: Collection[str]) -> Iterator[tuple[str, bytes | Refused]]:
        """Yield (path, content) for each of these paths that is in the archive, in the archive's order.

        The content is Refused instead of bytes if the file is damaged.
        """
        ...


def open_archive(path: Path, limits: ArchiveLimits, code_page: str | None = None) -> Archive:
    """Check the names and sizes of an archive and return it for reading. Raises ArchiveRefused.

    `code_page` is the encoding of names that are not in UTF-8; None if it must be found out.
    """
    with path.open("rb") as file:
        kind = sniff(file.read(262))
    if kind == "zip":
        return ZipArchive(path, limits, code_page)
    if kind in ("tar", "tar.gz"):
        return TarArchive(path, limits, code_page)
    raise ArchiveRefused(
        f"Expected a zip, tar or tar.gz archive. Received {_format_name(path)}. Pack the images again."
    )


_OTHER_FORMATS = {
    b"7z\xbc\xaf'\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"MZ": "a Windows program",
    b"PK\x07\x08": "a part of a split zip",
}


def _format_name(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    known = (name for start, name in _OTHER_FORMATS.items() if head.startswith(start))
    return next(known, "a file in another format" if head else "an empty file")


def sniff(head: bytes) -> str | None:
    """Return the format of an archive: `zip`, `tar`, `tar.gz`, or None if it has another format.

    `head` contains at least the first 262 bytes of the archive, or all of it if it is shorter.
    """
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "tar.gz"
    if head[257:262] == b"ustar":
        return "tar"
    return None


# --- names ---------------------------------------------------------------------------------------------------------

_DRIVE = re.compile(r"[A-Za-z]:")


def check_path(name: str, limits: ArchiveLimits) -> str:
    """Return a member's name as a relative path with `/`, in NFC. Raises ArchiveRefused for a bad name.

    Only an error that concerns the whole archive repeats the name.
    """
    check_safe(name)
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise ArchiveRefused("The file name contains control characters. Rename the file.")
    parts = _parts(unicodedata.normalize("NFC", name))  # macOS writes NFD, all other systems NFC
    if len(parts) > limits.depth:
        raise ArchiveRefused(f"The path has {len(parts)} parts; the limit is {limits.depth}.")
    sizes = [len(part.encode()) for part in parts]
    if max(sizes, default=0) > limits.part_bytes or sum(sizes) + len(sizes) - 1 > limits.path_bytes:
        raise ArchiveRefused(
            f"The path is too long. The limits are {limits.part_bytes} bytes for a name and {limits.path_bytes} bytes "
            "for a path. Rename the file or its folders."
        )
    if not parts:
        raise ArchiveRefused("The file has no name. Pack the archive again.")
    return "/".join(parts)


def check_safe(name: str) -> None:
    """Check that a member's name does not lead outside the archive. Raises ArchiveRefused."""
    shown, path, parts = _shown(name), name.replace("\\", "/"), _parts(name)
    if "\0" in name:
        raise ArchiveRefused(f"The file name {shown} contains control characters. Rename the file.")
    if path.startswith("/") or (parts and _DRIVE.match(parts[0])):
        raise ArchiveRefused(f"The archive contains the absolute path {shown}. Pack it with relative paths.")
    if ".." in parts:
        raise ArchiveRefused(f"The archive contains the path {shown} with '..'. Pack it with paths without '..'.")


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "…")


class _EntryCollector:
    """Collects the entries of an archive, refuses single files, and checks the limits on number and total size."""

    def __init__(self, stored_bytes: int, limits: ArchiveLimits) -> None:
        self.entries: list[Entry] = []
        self.refused: list[Refused] = []
        self.ignored = 0
        self._seen: set[str] = set()
        self._files = 0
        self._folders = 0
        self._limits = limits
        self._budget = _budget(stored_bytes, limits)
        self._inflated = 0

    def add_folder(self, name: str) -> None:
        """Check a folder and the number of folders. Raises ArchiveRefused."""
        check_safe(name)
        self._folders += 1
        if self._folders > self._limits.entries:
            raise ArchiveRefused(f"The archive has more folders than the limit of {self._limits.entries:,}.")

    def add(self, name: str, size_bytes: int, check: Callable[[], None]) -> str | None:
        """Check one file and add it; return its path, or None if it is ignored or refused.

        `check` raises ArchiveRefused if anything but the file's name and size is wrong. Raises ArchiveRefused if there
        are too many files, if they are too large together, or if a name leads outside the archive.
        """
        self._files += 1
        if self._files > self._limits.entries:
            raise _too_many_files(self._limits)
        if is_litter(name):
            self.ignored += 1
            return None
        check_safe(name)
        path = None
        try:
            path = check_path(name, self._limits)
            check()
            if size_bytes > self._limits.member_bytes:
                raise ArchiveRefused(
                    f"The file has {_mib(size_bytes)}; the limit for a file is {_mib(self._limits.member_bytes)}."
                )
            if path in self._seen:
                raise ArchiveRefused("The archive contains another file of this name. Rename one of them.")
        except ArchiveRefused as error:
            self.refused.append(Refused(path or _shown(name)[1:-1], error.detail))
            return None
        self._inflated += size_bytes
        if self._inflated > self._budget:
            raise _too_inflated(self._budget)
        self._seen.add(path)
        self.entries.append(Entry(path, size_bytes))
        return path

    def check_any(self) -> None:
        """See that not all files were refused. Raises ArchiveRefused with the reason of the first."""
        if self.refused and not self.entries:
            first = self.refused[0]
            raise ArchiveRefused(f"No file of the archive can be read. {_shown(first.path)}: {first.reason}")


def _no_content(what: str, packer: str | None = None) -> ArchiveRefused:
    """Return the error for a file without content. `packer` is the command that would pack the content."""
    advice = f"Pack the file itself, as {packer} does." if packer else "Leave it out."
    return ArchiveRefused(f"Expected a file with content. Received {what}. {advice}")


def _too_many_files(limits: ArchiveLimits) -> ArchiveRefused:
    return ArchiveRefused(
        f"The archive has more files than the limit of {limits.entries:,}. Split it into several versions, or raise "
        "ESPALIER_ARCHIVE_ENTRIES."
    )


def _budget(stored_bytes: int, limits: ArchiveLimits) -> int:
    ratio = max(limits.inflated_ratio * stored_bytes, limits.inflated_ratio_from_bytes)
    return min(limits.inflated_bytes, ratio)


def _too_inflated(budget: int) -> ArchiveRefused:
    return ArchiveRefused(
        f"The archive unpacks to more than the limit of {_mib(budget)}. Split it into several archives, and upload "
        "each as a version of the data set."
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB"


# --- zip -----------------------------------------------------------------------------------------------------------

_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _SIZES_FOLLOW, _PATCH, _STRONG, _UTF8, _MASKED = 0x1, 0x8, 0x20, 0x40, 0x800, 0x2000
_IN_ZIP64 = 0xFFFFFFFF
_UNICODE_PATH = 0x7075


class ZipArchive:
    """A zip archive. Opening it checks that its central directory agrees with its local headers."""

    def __init__(self, path: Path, limits: ArchiveLimits, code_page: str | None) -> None:
        self._limits = limits
        self._budget = _budget(path.stat().st_size, limits)
        try:
            with zipfile.ZipFile(path) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
            raise ArchiveRefused(f"The zip cannot be read: {error}. Pack it again.") from error
        self._path = path
        self._infos: dict[str, zipfile.ZipInfo] = {}
        index = _EntryCollector(path.stat().st_size, limits)
        with path.open("rb") as file:
            _check_headers(file, infos, directory)
        for info, name in zip(infos, _names(infos, code_page), strict=True):
            if name.endswith(("/", "\\")):
                index.add_folder(name)
                continue
            entry = index.add(name, info.file_size, partial(self._check, info))
            if entry is not None:
                self._infos[entry] = info
        index.check_any()
        self.entries, self.refused, self.ignored = tuple(index.entries), tuple(index.refused), index.ignored

    def read(self, paths: Collection[str]) -> Iterator[tuple[str, bytes | Refused]]:
        inflated = 0
        with zipfile.ZipFile(self._path) as archive:
            for path, info in self._infos.items():
                if path not in paths:
                    continue
                data = self._read(archive, path, info)
                if isinstance(data, bytes):
                    inflated += len(data)
                    if inflated > self._budget:
                        raise _too_inflated(self._budget)
                yield path, data

    def _read(self, archive: zipfile.ZipFile, path: str, info: zipfile.ZipInfo) -> bytes | Refused:
        try:
            with archive.open(info) as member:
                data = member.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            return Refused(path, f"damaged in the archive: {error}")
        if len(data) != info.file_size:
            return Refused(path, f"damaged in the archive: expected {info.file_size} bytes, found {len(data)}")
        return data

    def _check(self, info: zipfile.ZipInfo) -> None:
        if info.flag_bits & (_ENCRYPTED | _STRONG | _MASKED | _PATCH):
            raise ArchiveRefused("The file is encrypted. Pack the archive without encryption.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveRefused(
                f"Expected files that are stored or deflated. Received compression method {info.compress_type}. Pack "
                "them as an ordinary zip."
            )
        mode = info.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _no_content("a symbolic link", "`zip` without -y") if stat.S_ISLNK(mode) else _no_content("a device")
        most = max(self._limits.member_ratio * max(info.compress_size, 1), self._limits.member_ratio_from_bytes)
        if info.file_size > most:
            raise ArchiveRefused(
                f"The file has {info.compress_size} bytes and unpacks to {info.file_size}; the limit is "
                f"{self._limits.member_ratio} times the stored size, or {_mib(self._limits.member_ratio_from_bytes)}."
            )


def _check_headers(file: IO[bytes], infos: Sequence[zipfile.ZipInfo], directory: int) -> None:
    """Check that every local header agrees with the central directory, and that no two members overlap."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        shown = repr(info.filename[:_SHOWN_CHARACTERS])
        if not 0 <= info.header_offset < directory:  # otherwise `seek` would fail or go beyond the files
            raise ArchiveRefused(f"The zip lists {shown} but does not contain it. Pack it again.")
        file.seek(info.header_offset)
        raw = file.read(_LOCAL.size)
        if len(raw) < _LOCAL.size or raw[:4] != b"PK\x03\x04":
            raise ArchiveRefused(f"The zip lists {shown} but does not contain it. Pack it again.")
        _, _, flags, method, _, _, crc, compressed, plain, name_length, extra_length = _LOCAL.unpack(raw)
        name = file.read(name_length)
        compressed, plain = _local_sizes(compressed, plain, file.read(extra_length))
        start = info.header_offset + _LOCAL.size + name_length + extra_length
        unequal = flags ^ info.flag_bits
        agrees = (
            method == info.compress_type
            and not unequal & (_ENCRYPTED | _SIZES_FOLLOW | _PATCH | _STRONG | _MASKED)
            and name == _raw_name(info)
            and (name.isascii() or not unequal & _UTF8)
            and (flags & _SIZES_FOLLOW or (crc, compressed, plain) == (info.CRC, info.compress_size, info.file_size))
            and compressed in (info.compress_size, 0, _IN_ZIP64)
            and plain in (info.file_size, 0, _IN_ZIP64)
        )
        if not agrees:
            raise ArchiveRefused(f"The zip has two different headers for {shown}. Pack it again.")
        if info.header_offset < end or start + info.compress_size > directory:
            raise ArchiveRefused(f"Two files of the zip overlap, or one is cut off: {shown}. Pack it again.")
        end = start + info.compress_size


def _local_sizes(compressed: int, plain: int, extra: bytes) -> tuple[int, int]:
    """Return the compressed and the plain size from a local header.

    A size that does not fit into the header's own field is read from the zip64 field in `extra`.
    """
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            field = extra[4 : 4 + length]
            long = struct.iter_unpack("<Q", field[: len(field) // 8 * 8])
            (plain,) = next(long, (plain,)) if plain == _IN_ZIP64 else (plain,)
            (compressed,) = next(long, (compressed,)) if compressed == _IN_ZIP64 else (compressed,)
        extra = extra[4 + length :]
    return compressed, plain


def _names(infos: Sequence[zipfile.ZipInfo], code_page: str | None) -> list[str]:
    """Return the full names of a zip's members.

    A member's Unicode Path field has its name, if there is such a field. macOS writes names in UTF-8 without setting
    the flag for it, and programs for Windows write them in the code page of their machine. The module zipfile would
    decode both as code page 437, so that the class `café` became `caf├⌐`. It would also cut a name at a NUL.
    """
    known = [_said_name(info) for info in infos]
    unknown = {_raw_name(info) for info, name in zip(infos, known, strict=True) if name is None}
    found = find_code_page(unknown, code_page, "file names")
    return [_raw_name(info).decode(found) if name is None else name for info, name in zip(infos, known, strict=True)]


def _said_name(info: zipfile.ZipInfo) -> str | None:
    """Return the name of a member that says how it is encoded, else None."""
    if info.flag_bits & _UTF8:
        return info.orig_filename
    raw, extra = _raw_name(info), info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        field = extra[4 : 4 + length]
        if kind == _UNICODE_PATH and length > 5 and field[:5] == struct.pack("<BI", 1, zlib.crc32(raw)):
            try:
                return field[5:].decode()
            except UnicodeDecodeError:
                return None
        extra = extra[4 + length :]
    return None


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437", "surrogateescape")


# --- tar -----------------------------------------------------------------------------------------------------------


# RecursionError, because tarfile recurses for every header that only describes the next header.
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError)
_ANNOUNCING = frozenset(
    (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
)
_ANNOUNCED_BYTES = 64 * 1024  # limit for the names and attributes of one member, which tarfile reads into memory
_OCTAL_BYTES = 8**11  # the largest size that a plain header can hold: 8 GiB


class TarArchive:
    """A tar archive, plain or gzipped. It is read as a stream: once to check all names, and once for each `read`."""

    def __init__(self, path: Path, limits: ArchiveLimits, code_page: str | None) -> None:
        self._path = path
        self._limits = limits
        self._budget = _budget(path.stat().st_size, limits)
        index = _EntryCollector(path.stat().st_size, limits)
        members = [_TarMember.of(number, info) for number, (_, info) in enumerate(self._files(index))]
        found = find_code_page({member.name for member in members}, code_page, "file names")
        self._paths: dict[int, str] = {}
        for member in members:
            entry = index.add(member.name.decode(found), member.size_bytes, member.check)
            if entry is not None:
                self._paths[member.number] = entry
        index.check_any()
        self.entries, self.refused, self.ignored = tuple(index.entries), tuple(index.refused), index.ignored

    def _files(self, index: _EntryCollector) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Yield the members that are no folders, after checking their number and sizes. Raises ArchiveRefused."""
        for files, (tar, info) in enumerate(self._members()):
            if info.isdir():
                index.add_folder(info.name)
                continue
            if info.issparse():
                raise _not_regular(info)
            if files > 2 * self._limits.entries:
                raise _too_many_files(self._limits)
            _check_size(info, _OCTAL_BYTES)  # tarfile does not check a size that comes from a pax header
            yield tar, info

    def read(self, paths: Collection[str]) -> Iterator[tuple[str, bytes | Refused]]:
        files = (found for found in self._members() if not found[1].isdir())
        for number, (tar, info) in enumerate(files):
            path = self._paths.get(number)
            if path is None or path not in paths:
                continue
            member = tar.extractfile(info)  # opens the member's bytes in place; nothing is written anywhere
            assert member is not None  # because it is a regular file
            try:
                data = member.read()
            except _TAR_ERRORS as error:
                raise _tar_damaged(error) from error
            yield path, data

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        """Open the archive again, and yield each member in order, together with the open tar file."""
        with self._path.open("rb") as file:
            is_gzip = sniff(file.read(262)) == "tar.gz"
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if is_gzip else contextlib.nullcontext(file) as raw:
                counted: Any = _LimitedStream(raw, self._budget, self._limits)
                try:
                    tar = tarfile.open(fileobj=counted, mode="r|", encoding="utf-8", tarinfo=_Header)  # noqa: SIM115
                    while (info := tar.next()) is not None:
                        yield tar, info
                        tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
                    _check_end(tar)
                except _TAR_ERRORS as error:
                    raise _tar_damaged(error) from error


@dataclass(frozen=True)
class _TarMember:
    """A member that is no folder: its place among them, its raw name, and whether it can be read."""

    number: int
    name: bytes
    size_bytes: int
    kind: bytes

    @classmethod
    def of(cls, number: int, info: tarfile.TarInfo) -> _TarMember:
        return cls(number, info.name.encode("utf-8", "surrogateescape"), info.size, info.type)

    def check(self) -> None:
        """Raises ArchiveRefused for a link or a device."""
        if self.kind == tarfile.SYMTYPE:
            raise _no_content("a symbolic link", "`tar -h`")
        if self.kind == tarfile.LNKTYPE:
            raise _no_content("a hard link", "`tar --hard-dereference`")
        if self.kind not in tarfile.REGULAR_TYPES:
            raise _no_content("a device")


class _Header(tarfile.TarInfo):
    """A tar header that is checked before tarfile uses it. An incomplete header is an error, not the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) < tarfile.BLOCKSIZE:
            raise ArchiveRefused("The tar is incomplete. Upload it again.")
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise _tar_damaged(error) from error
            raise  # a block of zeros is the end of the archive
        _check_size(info, _ANNOUNCED_BYTES if info.type in _ANNOUNCING else _OCTAL_BYTES)
        if info.type == tarfile.GNUTYPE_SPARSE:  # tarfile would read a sparse file's map of any length into memory
            raise _not_regular(info)
        return info


def _check_size(info: tarfile.TarInfo, most: int) -> None:
    if not 0 <= info.size <= most:
        raise ArchiveRefused(
            f"A tar header gives {info.name[:200]!r} a size of {info.size:,} bytes; 0 to {most:,} bytes are allowed."
        )


def _check_end(tar: tarfile.TarFile) -> None:
    """Read the stream to its end, so that gzip verifies its checksum.

    Raises ArchiveRefused if anything but zeros follows the last member.
    """
    stream: Any = tar.fileobj
    while rest := stream.read(tarfile.RECORDSIZE):
        if any(rest):
            raise ArchiveRefused("The file has more data after the end of the tar. Pack everything into one tar.")


class _LimitedStream:
    """A stream that raises ArchiveRefused once more bytes are read than its budget plus the size of tar headers."""

    def __init__(self, raw: Any, budget: int, limits: ArchiveLimits) -> None:
        self._raw = raw
        self._budget = budget
        # Every member has a header of 512 bytes and padding; long names take two more blocks.
        self._left = budget + limits.entries * 4 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._raw.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _too_inflated(self._budget)
        return data


def _tar_damaged(error: Exception) -> ArchiveRefused:
    return ArchiveRefused(f"The file cannot be read as a tar: {error}. Pack the images again.")


def _not_regular(info: tarfile.TarInfo) -> ArchiveRefused:
    return ArchiveRefused(f"Expected regular files and folders only. Received a sparse file: {info.name[:200]!r}.")
