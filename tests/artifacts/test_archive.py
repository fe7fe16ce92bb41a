"""Archives, most of them malicious. Those that no library can write are built byte by byte."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample import tarred, zipped

from artifacts.archive import MIB, Archive, ArchiveLimits, Entry, check_path, open_archive, sniff
from artifacts.file_names import is_litter
from errors import ArchiveRefused, Refused

LIMITS = ArchiveLimits()
FILES = {"daisy/1.png": b"one", "daisy/2.png": b"two" * 100, "rose/3.png": bytes(range(256))}

Opener = Callable[..., Archive]


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """Opens bytes as an archive."""

    def open_bytes(data: bytes, limits: ArchiveLimits = LIMITS) -> Archive:
        path = tmp_path / "archive"
        path.write_bytes(data)
        return open_archive(path, limits)

    return open_bytes


def contents(archive: Archive) -> dict[str, bytes | Refused]:
    """Return the content of all files in the archive, from one `read`."""
    return dict(archive.read({entry.path for entry in archive.entries}))


def refusals(archive: Archive) -> dict[str, str]:
    """Return why files were refused, by path."""
    return {file.path: file.reason for file in archive.refused}


@contextmanager
def at_most(memory_bytes: int) -> Iterator[None]:
    """Check that the block allocates no more memory than this."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < memory_bytes


# --- zips by hand ----------------------------------------------------------------------------------------------------

STORED, DEFLATED = 0, 8
UTF8 = 0x800


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@dataclass
class Member:
    """A file of a zip. `local` and `central` replace fields in one of its two headers."""

    name: bytes
    data: bytes = b"data"
    method: int = STORED
    payload: bytes | None = None
    says: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> bytes:
        if self.payload is not None:
            return self.payload
        return deflated(self.data) if self.method == DEFLATED else self.data

    def header(self, where: str) -> dict[str, Any]:
        plain = {
            "name": self.name,
            "flags": 0,
            "method": self.method,
            "crc": zlib.crc32(self.data),
            "compressed": len(self.stored),
            "plain": len(self.data),
            "extra": b"",
            "attributes": 0,
        }
        return {**plain, **self.says, **(self.local if where == "local" else self.central)}

    def local_record(self) -> bytes:
        says = self.header("local")
        record: bytes = (
            struct.pack("<4s5H3I2H", b"PK\3\4", 20, says["flags"], says["method"], 0, 0x21, says["crc"],
                        says["compressed"], says["plain"], len(says["name"]), len(says["extra"]))
            + says["name"] + says["extra"] + self.stored
        )  # fmt: skip
        return record

    def central_record(self, offset: int) -> bytes:
        says = {"offset": offset, **self.header("central")}
        record: bytes = (
            struct.pack("<4s6H3I5H2I", b"PK\1\2", 0x314, 20, says["flags"], says["method"], 0, 0x21, says["crc"],
                        says["compressed"], says["plain"], len(says["name"]), len(says["extra"]), 0, 0, 0,
                        says["attributes"], says["offset"])
            + says["name"] + says["extra"]
        )  # fmt: skip
        return record


def assembled(body: bytes, records: Sequence[bytes], comment: bytes = b"", shift: int = 0) -> bytes:
    """Return a zip with this body. Its end record claims that the directory begins `shift` bytes later than it does."""
    directory = b"".join(records)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), len(body) + shift,
                      len(comment))  # fmt: skip
    return body + directory + end + comment


def zip_of(*members: Member, comment: bytes = b"", shift: int = 0) -> bytes:
    """Return a zip of these members, one after the other."""
    body, records = b"", []
    for member in members:
        records.append(member.central_record(len(body)))
        body += member.local_record()
    return assembled(body, records, comment, shift)


def zip64(*sizes: int) -> bytes:
    """Return the zip64 extra field, for sizes that do not fit into 32 bits."""
    return struct.pack(f"<2H{len(sizes)}Q", 1, 8 * len(sizes), *sizes)


# --- tars by hand ----------------------------------------------------------------------------------------------------

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def base256(number: int) -> bytes:
    """Return a number as GNU tar writes numbers that octal digits cannot express, such as negative ones."""
    return (number + (1 << 96 if number < 0 else 1 << 95)).to_bytes(12, "big")


def header(name: bytes, size: bytes, kind: bytes = tarfile.REGTYPE, tail: bytes = b"") -> bytes:
    """Return a tar header with a correct checksum. `tail` are its bytes from the prefix field (345) on."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[136:148] = octal(0)
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(tail)] = tail
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar_member(name: bytes, data: bytes = b"data", kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, octal(len(data)), kind) + padded(data)


def pax(records: Mapping[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a header that describes the next member, or with kind g all following members."""
    data = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text)
        while length != len(str(length)) + len(text):
            length = len(str(length)) + len(text)
        data += str(length).encode() + text
    return tar_member(b"pax", data, kind)


def tar_named(*names: str) -> bytes:
    """Return a tar of members with exactly these names."""
    return b"".join(pax({"path": name}) + tar_member(b"x", name.encode()) for name in names) + END


def zip_named(*names: str) -> bytes:
    """Return a zip of members with exactly these names."""
    return zip_of(*(Member(name.encode(), name.encode(), says={"flags": UTF8}) for name in names))


both_kinds = pytest.mark.parametrize("named", [zip_named, tar_named])
Named = Callable[..., bytes]


