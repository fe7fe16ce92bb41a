"""Finds the labels or target, the group and the split of each image in an archive. Reads no image.

Three layouts are supported. Each may have one outer folder around everything.
- one folder for each class: `daisy/1.jpg`
- a folder for each split with a folder for each class: `train/daisy/1.jpg`, `test/daisy/2.jpg`
- a file `labels.csv` at the top, which lists all images
"""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from errors import LayoutUnknown, Refused
from recipes.recipe import Task

LABELS_FILE = "labels.csv"


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
}


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
    """The samples of an archive, the task that their labels or targets define, and the refused files."""

    task: Task
    samples: tuple[Sample, ...]
    refused: tuple[Refused, ...] = field(default=())


def labels_file(paths: Iterable[str]) -> str | None:
    """Return the path of labels.csv, at the top of an archive or in its outer folder; None if the archive has none."""
    paths = list(paths)
    if LABELS_FILE in paths:
        return LABELS_FILE
    outer = _outer_folder(paths)
    return outer + LABELS_FILE if outer + LABELS_FILE in paths else None


def from_folders(paths: Sequence[str]) -> Layout:
    """Return the layout of an archive that has one folder for each class. Raises LayoutUnknown if it has not."""
    outer = _outer_folder(paths)
    if outer.removesuffix("/").lower() in _SPLITS:  # a folder `test` around everything means that all are test images
        outer = ""
    inner = [path.removeprefix(outer).split("/") for path in paths]
    if not inner:
        raise LayoutUnknown(f"The archive is empty. {_EXPECTED}")
    splits = {parts[0].lower() for parts in inner if len(parts) > 1}
    has_splits = splits <= _SPLITS.keys() and any(len(parts) == 3 for parts in inner)
    if splits and splits <= _SPLITS.keys() and not has_splits:
        raise LayoutUnknown(
            f"{_EXPECTED} A folder of a split must contain class folders (train/daisy/1.jpg, test/daisy/2.jpg). "
            f"Received images directly in {' and '.join(sorted(splits))}, so their classes are unknown."
        )
    depth = 3 if has_splits else 2
    samples, refused = [], []
    for path, parts in zip(paths, inner, strict=True):
        if len(parts) < depth:
            refused.append(Refused(path, "not in a class folder"))
        elif len(parts) > depth:
            raise LayoutUnknown(f"{_EXPECTED} Received {path!r}, which is nested more deeply.")
        else:
            split = _SPLITS[parts[0].lower()] if has_splits else Split.TRAIN
            samples.append(Sample(path, labels=(parts[-2],), split=split))
    if not samples:
        raise LayoutUnknown(
            f"{_EXPECTED} Received {len(paths)} files that are not in a class folder, such as {paths[0]!r}."
        )
    names = {sample.labels[0] for sample in samples}
    check_class_names(names)
    return Layout(Task.BINARY if len(names) == 2 else Task.MULTICLASS, tuple(samples), tuple(refused))


def from_labels(data: bytes, csv_path: str, paths: Sequence[str]) -> Layout:
    """Return the layout of an archive that has a labels.csv.

    Args:
        data: the content of labels.csv.
        csv_path: the path of labels.csv in the archive.
        paths: the paths of all files in the archive.

    Raises:
        LayoutUnknown: labels.csv is not valid. The message has the number of the wrong line.
    """
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise LayoutUnknown(f"labels.csv cannot be read as comma-separated UTF-8: {error}.") from error
    columns = _columns(rows[0][1] if rows else [])
    folder = csv_path.removesuffix(LABELS_FILE)
    present = set(paths) - {csv_path}
    samples: dict[str, Sample] = {}
    refused = []
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise LayoutUnknown(f"Line {line} of labels.csv: expected {len(columns)} values. Received {len(row)}.")
        sample = _sample(line, dict(zip(columns, (value.strip() for value in row), strict=True)))
        path = next((path for path in (sample.path, folder + sample.path) if path in present), None)
        if path is None:
            refused.append(Refused(sample.path, "listed in labels.csv but not in the archive"))
        elif path in samples:
            raise LayoutUnknown(f"Line {line} of labels.csv: the file {sample.path!r} is listed a second time.")
        else:
            samples[path] = Sample(path, sample.labels, sample.target, sample.group, sample.split)
    unnamed = present - samples.keys()
    refused += [Refused(path, "not listed in labels.csv") for path in paths if path in unnamed]
    if not samples:
        raise LayoutUnknown("labels.csv lists no file of the archive. Write paths relative to the top of the archive.")
    _check_groups(samples.values())
    names = {label for sample in samples.values() for label in sample.labels}
    check_class_names(names)
    return Layout(_task(columns, samples.values(), names), tuple(samples.values()), tuple(refused))


