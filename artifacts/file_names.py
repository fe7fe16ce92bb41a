"""Names of files in archives: their code page, Unicode form, and the litter of operating systems. Reads no file."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Collection, Iterable
from itertools import pairwise

from errors import ArchiveRefused

# Code pages that programs write names in without saying so: those of Windows, and those of DOS, which zip tools use. Of
# several with the same reading, the first is named.
CODE_PAGES = (
    *("cp949", "cp932", "gb18030", "big5"),
    *("cp1252", "cp1250", "cp1251", "cp850", "cp866", "cp437", "cp852", "cp1253", "cp1254", "cp1257", "cp1258"),
    *("cp857", "cp737", "cp775", "cp1255", "cp862", "cp1256", "cp874", "koi8_r"),
)
_FAMILIES = ("cp", "gb", "big5", "euc", "shift_jis", "iso8859", "koi8", "mac", "johab", "utf-8", "tis", "kz", "ptcp")
_EAST_ASIAN = frozenset({"cp949", "cp932", "gb18030", "big5"})
# Letters of Greek and Hebrew that stand only at the end of a word.
_FINAL_LETTERS = frozenset("\u03c2\u05da\u05dd\u05df\u05e3\u05e5")
# Signs that people write into the names of files, but not between two letters.
_SIGNS = frozenset("–—°€№©®")
_JUDGED_BYTES = 64 * 1024
_READINGS_SHOWN = 3
_GUESSES = 3

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
    plausible, is_clear = _readings(sorted(name for name in names if not name.isascii()))
    if chosen is None and is_clear:
        return next(iter(plausible))
    unread = "not in UTF-8" if chosen in (None, "utf-8") else f"neither in UTF-8 nor in {chosen}"
    readings = "; ".join(f"{page}: {', '.join(map(repr, some))}" for page, some in plausible.items())
    raise ArchiveRefused(
        f"The {what} are {unread}. Possible code pages are {readings or 'not known'}. Choose one of them, or another "
        f"one, with names=…, such as names={next(iter(plausible), 'cp949')}, or pack the archive with a program that "
        "writes UTF-8.",
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


def _readings(names: list[bytes]) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Return some names as each code page reads them that gives plausible names for all, the most probable page first.

    If no code page does, returns the most probable ones. The second value says whether only one code page does, and
    charset-normalizer finds it probable, too.
    """
    from charset_normalizer import from_bytes  # only in the process that opens archives

    parts = list({part: None for name in names for part in name.split(b"/") if not part.isascii()})
    text = b"\n".join(parts)
    if len(text) > _JUDGED_BYTES:
        text = text[:_JUDGED_BYTES].rpartition(b"\n")[0]
    guesses = {
        page for match in from_bytes(text, cp_isolation=list(CODE_PAGES)) for page in match.could_be_from_charset
    }
    found: dict[tuple[str, ...], str] = {}
    others: dict[tuple[str, ...], str] = {}
    for page in CODE_PAGES:
        try:
            read = tuple(_normal(part.decode(page)) for part in parts)
            is_plausible = all(_is_plausible(part, page) for part in text.decode(page).split("\n"))
        except UnicodeDecodeError:
            continue
        (found if is_plausible else others).setdefault(read, page)
    ranked = {page: read for read, page in (found or others).items()}
    order = sorted(ranked, key=lambda page: page not in guesses)
    shown = order if found else order[:_GUESSES]
    is_clear = len(found) == 1 and not guesses.isdisjoint(ranked)
    return {page: ranked[page][:_READINGS_SHOWN] for page in shown}, is_clear


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _is_plausible(name: str, page: str) -> bool:
    """Return whether somebody may have typed this name: the wrong code page leaves symbols and mixes scripts."""
    for char in name:
        if char.isascii() or char in _SIGNS:
            continue
        kind = unicodedata.category(char)
        if kind[0] == "C" or (kind[0] in "SPZN" and page not in _EAST_ASIAN) or "\uff61" <= char <= "\uff9f":
            return False
    for before, char in pairwise(name):
        if before.islower() and char.isupper() and not char.isascii():
            return False
    for before, char, after in zip(name, name[1:], name[2:], strict=False):
        if char in _SIGNS and before.isalpha() and after.isalpha():
            return False
    return all(_is_word(word) for word in _words(name))


def _words(name: str) -> list[str]:
    return "".join(char if char.isalpha() or _is_mark(char) else " " for char in name).split()


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


def _is_word(word: str) -> bool:
    if _is_mark(word[0]) or _FINAL_LETTERS & set(word[:-1]):
        return False
    scripts = [script for char in word if (script := _script(char)) != "COMBINING"]
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