# --- sound archives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        zipped(FILES),
        zipped(FILES, zipfile.ZIP_STORED),
        tarred(FILES),
        tarred(FILES, "w"),
        zip_of(*(Member(name.encode(), data, DEFLATED) for name, data in FILES.items())),
        zip_of(*(Member(name.encode(), data) for name, data in FILES.items()), comment=b"packed by hand"),
        b"".join(tar_member(name.encode(), data) for name, data in FILES.items()) + END,
        gzip.compress(b"".join(tar_member(name.encode(), data) for name, data in FILES.items()) + END[:BLOCK]),
    ],
    ids=["zip", "stored", "tar.gz", "tar", "deflated by hand", "zip with a comment", "tar by hand", "one end block"],
)
def test_an_archive_gives_its_files_back(opened: Opener, data: bytes) -> None:
    archive = opened(data)
    assert archive.entries == tuple(Entry(path, len(data)) for path, data in FILES.items())
    assert archive.ignored == 0
    assert contents(archive) == FILES


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_only_what_is_wanted_is_read_in_the_order_of_the_archive(
    opened: Opener, pack: Callable[[Mapping[str, bytes]], bytes]
) -> None:
    archive = opened(pack(FILES))
    wanted = {"rose/3.png", "daisy/1.png", "not/there.png"}
    assert [path for path, _ in archive.read(wanted)] == ["daisy/1.png", "rose/3.png"]
    assert list(archive.read(set())) == []
    assert contents(archive) == FILES, "an archive can be read again"


PARTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\:."), min_size=1, max_size=20
).filter(lambda part: unicodedata.is_normalized("NFC", part) and not is_litter(part) and not is_litter(f"{part}/x"))
PATHS = st.lists(PARTS, min_size=1, max_size=8).map("/".join)
TREES = st.dictionaries(PATHS, st.binary(max_size=600), max_size=6)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(files=TREES)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_whatever_is_packed_comes_out_again(
    opened: Opener, pack: Callable[[Mapping[str, bytes]], bytes], files: dict[str, bytes]
) -> None:
    archive = opened(pack(files), ArchiveLimits(member_ratio=1000))
    assert contents(archive) == files


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_dialect_of_tar_is_read(opened: Opener, format: int) -> None:
    path = "/".join(["a" * 30] * 5) + "/é.png"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        folder = tarfile.TarInfo("a" * 30)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("./" + path)
        info.size = 600
        tar.addfile(info, io.BytesIO(b"x" * 600))
    assert contents(opened(buffer.getvalue())) == {path: b"x" * 600}


def test_a_tar_as_git_writes_it_is_read(opened: Opener) -> None:
    data = pax({"comment": "0" * 40}, tarfile.XGLTYPE) + header(b"flowers/", octal(0), tarfile.DIRTYPE)
    assert contents(opened(data + tar_member(b"flowers/1.png") + END)) == {"flowers/1.png": b"data"}


def test_a_tar_that_was_cut_off_after_it_was_opened_is_refused(opened: Opener, tmp_path: Path) -> None:
    archive = opened(tar_member(b"a/1.png", bytes(100 * BLOCK)) + END)
    (tmp_path / "archive").write_bytes(tar_member(b"a/1.png", bytes(100 * BLOCK))[: 50 * BLOCK])
    with pytest.raises(ArchiveRefused, match="cannot be read"):
        contents(archive)


def test_a_zip_written_without_seeking_keeps_its_sizes_behind_its_files(opened: Opener) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    for large in (False, True):
        pipe = Pipe()
        with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in FILES.items():
                with archive.open(path, "w", force_zip64=large) as member:
                    member.write(data)
        assert contents(opened(pipe.getvalue())) == FILES


def test_a_zip64_is_read(opened: Opener) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in FILES.items():
            with archive.open(path, "w", force_zip64=True) as member:
                member.write(data)
    assert contents(opened(buffer.getvalue())) == FILES
    large = {"compressed": 0xFFFFFFFF, "plain": 0xFFFFFFFF, "extra": zip64(4, 4)}
    assert contents(opened(zip_of(Member(b"a/1.png", says=large)))) == {"a/1.png": b"data"}


def test_old_zips_name_their_files_in_code_page_437(opened: Opener) -> None:
    assert contents(opened(zip_of(Member(b"caf\x82/1.png")))) == {"café/1.png": b"data"}


def test_a_zip_of_macos_names_its_files_in_utf8_without_saying_so(opened: Opener) -> None:
    archive = opened(zip_of(Member("café/1.png".encode())))
    assert [entry.path for entry in archive.entries] == ["café/1.png"]


@pytest.mark.parametrize(
    "data",
    [
        zip_of(),
        zip_of(Member(b"daisy/", b""), Member(b"rose\\", b"")),
        header(b"daisy/", octal(0), tarfile.DIRTYPE) + END,
        header(b"./", octal(0), tarfile.DIRTYPE) + END,
        gzip.compress(END, mtime=0),
    ],
)
def test_an_archive_of_folders_alone_has_no_files(opened: Opener, data: bytes) -> None:
    archive = opened(data)
    assert archive.entries == ()
    assert archive.ignored == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"no archive at all\n" * 100,
        b"\x89PNG\r\n\x1a\n" + bytes(300),
        b"7z\xbc\xaf\x27\x1c" + bytes(300),
        b"Rar!\x1a\x07\x01\x00" + bytes(300),
        b"\xfd7zXZ\x00" + bytes(300),
        b"BZh9" + bytes(300),
        b"MZ" + bytes(510) + zipped(FILES),
    ],
)
def test_what_is_no_archive_is_refused_by_its_first_bytes(opened: Opener, data: bytes) -> None:
    assert sniff(data[:262]) is None
    with pytest.raises(ArchiveRefused, match=r"Expected a zip, tar or tar\.gz archive"):
        opened(data)