_EXPECTED = "Expected one folder per class (daisy/1.jpg, rose/2.jpg), or a labels.csv at the top."
_TEXT_BYTES = 1024
# Smallest and largest magnitude of a target other than 0. Float32 can represent these and their squares.
_LEAST, _GREATEST = 1e-15, 1e15
_KNOWN_COLUMNS = ("path", "label", "target", "group", "split")


def _columns(header: list[str]) -> list[str]:
    columns = [name.strip().lower() for name in header]
    is_known = set(columns) <= set(_KNOWN_COLUMNS) and len(set(columns)) == len(columns)
    if not is_known or "path" not in columns or ("label" in columns) == ("target" in columns):
        raise LayoutUnknown(
            "Line 1 of labels.csv: expected path,label[,group][,split] or path,target[,group][,split]. "
            f"Received {','.join(header)!r}."
        )
    return columns


def _sample(line: int, values: dict[str, str]) -> Sample:
    for column in ("path", "label", "group"):
        _check_text(line, column, values.get(column, ""))
    path = "/".join(part for part in values["path"].replace("\\", "/").split("/") if part not in ("", "."))
    split = _SPLITS.get(values.get("split", "").lower())
    if split is None:
        raise LayoutUnknown(
            f"Line {line} of labels.csv: expected split train, validation or test. Received {values['split']!r}."
        )
    labels: tuple[str, ...] = ()
    target = None
    if "target" in values:
        target = _number(line, values["target"])
    else:
        labels = tuple(sorted({label.strip() for label in values["label"].split("|")} - {""}))
        if not labels and "|" not in values["label"]:
            raise LayoutUnknown(
                f"Line {line} of labels.csv: expected a label, or | for an image without labels. Received nothing."
            )
    return Sample(path, labels, target, values.get("group") or None, split)


def _check_text(line: int, column: str, text: str) -> None:
    is_readable = not any(unicodedata.category(char) in ("Cc", "Cs") for char in text)
    if len(text.encode()) > _TEXT_BYTES or not is_readable:
        raise LayoutUnknown(
            f"Line {line} of labels.csv: expected a {column} of at most {_TEXT_BYTES} bytes without control "
            f"characters. Received {text[:100]!a}."
        )


def _number(line: int, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number == 0 or _LEAST <= abs(number) <= _GREATEST):
        raise LayoutUnknown(
            f"Line {line} of labels.csv: expected a target that is 0 or a number with an absolute value from "
            f"{_LEAST:g} to {_GREATEST:g}. Received {text!r}."
        )
    return number


def _task(columns: list[str], samples: Iterable[Sample], names: set[str]) -> Task:
    if "target" in columns:
        return Task.REGRESSION
    if any(len(sample.labels) != 1 for sample in samples):
        return Task.MULTILABEL
    return Task.BINARY if len(names) == 2 else Task.MULTICLASS


def _check_groups(samples: Iterable[Sample]) -> None:
    splits: dict[str, Split] = {}
    for sample in samples:
        if sample.group and splits.setdefault(sample.group, sample.split) != sample.split:
            raise LayoutUnknown(
                f"The group {sample.group!r} of labels.csv is in two splits. Give all images of a group the same split."
            )


def check_class_names(names: Iterable[str]) -> None:
    """Check that no class name contains `|`, and that no two names differ only by case or Unicode form.

    Raises LayoutUnknown.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        if "|" in name:
            raise LayoutUnknown(f"The class name {name!r} contains |, which separates labels. Rename the class.")
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            raise LayoutUnknown(
                f"Two classes differ only by case or Unicode form: {seen[folded]!r} and {name!r}. Rename one."
            )
        seen[folded] = name


def _outer_folder(paths: Iterable[str]) -> str:
    """Return the name of the outer folder around everything, with a slash at the end.

    Returns an empty text if there is no such folder, or if it is a class folder.
    """
    split = [path.split("/") for path in paths]
    firsts = {parts[0] for parts in split}
    if len(firsts) != 1 or min(map(len, split)) < 2:
        return ""
    has_inner_folders = any(len(parts) > 2 for parts in split)
    has_labels = any(parts[1:] == [LABELS_FILE] for parts in split)
    return firsts.pop() + "/" if has_inner_folders or has_labels else ""
