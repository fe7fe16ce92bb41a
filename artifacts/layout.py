"""Finds the labels or target, the group and the split of each image in an archive. Reads no image.

Three layouts are supported. Each may have outer folders around everything.
- one folder for each class: `daisy/1.jpg`
- a folder for each split with a folder for each class: `train/daisy/1.jpg`, `test/daisy/2.jpg`
- a file `labels.csv` at the top, which lists all images. A metadata.csv or metadata.jsonl, as Hugging Face's image
  folders have it, is read in the same way.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from artifacts.label_table import LabelTable, read_table
from errors import LayoutUnknown, Refused
from recipes.recipe import Task

LABELS_FILE = "labels.csv"
_LABELS_FILES = (LABELS_FILE, "labels.tsv", "metadata.csv", "metadata.jsonl")


class Split(StrEnum):
    """What an image is used for. `test` images are never used for training: the final model is scored on them once."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


_SPLITS = {
    "": Split.TRAIN,
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VALIDATION,
    "valid": Split.VALIDATION,
    "validation": Split.VALIDATION,
    "test": Split.TEST,
    "testing": Split.TEST,
}
# What tools add to the names of splits: `seg_train`, `test_set`, `train2017`, `test1`.
_ADDED = re.compile(r"[^a-z]+|\b(seg|set|data|dataset|images|imgs)\b")
_UNLABELLED = frozenset({"pred", "prediction", "predictions", "unlabeled", "unlabelled"})

_PICTURE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "photos"})
_MASK_FOLDERS = frozenset(
    {"annotation", "annotations", "groundtruth", "gt", "label", "labels", "mask", "masks", "trimaps"}
    | {"segmentation", "segmentationclass", "segmentationobject"}
)

_SIDECARS = re.compile(
    r"aae|cfg|csv|dat|db|docx?|html?|ini|ipynb|jsonl?|lnk|log|mat|md|names|nfo|pdf|pbtxt|py|rst|rtf|sh|thm|toml|tsv|txt|url|"
    r"xlsx?|xml|xmp|ya?ml"
)
_SIDECAR_NAMES = frozenset({"readme", "license", "licence", "changelog", "notice", "authors", "citation", "makefile"})


def is_sidecar(path: str) -> bool:
    """Return whether a file is known by its name to be text about images, and not an image."""
    stem, dot, suffix = path.rpartition("/")[2].lower().rpartition(".")
    return _SIDECARS.fullmatch(suffix) is not None if dot and stem else suffix in _SIDECAR_NAMES


@dataclass(frozen=True)
class Sample:
    """One image of a data set with its labels or target, its group and its split. With a target, `labels` is empty."""

    path: str
    labels: tuple[str, ...] = ()
    target: float | None = None
    group: str | None = None
    split: Split = Split.TRAIN


@dataclass(frozen=True)
class Layout:
    """The samples of an archive and the task that their labels or targets define.

    Attributes:
        task: what can be learned from the samples.
        samples: the images.
        refused: files that were refused, with their reasons.
        ignored: number of files that are not images and were left out.
        warnings: what the owner of the images should know.
    """

    task: Task
    samples: tuple[Sample, ...]
    refused: tuple[Refused, ...] = field(default=())
    ignored: int = 0
    warnings: tuple[str, ...] = ()


def labels_file(paths: Iterable[str]) -> str | None:
    """Return the path of labels.csv, at the top of an archive or in its outer folder; None if the archive has none.

    The name may be in upper or lower case, or be one of the other names in `_LABELS_FILES`. Raises
    LayoutUnknown if there are two of them.
    """
    split = [path.split("/") for path in paths]
    pictures = [parts for parts in split if not is_sidecar(parts[-1])]
    tops = {parts[0] for parts in pictures if len(parts) > 1}
    for name in _LABELS_FILES:
        found = [parts for parts in split if len(parts) == 1 and parts[-1].lower() == name]
        if not found and len(tops) == 1 and not any(len(parts) == 1 for parts in pictures):
            found = [parts for parts in split if len(parts) == 2 and parts[0] in tops and parts[-1].lower() == name]
        if len(found) > 1:
            raise LayoutUnknown(f"Expected one {name}. Received {' and '.join(repr('/'.join(one)) for one in found)}.")
        if found:
            return "/".join(found[0])
    return None