def test_an_archive_is_known_by_its_first_262_bytes() -> None:
    assert sniff(zipped(FILES)[:262]) == "zip"
    assert sniff(zipped({})[:262]) == "zip"
    assert sniff(tarred(FILES)[:262]) == "tar.gz"
    assert sniff(tarred(FILES, "w")[:262]) == "tar"


# --- names -----------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "a\\..\\b.png", "..", "a/..", "a/b/.."])
def test_a_climbing_name_is_refused(opened: Opener, tmp_path: Path, named: Named, name: str) -> None:
    with pytest.raises(ArchiveRefused, match="with '\\.\\.'"):
        opened(named("a/1.png", name))
    assert [file.name for file in tmp_path.iterdir()] == ["archive"]


@both_kinds
@pytest.mark.parametrize(
    "name",
    [
        "/etc/a.png",
        "//server/a.png",
        "\\a.png",
        "\\\\server\\a.png",
        "C:/a.png",
        "c:a.png",
        "z:\\a.png",
        "./C:/a.png",
        ".\\c:a.png",
    ],
)
def test_an_absolute_name_is_refused(opened: Opener, named: Named, name: str) -> None:
    with pytest.raises(ArchiveRefused, match="absolute path"):
        opened(named("a/1.png", name))


@both_kinds
@pytest.mark.parametrize("name", ["a/1.png\0.txt", "a\0/"])
def test_a_name_with_a_nul_refuses_the_archive(opened: Opener, named: Named, name: str) -> None:
    with pytest.raises(ArchiveRefused, match="control characters") as refusal:
        opened(named("a/1.png", name))
    assert refusal.value.detail.isprintable()


@both_kinds
@pytest.mark.parametrize("name", ["a/\n.png", "a/\x1b[31m.png", "a/\x7f.png", "a/\x85.png"])
def test_a_name_with_control_characters_is_refused_and_the_rest_goes_on(
    opened: Opener, named: Named, name: str
) -> None:
    archive = opened(named("a/1.png", name))
    ((path, reason),) = refusals(archive).items()
    assert "control characters" in reason and path.isprintable() and reason.isprintable()
    assert list(contents(archive)) == ["a/1.png"]


@both_kinds
def test_backslashes_of_windows_are_read_as_slashes(opened: Opener, named: Named) -> None:
    archive = opened(named("daisy\\1.png", "daisy\\old\\2.png"))
    assert [entry.path for entry in archive.entries] == ["daisy/1.png", "daisy/old/2.png"]
    assert contents(archive) == {"daisy/1.png": b"daisy\\1.png", "daisy/old/2.png": b"daisy\\old\\2.png"}


@both_kinds
@pytest.mark.parametrize("name", [".", "./."])
def test_a_file_without_a_name_is_refused(opened: Opener, named: Named, name: str) -> None:
    with pytest.raises(ArchiveRefused, match="The file has no name"):
        opened(named(name))


def test_a_zip_member_with_an_empty_name_is_refused(opened: Opener) -> None:
    with pytest.raises(ArchiveRefused, match="The file has no name"):
        opened(zip_of(Member(b"")))


@both_kinds
@pytest.mark.parametrize("twin", ["a/1.png", "a//1.png", "./a/1.png", "a\\1.png", "a/./1.png"])
def test_of_two_files_of_one_name_the_second_is_refused(opened: Opener, named: Named, twin: str) -> None:
    archive = opened(named("a/1.png", "a/2.png", twin))
    assert refusals(archive) == {"a/1.png": "The archive contains another file of this name. Rename one of them."}
    assert list(archive.read({"a/1.png"})) == [("a/1.png", b"a/1.png")]


@both_kinds
@pytest.mark.parametrize(
    ("fits", "breaks", "says"),
    [
        ("a/" * 7 + "1", "a/" * 8 + "1", "has 9 parts; the limit is 8"),
        ("é" * 127 + "1", "é" * 128, "255 bytes for a name"),
        (("a" * 204 + "/") * 4 + "b" * 204, ("a" * 204 + "/") * 4 + "b" * 205, "1024 bytes for a path"),
    ],
)
def test_deep_and_long_names_are_refused(opened: Opener, named: Named, fits: str, breaks: str, says: str) -> None:
    assert len(opened(named(fits)).entries) == 1
    with pytest.raises(ArchiveRefused, match=says):
        opened(named(breaks))


@pytest.mark.parametrize("pack", [lambda name: zip_of(Member(name)), lambda name: tar_member(name) + END])
@pytest.mark.parametrize(
    ("code_page", "name"),
    [("cp949", "고양이"), ("cp932", "表"), ("gb18030", "玫瑰"), ("cp1252", "chêne"), ("cp1251", "кошка")],
)
def test_a_name_that_several_code_pages_explain_is_never_guessed(
    opened: Opener, tmp_path: Path, pack: Callable[[bytes], bytes], code_page: str, name: str
) -> None:
    data = pack(f"{name}/1.png".encode(code_page))
    with pytest.raises(ArchiveRefused, match="names=") as refusal:
        opened(data)
    assert refusal.value.extra["retry"] == "names" and refusal.value.extra["readings"][code_page] == [name]
    assert name in refusal.value.detail
    chosen = open_archive(tmp_path / "archive", LIMITS, code_page)
    assert contents(chosen) == {f"{name}/1.png": b"data"}
    with pytest.raises(ArchiveRefused, match="neither in UTF-8 nor in ascii"):
        open_archive(tmp_path / "archive", LIMITS, "ascii")
    with pytest.raises(ArchiveRefused, match=r"not in UTF-8\. "):
        open_archive(tmp_path / "archive", LIMITS, "utf-8")


