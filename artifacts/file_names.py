"""Names of files in archives: their code page, Unicode form, and the litter of operating systems. Reads no file."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Collection, Iterable
from itertools import pairwise

from errors import ArchiveRefused

# Code pages that programs write names in without saying so. The first of several with the same reading is named.
CODE_PAGES = ("cp949", "cp932", "gb18030", "big5", "cp1252", "cp1250", "cp1251", "cp850", "cp866", "cp437", "cp1253")
_FAMILIES = ("cp", "gb", "big5", "euc", "shift_jis", "iso8859", "koi8", "mac", "johab", "utf-8", "tis", "kz", "ptcp")
_EAST_ASIAN = frozenset({"cp949", "cp932", "gb18030", "big5"})
_DETECTED_BYTES = 64 * 1024
_READINGS_SHOWN = 3

_LITTER_FILES = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini", "zbthumbnail.info", "syncthing.tmp"}
)
_LITTER_FOLDERS = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "@recycle",
        "@__thumb",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "lost+found",
        "system volume information",
        ".appledouble",
        ".cache",
        ".comments",
        ".documentrevisions-v100",
        ".dropbox.cache",
        ".dvc",
        ".fseventsd",
        ".git",
        ".hg",
        ".huggingface",
        ".idea",
        ".ipynb_checkpoints",
        ".picasaoriginals",
        ".snapshot",
        ".snapshots",
        ".spotlight-v100",
        ".stfolder",
        ".stversions",
        ".svn",
        ".sync",
        ".temporaryitems",
        ".thumbnails",
        ".thumbs",
        ".trash",
        ".trashes",
        ".venv",
        ".vscode",
        ".xvpics",
    }
)
_LITTER_BEGINNINGS = ("._", ".trash-", ".fuse_hidden", ".nfs")


def is_litter(path: str) -> bool:
    """Return whether a path is a hidden file, or one that a system, camera or disk station creates by itself.

    An unknown folder that begins with a dot is none: `.NET` may be a class.
    """
    *folders, name = [part for part in path.replace("\\", "/").lower().split("/") if part not in ("", ".")] or [""]
    if name in _LITTER_FILES or name in _LITTER_FOLDERS or (name.startswith(".") and name != ".."):
        return True
    return any(folder in _LITTER_FOLDERS or folder.startswith(_LITTER_BEGINNINGS) for folder in folders)


def find_code_page(names: Collection[bytes], chosen: str | None, what: str) -> str:
    """Return the encoding of names: UTF-8 if all are in it, else the `chosen` one, or the only plausible one.

    Raises ArchiveRefused if several code pages give plausible names, with each reading, or if none does. `what` is what
    they are, for the message.
    """
    if _can_decode(names, "utf-8"):
        return "utf-8"
    if chosen is not None and _can_decode(names, chosen):
        return chosen
    plausible = _readings(sorted(name for name in names if not name.isascii()))
    if chosen is None and len(plausible) == 1:
        return next(iter(plausible))
    unread = "not in UTF-8" if chosen is None else f"neither in UTF-8 nor in {chosen}"
    found = "Plausible code pages are" if plausible else "No known code page gives plausible ones"
    readings = "; ".join(f"{page}: {', '.join(map(repr, some))}" for page, some in plausible.items())
    raise ArchiveRefused(
        f"The {what} are {unread}. {found}{' ' if readings else ''}{readings}. Choose one with names=…, such as "
        f"names={next(iter(plausible), 'cp949')}, or pack the archive with a program that writes UTF-8.",
        retry="names",
        readings={page: list(some) for page, some in plausible.items()},
    )


def _can_decode(names: Iterable[bytes], code_page: str) -> bool:
    try:
        for name in names:
            name.decode(code_page)
    except UnicodeDecodeError:
        return False
    return True


def code_page_named(name: str) -> str | None:
    """Return Python's name of a code page for text, or None if there is none."""
    try:
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        return None
    return found if found.startswith(_FAMILIES) else None


def _readings(names: list[bytes]) -> dict[str, tuple[str, ...]]:
    """Return some names as each code page reads them that gives plausible names for all."""
    from charset_normalizer import from_bytes  # only in the process that opens archives

    parts = {part: None for name in names for part in name.split(b"/") if not part.isascii()}
    text = b"\n".join(parts)
    if len(text) > _DETECTED_BYTES:
        text = text[:_DETECTED_BYTES].rpartition(b"\n")[0]
    probable = {_normal(str(match)) for match in from_bytes(text, cp_isolation=list(CODE_PAGES))}
    found: dict[tuple[str, ...], str] = {}
    for page in CODE_PAGES:
        try:
            read = [name.decode(page) for name in names]
            is_probable = page in _EAST_ASIAN or _normal(text.decode(page)) in probable
        except UnicodeDecodeError:
            continue
        if is_probable and all(_is_plausible(name, page) for name in read):
            found.setdefault(tuple(read), page)
    return {page: _examples(read) for read, page in found.items()}


def _examples(read: Iterable[str]) -> tuple[str, ...]:
    parts = {part: None for name in read for part in name.split("/") if not part.isascii()}
    return tuple(parts)[:_READINGS_SHOWN]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _is_plausible(name: str, page: str) -> bool:
    """Return whether somebody may have typed this name: the wrong code page leaves symbols and mixes scripts."""
    for char in name:
        if char.isascii():
            continue
        kind = unicodedata.category(char)
        if kind[0] == "C" or (kind[0] in "SPZN" and page not in _EAST_ASIAN) or "\uff61" <= char <= "\uff9f":
            return False
    for before, char in pairwise(name):
        if before.islower() and char.isupper() and not char.isascii():
            return False
    return all(_is_one_script(word) for word in _words(name))


def _words(name: str) -> list[str]:
    return "".join(char if char.isalpha() or unicodedata.combining(char) else " " for char in name).split()


def _is_one_script(word: str) -> bool:
    scripts = [_script(char) for char in word if char.isalpha()]
    kinds = set(scripts)
    if kinds <= {"LATIN"} or kinds <= {"CJK", "HIRAGANA", "KATAKANA"} or len(kinds) == 1:
        return True
    if kinds <= {"LATIN", "HANGUL"} or kinds <= {"LATIN", "CJK", "HIRAGANA", "KATAKANA"}:
        # `T恤` and `卡拉OK` are words; `ch麩e` is `chêne` in the wrong code page.
        return all(char.isascii() for char in word if _script(char) == "LATIN") and not (
            scripts[0] == scripts[-1] == "LATIN"
        )
    return False


def _script(char: str) -> str:
    return unicodedata.name(char, "?").replace("-", " ").split()[0]