def from_folders(paths: Sequence[str]) -> Layout:
    """Return the layout of an archive that has one folder for each class. Raises LayoutUnknown if it has not."""
    if not paths:
        raise LayoutUnknown(f"The archive is empty. {_EXPECTED}")
    pictures = [path for path in paths if not is_sidecar(path)]
    if not pictures:
        raise LayoutUnknown(f"The archive contains no images. {_EXPECTED} Received files such as {paths[0]!r}.")
    inner = dict(zip(pictures, _without_outer([path.split("/") for path in pictures]), strict=True))
    samples, refused, left_out, deep = [], [], [], []
    for path, (split, parts) in _with_splits(inner).items():
        if split is None:
            left_out.append(path)
        elif len(parts) < 2:
            refused.append(Refused(path, "not in a class folder"))
        elif len(parts) > 2:
            deep.append(path)
        else:
            samples.append(Sample(path, labels=(parts[0],), split=split))
    if len(deep) > _ODD_SHARE * len(pictures):
        raise LayoutUnknown(f"{_EXPECTED} Received {deep[0]!r}, which is nested more deeply.")
    refused += [Refused(path, "nested more deeply than the class folders") for path in deep]
    if not samples:
        raise LayoutUnknown(
            f"{_EXPECTED} Received {len(pictures)} files that are not in a class folder, such as {pictures[0]!r}."
        )
    check_class_names({sample.labels[0] for sample in samples})
    _check_kinds({sample.labels[0].lower() for sample in samples})
    samples = [replace(sample, labels=(sample.labels[0].strip(),)) for sample in samples]
    names = {sample.labels[0] for sample in samples}
    warnings = [f"The folder {name!r} begins with a dot; it was taken as a class." for name in names if name[0] == "."]
    if left_out:
        warnings.append(
            f"{len(left_out)} images such as {left_out[0]!r} are in a split without class folders. They were left out, "
            "since their classes are unknown."
        )
    task = Task.BINARY if len(names) == 2 else Task.MULTICLASS
    ignored = len(paths) - len(pictures) + len(left_out)
    return Layout(task, tuple(samples), tuple(refused), ignored, tuple(sorted(warnings)))


def _check_kinds(folders: set[str]) -> None:
    """Check that folders are not named for what is in their files, such as images and masks. Raises LayoutUnknown."""
    if folders <= _PICTURE_FOLDERS | _MASK_FOLDERS and folders & _PICTURE_FOLDERS and folders & _MASK_FOLDERS:
        raise LayoutUnknown(
            f"{_EXPECTED} Received the folders {' and '.join(map(repr, sorted(folders)))}, which are no classes. "
            "Espalier reads no masks: it learns what a whole image shows."
        )


def _without_outer(split: list[list[str]]) -> list[list[str]]:
    """Return paths without the folders around everything; the last folder that is left may be the only class.

    Of a few files beside the outer folder, such as a preview, only the names are kept: they are in no class folder.
    """
    while True:
        tops = Counter(parts[0] for parts in split if len(parts) > 1)
        outer, within = max(tops.items(), key=lambda top: top[1], default=("", 0))
        beside = len(split) - within
        if not tops or beside > _ODD_SHARE * len(split):
            return split
        depths = [len(parts) for parts in split if len(parts) > 1 and parts[0] == outer]
        if min(depths) < (2 if beside == 0 else 3) or max(depths) < 3:
            return split
        if any(_split_named(top) is not None for top in tops):  # only test images: they must not be trained on
            return split
        split = [parts[1:] if len(parts) > 1 and parts[0] == outer else parts[-1:] for parts in split]


def _with_splits(inner: dict[str, list[str]]) -> dict[str, tuple[Split | None, list[str]]]:
    """Return the split of each path and the path below it; no split where a split's images have no classes.

    Raises LayoutUnknown if there are splits and none has class folders.
    """
    plain: dict[str, tuple[Split | None, list[str]]] = {path: (Split.TRAIN, parts) for path, parts in inner.items()}
    folders = {parts[0] for parts in inner.values() if len(parts) > 1}
    splits = {name: _split_named(name) for name in folders}
    is_known = {name for name in folders if name.lower() in _SPLITS}
    if not folders or not any(splits.values()):
        return plain
    others = {name for name, split in splits.items() if split is None and not _is_unlabelled(name)}
    odd = sum(parts[0] in others for parts in inner.values())
    if others and (not is_known or any(len(parts) == 2 for parts in inner.values() if parts[0] in is_known)):
        return plain
    if odd > _ODD_SHARE * len(inner):
        return plain
    folders -= others
    below = {}
    for name in folders:
        paths = [path for path, parts in inner.items() if parts[0] == name and len(parts) > 1]
        cut = [inner[path][1:] for path in paths]
        # `seg_train/seg_train/<class>`, `train/images/<class>`
        while len({parts[0] for parts in cut}) == 1 and min(map(len, cut)) > 1 and _is_wrapper(cut[0][0], name):
            cut = [parts[1:] for parts in cut]
        below[name] = dict(zip(paths, cut, strict=True))
    flat = {name for name in folders if all(len(parts) == 1 for parts in below[name].values())}
    if flat == folders and not is_known:  # `test1` and `test2` may be classes
        return plain
    if flat == folders:
        raise LayoutUnknown(
            f"{_EXPECTED} A folder of a split must contain class folders (train/daisy/1.jpg, test/daisy/2.jpg). "
            f"Received images directly in {' and '.join(sorted(name.lower() for name in folders))}, so their classes "
            "are unknown."
        )
    found = {
        path: (split, parts[-1:]) for path, (split, parts) in plain.items() if len(parts) == 1 or parts[0] in others
    }
    for name in folders:
        has_classes = name not in flat and splits[name] is not None
        found |= {path: (splits[name] if has_classes else None, parts) for path, parts in below[name].items()}
    return {path: found[path] for path in inner}