# Names in the code pages of Windows and of its zip tools, and whether no other code page gives plausible ones.
LEGACY = [
    ("cp1252", ["Bäume", "Füße"], True),
    ("cp850", ["Löwe", "Käfer"], True),
    ("cp850", ["chêne", "fougère", "hêtre"], True),
    ("cp852", ["kočka", "kůň"], True),
    ("cp866", ["кошка"], True),
    ("cp737", ["γάτα", "σκύλος"], True),
    ("cp1256", ["قطة", "كلب"], True),
    ("cp850", ["pão", "maçã"], False),  # `ma嚻` in gb18030
    ("cp852", ["dům", "pes"], False),  # `dàm` in cp850
    ("cp1257", ["gėlė", "medis"], False),  # `gëlë` in cp1252
    ("cp862", ["חתול", "כלב"], False),  # `ЗЪЕМ` in cp866
    ("cp1254", ["kapı", "çatı"], False),
    ("cp1250", ["kočka", "kůň"], False),
    ("cp1253", ["γάτα", "σκύλος"], False),
    ("cp874", ["แมว", "หมา"], False),
    ("cp1252", ["Mädchen – 1"], False),  # `Mõdchen û 1` in cp850
]


@pytest.mark.parametrize(("code_page", "names", "is_clear"), LEGACY)
def test_names_in_code_pages_are_read_rightly_or_refused_with_that_reading(
    opened: Opener, code_page: str, names: list[str], is_clear: bool
) -> None:
    data = zip_of(*(Member(f"{name}/1.png".encode(code_page)) for name in names))
    if is_clear:
        assert [entry.path for entry in opened(data).entries] == [f"{name}/1.png" for name in names]
        return
    with pytest.raises(ArchiveRefused) as refusal:
        opened(data)
    unread = sorted(name for name in names if not name.isascii())
    assert sorted(refusal.value.extra["readings"][code_page]) == unread


def test_the_unicode_path_field_names_a_file_of_a_zip(opened: Opener) -> None:
    raw, name = "고양이/1.png".encode("cp949"), "고양이/1.png".encode()

    def field(crc: int) -> bytes:
        return struct.pack("<HHBL", 0x7075, 5 + len(name), 1, crc) + name

    assert list(contents(opened(zip_of(Member(raw, says={"extra": field(zlib.crc32(raw))}))))) == ["고양이/1.png"]
    with pytest.raises(ArchiveRefused, match="code page"):  # it was renamed by a program that ignores the field
        opened(zip_of(Member(raw, says={"extra": field(0)})))


@both_kinds
def test_names_of_macos_are_composed(opened: Opener, named: Named) -> None:
    archive = opened(named(unicodedata.normalize("NFD", "사진/é.png")))
    assert [entry.path for entry in archive.entries] == ["사진/é.png"]


def test_a_zip_name_that_says_utf8_and_is_not_is_refused(opened: Opener) -> None:
    with pytest.raises(ArchiveRefused, match="cannot be read"):
        opened(zip_of(Member(b"a/\xff.png", says={"flags": UTF8})))


@given(st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "C:", "é", "\\", "\0", " "])).map("/".join))
@example("a\\..\\b")
@example("./C:/a")
def test_a_checked_path_stays_below_its_folder(name: str) -> None:
    try:
        path = check_path(name, LIMITS)
    except ArchiveRefused:
        return
    parts = path.split("/") if path else []
    assert not {"", ".", ".."} & set(parts)
    assert "\\" not in path and "\0" not in path
    assert Path("/top", path).is_relative_to("/top")
    assert len(parts) <= LIMITS.depth and len(path.encode()) <= LIMITS.path_bytes
    assert check_path(path, LIMITS) == path


LITTER = ["__MACOSX/a/._1.png", "a/._1.png", ".DS_Store", "a/.DS_Store", "a/Thumbs.db", "THUMBS.DB", ".git/1.png"]


@both_kinds
def test_litter_is_ignored_and_counted(opened: Opener, named: Named) -> None:
    archive = opened(named("a/1.png", *LITTER, "a/2.png"))
    assert [entry.path for entry in archive.entries] == ["a/1.png", "a/2.png"]
    assert archive.ignored == len(LITTER)
    assert [path for path, _ in archive.read({"a/1.png", *LITTER})] == ["a/1.png"]


def test_litter_is_told_by_its_name() -> None:
    others = ["cat/Icon\r", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/1.jpg", "lost+found/x.png"]
    assert all(
        is_litter(path) for path in [*LITTER, *others, "desktop.ini", "a/Desktop.ini", ".Trash-1000/files/1.jpg"]
    )
    pictures = ["a/1.png", "thumbs.db/1.png", "macosx/1.png", "a/x.DS_Store", ".NET/1.png"]
    assert not any(is_litter(path) for path in pictures)


# --- limits ----------------------------------------------------------------------------------------------------------


@both_kinds
def test_more_files_than_allowed_are_refused_litter_included(opened: Opener, named: Named) -> None:
    limits = ArchiveLimits(entries=3)
    assert len(opened(named("a/1.png", "a/2.png", ".DS_Store"), limits).entries) == 2
    with pytest.raises(ArchiveRefused, match="more files than the limit of 3"):
        opened(named("a/1.png", "a/2.png", ".DS_Store", "a/3.png"), limits)


@pytest.mark.parametrize(
    "pack",
    [
        lambda names: zip_of(*(Member(name, b"") for name in names)),
        lambda names: b"".join(header(name, octal(0), tarfile.DIRTYPE) for name in names) + END,
    ],
    ids=["zip", "tar"],
)
def test_more_folders_than_allowed_are_refused(opened: Opener, pack: Callable[[list[bytes]], bytes]) -> None:
    limits = ArchiveLimits(entries=3)
    assert opened(pack([b"a/", b"b/", b"c/"]), limits).entries == ()
    with pytest.raises(ArchiveRefused, match="more folders than the limit of 3"):
        opened(pack([b"a/", b"b/", b"c/", b"d/"]), limits)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_large_member_is_refused_before_it_is_read(
    opened: Opener, pack: Callable[[Mapping[str, bytes]], bytes]
) -> None:
    limits = ArchiveLimits(member_bytes=1000)
    assert len(opened(pack({"a/1.png": bytes(range(250)) * 4}), limits).entries) == 1
    with pytest.raises(ArchiveRefused, match="the limit for a file is"):
        opened(pack({"a/1.png": bytes(range(250)) * 4 + b"x"}), limits)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_unpacks_to_more_than_allowed_is_refused(
    opened: Opener, pack: Callable[[Mapping[str, bytes]], bytes]
) -> None:
    total = sum(map(len, FILES.values()))
    assert len(opened(pack(FILES), ArchiveLimits(inflated_bytes=total)).entries) == 3
    with pytest.raises(ArchiveRefused, match="unpacks to more than the limit"):
        opened(pack(FILES), ArchiveLimits(inflated_bytes=total - 1))


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_the_ratio_counts_from_some_size_on(opened: Opener, pack: Callable[[Mapping[str, bytes]], bytes]) -> None:
    data = pack({"a/1.png": b"ab" * 5000})
    assert len(opened(data, ArchiveLimits(member_ratio=10_000)).entries) == 1
    assert len(opened(data, ArchiveLimits(member_ratio=10_000, inflated_ratio_from_bytes=10_000)).entries) == 1
    with pytest.raises(ArchiveRefused, match="unpacks to more than the limit"):
        opened(data, ArchiveLimits(member_ratio=10_000, inflated_ratio_from_bytes=9_999, inflated_ratio=10))


def test_a_member_that_unpacks_to_far_more_than_it_stores_is_refused(opened: Opener) -> None:
    zeros = bytes(MIB)
    assert len(zeros) > 900 * len(deflated(zeros))
    limits = ArchiveLimits(member_ratio_from_bytes=100)
    archive = opened(zip_of(Member(b"a/1.png", zeros, DEFLATED), Member(b"a/2.png")), limits)
    assert "the limit is 100 times the stored size" in refusals(archive)["a/1.png"]
    assert list(contents(archive)) == ["a/2.png"]
    with pytest.raises(ArchiveRefused, match="the limit is 100 times the stored size"):
        opened(zip_of(Member(b"a/1.png", b"", says={"plain": 101})), limits)
    assert len(opened(zip_of(Member(b"a/1.png", zeros, STORED)), limits).entries) == 1
    assert len(opened(zip_of(Member(b"a/1.png", zeros, DEFLATED))).entries) == 1, "a blank scan is no bomb"


def test_a_member_that_hides_its_size_is_not_inflated(opened: Opener) -> None:
    bomb = Member(b"a/1.png", bytes(50 * MIB), DEFLATED, payload=deflated(bytes(50 * MIB)), says={"plain": 1000})
    archive = opened(zip_of(bomb, Member(b"a/2.png")))
    bomb.data = b""
    with at_most(2 * MIB):
        found = contents(archive)
    assert isinstance(found["a/1.png"], Refused) and found["a/2.png"] == b"data"


@pytest.mark.parametrize(
    "tar",
    [
        tar_member(b"a/1.png", bytes(2 * MIB)) + END,
        END + bytes(3 * MIB),
        pax({"comment": "x" * 50_000}) * 40 + tar_member(b"a/1.png") + END,
    ],
    ids=["a large member", "padding without end", "headers without end"],
)
def test_a_gzip_bomb_is_refused_as_its_bytes_come(opened: Opener, tar: bytes) -> None:
    with pytest.raises(ArchiveRefused, match=r"unpacks to more than the limit of 1\.0 MiB"):
        opened(gzip.compress(tar), ArchiveLimits(inflated_bytes=MIB, entries=10))


# --- zips that lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "local",
    [
        {"name": b"b/1.png"},
        {"name": b"a/1.png.png"},
        {"name": b"../x"},
        {"method": DEFLATED},
        {"crc": 1},
        {"compressed": 3},
        {"compressed": 0},
        {"compressed": 0xFFFFFFFF},
        {"plain": 5},
        {"plain": 0},
        {"plain": 0xFFFFFFFF},
        {"plain": 0xFFFFFFFF, "compressed": 0xFFFFFFFF, "extra": zip64(5, 4)},
        {"plain": 0xFFFFFFFF, "compressed": 0xFFFFFFFF, "extra": zip64(4, 5)},
        {"plain": 0xFFFFFFFF, "compressed": 0xFFFFFFFF, "extra": zip64(4)},
        {"plain": 0xFFFFFFFF, "extra": zip64(4)[:-1]},
        {"flags": 0x1},
        {"flags": 0x8},
        {"flags": 0x20},
        {"flags": 0x40},
        {"flags": 0x2000},
    ],
)
def test_a_zip_whose_local_header_disagrees_with_its_directory_is_refused(
    opened: Opener, local: dict[str, Any]
) -> None:
    with pytest.raises(ArchiveRefused, match=r"two different headers for 'a/1\.png'"):
        opened(zip_of(Member(b"a/1.png", local=local)))