def _split_named(folder: str) -> Split | None:
    words = _ADDED.sub(" ", _ADDED.sub(" ", folder.lower())).split()
    word = words[0] if len(words) == 1 else ""
    for end in ("", "set"):
        if word and word.removesuffix(end) in _SPLITS:
            return _SPLITS[word.removesuffix(end)]
    return None


def _is_wrapper(folder: str, around: str) -> bool:
    """Return whether a folder inside a split only repeats it, or says that it holds images."""
    return folder.lower() in (around.lower(), "images", "image", "imgs", "img", "data")


def _is_unlabelled(folder: str) -> bool:
    return bool(_UNLABELLED & set(_ADDED.sub(" ", _ADDED.sub(" ", folder.lower())).split()))


def from_labels(data: bytes, csv_path: str, paths: Sequence[str], code_page: str | None = None) -> Layout:
    """Return the layout of an archive that has a labels.csv.

    Args:
        data: the content of labels.csv.
        csv_path: the path of labels.csv in the archive.
        paths: the paths of all files in the archive.
        code_page: the encoding of labels.csv if it is not in UTF-8; None if it must be found out.

    Raises:
        LayoutUnknown: labels.csv is not valid. The message has the number of the wrong line.
        ArchiveRefused: the encoding of labels.csv is not clear.
    """
    name = csv_path.rpartition("/")[2]
    table = read_table(data, name, code_page)
    folder = csv_path.removesuffix(name)
    present = set(paths) - {csv_path}
    samples: dict[str, Sample] = {}
    refused = []
    for line, row in table.rows:
        sample = _sample(line, name, dict(zip(table.columns, row, strict=True)))
        path = next((path for path in (sample.path, folder + sample.path) if path in present), None)
        if path is None:
            refused.append(Refused(sample.path, f"listed in {name} but not in the archive"))
        elif path in samples:
            raise LayoutUnknown(f"Line {line} of {name}: the file {sample.path!r} is listed a second time.")
        else:
            samples[path] = replace(sample, path=path)
    unnamed = [path for path in paths if path in present and path not in samples]
    pictures = [path for path in unnamed if not is_sidecar(path)]
    if not samples:
        raise LayoutUnknown(_no_file_listed(name, table, refused, pictures))
    refused += [Refused(path, f"not listed in {name}") for path in pictures]
    _check_groups(name, samples.values())
    names = {label for sample in samples.values() for label in sample.labels}
    check_class_names(names)
    ignored = len(unnamed) - len(pictures)
    task = _task(table.columns, samples.values(), names)
    notes = (*table.notes, *_doubts(name, names, len(samples)))
    return Layout(task, tuple(samples.values()), tuple(refused), ignored, notes)


def _doubts(name: str, names: set[str], samples: int) -> list[str]:
    """Return a warning if the labels of a table are measured numbers."""
    numbers = [label for label in names if re.fullmatch(r"[+-]?\d+[.,]\d+", label)]
    if len(numbers) < len(names) or len(names) < samples / 2:
        return []
    return [
        f"The labels of {name} are numbers such as {min(numbers)!r}, and each became a class. To predict a number, "
        "name the column target."
    ]


def _no_file_listed(name: str, table: LabelTable, listed: Sequence[Refused], pictures: Sequence[str]) -> str:
    sides = (f" It lists {listed[0].path!r}" if listed else " It lists nothing") + (
        f"; the archive has {pictures[0]!r}." if pictures else "; the archive has no other files."
    )
    return f"{name} lists no file of the archive.{sides} Write paths relative to the top of the archive."


def name_format(path: str, data: bytes) -> str | None:
    """Return a sentence about a file beside images, if it is a table or has annotations of a known format."""
    lower = path.rpartition("/")[2].lower()
    if lower.endswith((".csv", ".tsv", ".xlsx", ".xls", ".jsonl")) or lower in ("labels.txt", "labels.json"):
        return (
            f"{path!r} may be a table of labels. Only a labels.csv at the top of the archive is read, with the columns "
            "path and label."
        )
    said = _annotations(lower, data)
    return f"{path!r} {said}. Espalier does not read it." if said else None