def test_a_name_that_reads_differently_in_the_two_headers_is_refused(opened: Opener) -> None:
    for name in ("é/1.png".encode(), b"\xff/1.png"):
        with pytest.raises(ArchiveRefused, match="two different headers"):
            opened(zip_of(Member(name, local={"flags": UTF8})))
    assert contents(opened(zip_of(Member(b"a/1.png", local={"flags": UTF8})))) == {"a/1.png": b"data"}


def test_sizes_that_follow_a_member_may_not_be_said_wrongly_before_it(opened: Opener) -> None:
    follow = {"flags": 0x8}
    assert len(opened(zip_of(Member(b"a/1.png", says=follow, local={"crc": 0, "compressed": 0, "plain": 0}))).entries)
    for wrong in ({"compressed": 3}, {"plain": 5}):
        with pytest.raises(ArchiveRefused, match="two different headers"):
            opened(zip_of(Member(b"a/1.png", says=follow, local=wrong)))


def test_two_members_in_the_same_bytes_are_refused(opened: Opener) -> None:
    inner = Member(b"a/2.png", b"inner")
    outer = Member(b"a/1.png", inner.local_record())
    offset = len(outer.local_record()) - len(outer.data)
    for records in (
        [outer.central_record(0), inner.central_record(offset)],
        [inner.central_record(offset), outer.central_record(0)],
    ):
        with pytest.raises(ArchiveRefused, match="overlap"):
            opened(assembled(outer.local_record(), records))
    assert contents(opened(assembled(outer.local_record(), [inner.central_record(offset)]))) == {"a/2.png": b"inner"}


def test_one_member_under_two_names_is_refused(opened: Opener) -> None:
    one, other = Member(b"a/1.png"), Member(b"a/2.png")
    with pytest.raises(ArchiveRefused):
        opened(assembled(one.local_record(), [one.central_record(0), other.central_record(0)]))


def test_a_member_that_reaches_into_the_directory_is_refused(opened: Opener) -> None:
    with pytest.raises(ArchiveRefused, match="overlap"):
        opened(zip_of(Member(b"a/1.png", says={"compressed": 5, "plain": 5})))


@pytest.mark.parametrize(
    "central",
    [
        {"offset": 1},
        {"offset": 1000},
        {"offset": 0xFFFFFFFE},
        {"offset": 0xFFFFFFFF, "extra": zip64(2**63)},
        {"offset": 0xFFFFFFFF, "extra": zip64(2**64 - 1)},
    ],
)
def test_a_directory_that_points_at_nothing_is_refused(opened: Opener, central: dict[str, Any]) -> None:
    with pytest.raises(ArchiveRefused, match="but does not contain it"):
        opened(zip_of(Member(b"a/1.png", central=central)))


@pytest.mark.parametrize("shift", [1, 5, -5, 10**6, 2**31])
def test_a_zip_that_is_wrong_about_the_place_of_its_directory_is_refused(opened: Opener, shift: int) -> None:
    members = [Member(b"a/1.png"), Member(b"a/2.png")]
    with pytest.raises(ArchiveRefused):
        opened(zip_of(*members, shift=shift))


@pytest.mark.parametrize("extra", [zip64()[:3], struct.pack("<2H", 1, 60000), zip64(1)[:-1]])
def test_a_broken_extra_field_is_refused_or_passed_over(opened: Opener, extra: bytes) -> None:
    member = Member(b"a/1.png", central={"extra": extra, "plain": 0xFFFFFFFF})
    with pytest.raises(ArchiveRefused):
        opened(zip_of(member))
    assert contents(opened(zip_of(Member(b"a/1.png", local={"extra": extra})))) == {"a/1.png": b"data"}


@pytest.mark.parametrize("flags", [0x1, 0x9, 0x41, 0x2001, 0x20])
def test_an_encrypted_member_is_refused(opened: Opener, flags: int) -> None:
    encrypted = Member(b"a/2.png", says={"flags": flags})
    archive = opened(zip_of(Member(b"a/1.png"), encrypted))
    assert "is encrypted" in refusals(archive)["a/2.png"] and list(contents(archive)) == ["a/1.png"]
    with pytest.raises(ArchiveRefused, match=r"No file of the archive can be read.*is encrypted"):
        opened(zip_of(encrypted))


@pytest.mark.parametrize("method", [1, 6, 9, 12, 14, 93, 95, 97, 98, 99, 65535])
def test_a_compression_that_is_not_known_is_refused(opened: Opener, method: int) -> None:
    with pytest.raises(ArchiveRefused, match=f"'a/1.png': .*Received compression method {method}"):
        opened(zip_of(Member(b"a/1.png", says={"method": method})))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_with_a_link_or_device_is_refused(opened: Opener, kind: int) -> None:
    link = Member(b"a/1.png", b"/etc/passwd", central={"attributes": (kind | 0o777) << 16})
    archive = opened(zip_of(link, Member(b"a/2.png")))
    assert "Expected a file with content" in refusals(archive)["a/1.png"] and list(contents(archive)) == ["a/2.png"]


@pytest.mark.parametrize("attributes", [0, 0x20, 0o644 << 16, (stat.S_IFREG | 0o644) << 16])
def test_a_regular_file_of_any_system_is_read(opened: Opener, attributes: int) -> None:
    assert contents(opened(zip_of(Member(b"a/1.png", central={"attributes": attributes})))) == {"a/1.png": b"data"}


@pytest.mark.parametrize(
    "bad",
    [
        Member(b"a/1.png", says={"crc": 1}),
        Member(b"a/1.png", b"data" * 9, DEFLATED, says={"crc": 1}),
        Member(b"a/1.png", b"data" * 9, DEFLATED, payload=b"\xff" * 20),
        Member(b"a/1.png", b"data" * 9, DEFLATED, payload=deflated(b"data" * 9)[:-3]),
        Member(b"a/1.png", b"data" * 9, DEFLATED, payload=b""),
        Member(b"a/1.png", b"data" * 9, DEFLATED, says={"plain": 40}),
        Member(b"a/1.png", b"data" * 9, DEFLATED, says={"plain": 20}),
        Member(b"a/1.png", says={"plain": 10}),
        Member(b"a/1.png", says={"plain": 2}),
    ],
)
def test_a_damaged_member_is_refused_and_the_rest_goes_on(opened: Opener, bad: Member) -> None:
    found = contents(opened(zip_of(bad, Member(b"a/2.png", b"sound")), ArchiveLimits(member_ratio=10**6)))
    assert list(found) == ["a/1.png", "a/2.png"]
    refusal = found["a/1.png"]
    assert isinstance(refusal, Refused) and refusal.path == "a/1.png"
    assert refusal.reason.startswith("damaged in the archive: ")
    assert found["a/2.png"] == b"sound"


def test_every_cut_of_a_zip_is_refused(opened: Opener) -> None:
    data = zipped(FILES)
    for length in range(len(data)):
        with pytest.raises(ArchiveRefused):
            opened(data[:length])


# --- tars that lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"D", b"M", b"N", b"V", b"Z", b"\xff"])
def test_what_is_no_file_or_folder_of_a_tar_is_refused_and_the_rest_goes_on(opened: Opener, kind: bytes) -> None:
    archive = opened(tar_member(b"a/1.png") + header(b"a/2.png", octal(0), kind) + tar_member(b"a/3.png") + END)
    assert "content" in refusals(archive)["a/2.png"]
    assert contents(archive) == {"a/1.png": b"data", "a/3.png": b"data"}


def test_a_sparse_file_refuses_the_tar(opened: Opener) -> None:
    with pytest.raises(ArchiveRefused, match=r"sparse file: 'a/2\.png'"):
        opened(tar_member(b"a/1.png") + header(b"a/2.png", octal(0), b"S") + END)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE])
def test_each_kind_of_regular_file_is_read(opened: Opener, kind: bytes) -> None:
    assert contents(opened(tar_member(b"a/1.png", kind=kind) + END)) == {"a/1.png": b"data"}


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.map": "0,4"},
        {"GNU.sparse.size": "4", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "4"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4"},
    ],
)
def test_a_sparse_file_is_refused_in_each_dialect(opened: Opener, records: dict[str, str]) -> None:
    with pytest.raises(ArchiveRefused, match="sparse file"):
        opened(pax(records) + tar_member(b"a/1.png", b"1\n0\n4\n".ljust(BLOCK, b"\0") + b"data") + END)


def test_a_sparse_map_without_end_is_not_followed(opened: Opener) -> None:
    more = bytes(386 - 345 + 4 * 24) + b"\1" + octal(4)  # another block of the map follows, and says the same
    block = (octal(1) * 42 + b"\1").ljust(BLOCK, b"\0")
    data = gzip.compress(header(b"a/1.png", octal(0), tarfile.GNUTYPE_SPARSE, more) + block * 20_000)
    with pytest.raises(ArchiveRefused, match=r"sparse file: 'a/1\.png'"), at_most(MIB):
        opened(data)