def _annotations(name: str, data: bytes) -> str | None:
    where = "which say where objects are"
    if name.endswith(".xml") and b"<annotations>" in data[:500]:
        return f"has annotations of CVAT, {where}"
    if name.endswith(".xml") and b"<annotation" in data[:500]:
        return f"has annotations of Pascal VOC, {where}"
    if name in ("data.yaml", "data.yml", "classes.txt", "obj.names"):
        return f"belongs to annotations of YOLO, {where}"
    if not name.endswith(".json"):
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and {"images", "annotations"} <= found.keys():
        return f"has annotations of COCO, {where}"
    first = found[0] if isinstance(found, list) and found else None
    if isinstance(first, dict) and ("annotations" in first or "completions" in first) and "data" in first:
        return "is an export of Label Studio"
    if isinstance(first, dict) and {"choice", "image"} <= first.keys():
        return "is an export of Label Studio (JSON-MIN)"
    if isinstance(found, dict) and {"shapes", "imagePath"} <= found.keys():
        return f"has annotations of Labelme, {where}"
    return None


_EXPECTED = "Expected one folder per class (daisy/1.jpg, rose/2.jpg), or a labels.csv at the top."
_TEXT_BYTES = 1024
# Letters and marks without ink: fillers of Hangul, joiners, variation selectors.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
_ODD_SHARE = 0.2  # if more files do not fit a layout, the folders mean something else
# Smallest and largest magnitude of a target other than 0. Float32 can represent these and their squares.
_LEAST, _GREATEST = 1e-15, 1e15


def _sample(line: int, name: str, values: dict[str, str]) -> Sample:
    for column in ("path", "label", "group"):
        _check_text(line, name, column, values.get(column, ""))
    path = "/".join(part for part in values["path"].replace("\\", "/").split("/") if part not in ("", "."))
    split = _SPLITS.get(values.get("split", "").lower())
    if split is None:
        raise LayoutUnknown(
            f"Line {line} of {name}: expected split train, validation or test. Received {values['split']!r}."
        )
    labels: tuple[str, ...] = ()
    target = None
    if "target" in values:
        target = _number(line, name, values["target"])
    else:
        labels = tuple(sorted({label.strip() for label in values["label"].split("|")} - {""}))
        if not labels and "|" not in values["label"]:
            raise LayoutUnknown(
                f"Line {line} of {name}: expected a label, or | for an image without labels. Received nothing."
            )
    return Sample(path, labels, target, values.get("group") or None, split)


def _check_text(line: int, name: str, column: str, text: str) -> None:
    is_readable = not any(unicodedata.category(char) in ("Cc", "Cs") for char in text)
    if len(text.encode()) > _TEXT_BYTES or not is_readable:
        raise LayoutUnknown(
            f"Line {line} of {name}: expected a {column} of at most {_TEXT_BYTES} bytes without control "
            f"characters. Received {text[:100]!r}."
        )


def _number(line: int, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number == 0 or _LEAST <= abs(number) <= _GREATEST):
        raise LayoutUnknown(
            f"Line {line} of {name}: expected a target that is 0 or a number with an absolute value from "
            f"{_LEAST:g} to {_GREATEST:g}. Received {text!r}."
        )
    return number


def _task(columns: Sequence[str], samples: Iterable[Sample], names: set[str]) -> Task:
    if "target" in columns:
        return Task.REGRESSION
    if any(len(sample.labels) != 1 for sample in samples):
        return Task.MULTILABEL
    return Task.BINARY if len(names) == 2 else Task.MULTICLASS


def _check_groups(name: str, samples: Iterable[Sample]) -> None:
    splits: dict[str, Split] = {}
    for sample in samples:
        if sample.group and splits.setdefault(sample.group, sample.split) != sample.split:
            raise LayoutUnknown(
                f"The group {sample.group!r} of {name} is in two splits. Give all images of a group the same split."
            )


def check_class_names(names: Iterable[str]) -> None:
    """Check that no class name contains `|`, and that no two names look the same. Raises LayoutUnknown."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        if "|" in name:
            raise LayoutUnknown(f"The class name {name!r} contains |, which separates labels. Rename the class.")
        look = _look(name)
        if look in seen:
            raise LayoutUnknown(
                "Two classes look the same: they differ only by case or Unicode form, spaces or invisible characters: "
                f"{seen[look]!r} and {name!r}. Rename one."
            )
        if not look:
            raise LayoutUnknown(f"Expected class names that can be seen. Received {name!r}. Rename it.")
        seen[look] = name


def _look(name: str) -> str:
    """Return what is left of a name without case, Unicode form, spaces at its ends, and characters that nobody sees."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    seen = "".join(
        " " if char.isspace() else char
        for char in folded
        if char not in _INVISIBLE and (char.isspace() or unicodedata.category(char) not in ("Cf", "Cc"))
    )
    return unicodedata.normalize("NFKC", " ".join(seen.split()))