def test_a_link_is_refused_whatever_it_points_at(opened: Opener) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info = tarfile.TarInfo("a/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        with pytest.raises(ArchiveRefused, match="link"):
            opened(info.tobuf() + END)


@pytest.mark.parametrize(
    "pack",
    [
        lambda: tar_member(b"a/1.png") + header(b"a/1.png/", octal(0), tarfile.DIRTYPE) + END,
        lambda: header(b"a/1.png/", octal(0), tarfile.DIRTYPE) + tar_member(b"a/1.png") + END,
        lambda: zip_of(Member(b"a/1.png"), Member(b"a/1.png/", b"")),
    ],
)
def test_a_folder_may_have_the_name_of_a_file(opened: Opener, pack: Callable[[], bytes]) -> None:
    assert contents(opened(pack())) == {"a/1.png": b"data"}


def test_a_huge_pax_header_is_refused_before_it_is_read(opened: Opener) -> None:
    assert contents(opened(pax({"comment": "x" * 60_000}) + tar_member(b"a/1.png") + END)) == {"a/1.png": b"data"}
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K"):
        data = gzip.compress(header(b"a", octal(40 * MIB), kind) + bytes(40 * MIB) + tar_member(b"a/1.png") + END)
        with pytest.raises(ArchiveRefused, match="0 to 65,536 bytes are allowed"), at_most(MIB):
            opened(data)


@pytest.mark.parametrize("link", [pax({"path": "a/2.png"}), tar_member(b"././@LongLink", b"a/2.png\0", b"L")])
def test_a_chain_of_announcing_headers_is_refused(opened: Opener, link: bytes) -> None:
    with pytest.raises(ArchiveRefused, match="cannot be read"):
        opened(link * 2000 + tar_member(b"a/1.png") + END)


@pytest.mark.parametrize(
    "data",
    [
        header(b"a/1.png", base256(-1)),
        header(b"a/1.png", base256(-(2**80))),
        header(b"a/1.png", base256(2**80)),
        header(b"a/1.png", octal(8**11 - 1)),
        header(b"a/", base256(2**80), tarfile.DIRTYPE),
        pax({"size": "-1"}) + header(b"a/1.png", octal(0)),
        pax({"size": "9" * 1000}) + header(b"a/1.png", octal(0)),
        pax({"size": "3"}, tarfile.XGLTYPE) + header(b"a/1.png", base256(2**80)),
        pax({"size": "-3"}, tarfile.XGLTYPE) + header(b"a/1.png", octal(0)),
        header(b"a/1.png", b"not a number"),
    ],
)
def test_a_tar_member_of_an_impossible_size_is_refused(opened: Opener, data: bytes) -> None:
    with pytest.raises(ArchiveRefused):
        opened(data + tar_member(b"a/2.png") + END)


@pytest.mark.parametrize("data", [b"0 path=a\n", b"9" * 5000 + b" path=a\n", b"24 GNU.sparse.map=xxxxx\n"])
def test_a_pax_header_of_nonsense_is_refused(opened: Opener, data: bytes) -> None:
    with pytest.raises(ArchiveRefused, match="cannot be read"):
        opened(tar_member(b"pax", data, tarfile.XHDTYPE) + tar_member(b"a/1.png") + END)


ZEROS = {"a/1.png": b"data", "a/2.png": bytes(3 * BLOCK), "a/3.png": bytes(BLOCK)}


def test_a_tar_that_is_cut_off_is_refused_wherever_the_cut_is(opened: Opener) -> None:
    body = b"".join(tar_member(name.encode(), data) for name, data in ZEROS.items())
    for length in range(BLOCK, len(body) + 1, 64):
        with pytest.raises(ArchiveRefused):
            opened(body[:length])
    assert contents(opened(body + END[:BLOCK])) == ZEROS


def test_a_tar_that_is_cut_off_inside_a_member_is_refused_when_it_is_opened(opened: Opener) -> None:
    data = tar_member(b"a/1.png", bytes(range(256)) * 100)
    for length in (BLOCK + 100, 10 * BLOCK, len(data) - 1):
        with pytest.raises(ArchiveRefused, match=r"cannot be read|incomplete"):
            opened(data[:length])


def test_a_tar_with_a_damaged_header_is_refused_not_shortened(opened: Opener) -> None:
    body = bytearray(b"".join(tar_member(name.encode()) for name in FILES) + END)
    body[2 * BLOCK] ^= 1
    with pytest.raises(ArchiveRefused, match="cannot be read as a tar: bad checksum"):
        opened(bytes(body))


@pytest.mark.parametrize("behind", [b"x", tar_member(b"a/9.png") + END])
def test_a_tar_that_goes_on_after_its_end_is_refused(opened: Opener, behind: bytes) -> None:
    body = tar_member(b"a/1.png") + END
    assert contents(opened(body + bytes(30 * BLOCK))) == {"a/1.png": b"data"}
    for gap in (b"", bytes(40 * BLOCK)):
        for data in (
            body + gap + behind,
            gzip.compress(body + gap + behind),
            gzip.compress(body) + gzip.compress(gap + behind),
        ):
            with pytest.raises(ArchiveRefused, match="more data after the end"):
                opened(data)


def test_every_cut_of_a_gzip_is_refused(opened: Opener) -> None:
    data = tarred(FILES)
    for length in range(2, len(data)):
        with pytest.raises(ArchiveRefused):
            opened(data[:length])


@pytest.mark.parametrize("at", [-1, -8])
def test_a_gzip_with_a_wrong_checksum_or_length_is_refused(opened: Opener, at: int) -> None:
    data = bytearray(tarred(FILES))
    data[at] ^= 1
    with pytest.raises(ArchiveRefused, match="cannot be read"):
        opened(bytes(data))


@pytest.mark.parametrize("inside", [b"", b"text", zipped(FILES), tarred(FILES), b"\x89PNG" * 300])
def test_a_gzip_of_anything_but_a_tar_is_refused(opened: Opener, inside: bytes) -> None:
    with pytest.raises(ArchiveRefused):
        opened(gzip.compress(inside))


# --- anything --------------------------------------------------------------------------------------------------------

SMALL = {"a/1.png": b"one" * 9, "b/2.png": b"two"}
WHOLE = {
    "zip": zipped(SMALL),
    "zip by hand": zip_of(Member(b"a/1.png"), Member(b"b/2.png", b"two", DEFLATED, says={"extra": b"xx\2\0ab"})),
    "tar": tarred(SMALL, "w")[: 6 * BLOCK],
    "tar.gz": tarred(SMALL),
    "tar with announcements": pax({"path": "a/1.png", "size": "4"}) + tar_member(b"x") + END,
    "sparse tar": pax({"GNU.sparse.map": "0,4"}) + tar_member(b"x") + END,
}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE.keys())
def test_a_damaged_archive_is_refused_or_read_but_breaks_nothing(
    opened: Opener, whole: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(whole)
    for position, value in changes:
        data[position % len(data)] = value
    try:
        archive = opened(bytes(data))
        found = contents(archive)
    except ArchiveRefused:
        return
    assert set(found) == {entry.path for entry in archive.entries}
    for entry in archive.entries:
        file = found[entry.path]
        assert isinstance(file, Refused) or len(file) == entry.size_bytes
        assert check_path(entry.path, LIMITS) == entry.path
