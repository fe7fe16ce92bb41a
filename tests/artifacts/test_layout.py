"""The supported layouts of archives, with class folders or a labels.csv, and invalid ones."""

from __future__ import annotations

import csv
import io
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample import zipped

from artifacts.archive import ArchiveLimits, open_archive
from artifacts.layout import (
    Layout,
    Sample,
    Split,
    check_class_names,
    from_folders,
    from_labels,
    labels_file,
    name_format,
)
from errors import ArchiveRefused, LayoutUnknown, Refused
from recipes.recipe import Task


def labels_of(layout: Layout) -> dict[str, tuple[str, ...]]:
    return {sample.path: sample.labels for sample in layout.samples}


def splits_of(layout: Layout) -> dict[str, Split]:
    return {sample.path: sample.split for sample in layout.samples}


# --- folders ---------------------------------------------------------------------------------------------------------


def test_each_folder_is_a_class() -> None:
    layout = from_folders(["daisy/1.jpg", "rose/2.jpg", "daisy/3.jpg", "tulip/4.jpg"])
    assert layout == Layout(
        Task.MULTICLASS,
        (
            Sample("daisy/1.jpg", ("daisy",)),
            Sample("rose/2.jpg", ("rose",)),
            Sample("daisy/3.jpg", ("daisy",)),
            Sample("tulip/4.jpg", ("tulip",)),
        ),
    )


def test_two_classes_make_a_binary_task() -> None:
    assert from_folders(["daisy/1.jpg", "rose/2.jpg"]).task is Task.BINARY


def test_one_folder_around_everything_is_no_class() -> None:
    layout = from_folders(["flowers/daisy/1.jpg", "flowers/rose/2.jpg"])
    assert labels_of(layout) == {"flowers/daisy/1.jpg": ("daisy",), "flowers/rose/2.jpg": ("rose",)}


def test_one_folder_with_nothing_around_it_is_the_only_class() -> None:
    layout = from_folders(["daisy/1.jpg", "daisy/2.jpg"])
    assert {sample.labels for sample in layout.samples} == {("daisy",)}
    assert layout.task is Task.MULTICLASS


@pytest.mark.parametrize("outer", ["", "flowers/"])
def test_folders_may_say_splits(outer: str) -> None:
    paths = ["train/daisy/1.jpg", "Validation/rose/2.jpg", "TEST/rose/3.jpg", "val/daisy/4.jpg", "training/rose/5.jpg"]
    layout = from_folders([outer + path for path in paths])
    assert [sample.labels for sample in layout.samples] == [("daisy",), ("rose",), ("rose",), ("daisy",), ("rose",)]
    assert [sample.split for sample in layout.samples] == [
        Split.TRAIN, Split.VALIDATION, Split.TEST, Split.VALIDATION, Split.TRAIN,
    ]  # fmt: skip
    assert layout.task is Task.BINARY


def test_a_train_folder_alone_is_a_folder_around_everything() -> None:
    layout = from_folders(["train/daisy/1.jpg", "train/rose/2.jpg"])
    assert labels_of(layout) == {"train/daisy/1.jpg": ("daisy",), "train/rose/2.jpg": ("rose",)}
    assert set(splits_of(layout).values()) == {Split.TRAIN}


@pytest.mark.parametrize("outer", ["", "flowers/"])
@pytest.mark.parametrize("folders", [("train", "test"), ("Training", "TEST", "val"), ("train",)])
def test_splits_without_classes_are_not_taken_for_classes(outer: str, folders: tuple[str, ...]) -> None:
    paths = [f"{outer}{folder}/{number}.jpg" for folder in folders for number in range(3)]
    with pytest.raises(LayoutUnknown, match=r"train/daisy/1\.jpg.*Received images directly in .*train"):
        from_folders([*paths, outer + "readme.txt"])


def test_a_class_may_be_called_train_beside_others() -> None:
    layout = from_folders(["train/1.jpg", "bus/2.jpg"])
    assert labels_of(layout) == {"train/1.jpg": ("train",), "bus/2.jpg": ("bus",)}
    assert set(splits_of(layout).values()) == {Split.TRAIN}


def test_a_folder_named_like_several_labels_is_refused() -> None:
    with pytest.raises(LayoutUnknown, match=r"'sea\|sand' contains \|, which separates labels"):
        from_folders(["sea|sand/1.jpg", "sea/2.jpg"])


@pytest.mark.parametrize("unlabelled", ["test/3.jpg", "test1/3.jpg", "seg_pred/seg_pred/3.jpg", "unlabeled/3.jpg"])
def test_test_images_without_classes_are_left_out_with_a_warning(unlabelled: str) -> None:
    layout = from_folders(["train/daisy/1.jpg", "train/rose/2.jpg", unlabelled])
    assert [sample.path for sample in layout.samples] == ["train/daisy/1.jpg", "train/rose/2.jpg"]
    assert (layout.refused, layout.ignored) == ((), 1)
    assert unlabelled in layout.warnings[0] and "without class folders" in layout.warnings[0]


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (
            ["Training/daisy/1.jpg", "Training/rose/2.jpg", "Testing/daisy/3.jpg"],
            [Split.TRAIN, Split.TRAIN, Split.TEST],
        ),
        (
            ["seg_train/seg_train/daisy/1.jpg", "seg_train/seg_train/rose/2.jpg", "seg_test/seg_test/daisy/3.jpg"],
            [Split.TRAIN, Split.TRAIN, Split.TEST],
        ),
        (["data/images/daisy/1.jpg", "data/images/rose/2.jpg", "data/images/daisy/3.jpg"], [Split.TRAIN] * 3),
        (
            ["d/train/images/daisy/1.jpg", "d/train/images/rose/2.jpg", "d/val/images/daisy/3.jpg"],
            [Split.TRAIN, Split.TRAIN, Split.VALIDATION],
        ),
        (
            ["training_set/daisy/1.jpg", "training_set/rose/2.jpg", "test_set/daisy/3.jpg"],
            [Split.TRAIN] * 2 + [Split.TEST],
        ),
        (
            ["train2017/daisy/1.jpg", "train2017/rose/2.jpg", "val2017/daisy/3.jpg"],
            [Split.TRAIN] * 2 + [Split.VALIDATION],
        ),
    ],
)
def test_layouts_of_known_tools_are_read(paths: list[str], splits: list[Split]) -> None:
    layout = from_folders([*paths, "README.md"])
    assert [sample.labels for sample in layout.samples] == [("daisy",), ("rose",), ("daisy",)]
    assert [sample.split for sample in layout.samples] == splits
    assert (layout.refused, layout.ignored, layout.warnings) == ((), 1, ())


def test_classes_may_be_called_test1_and_test2() -> None:
    assert [sample.labels for sample in from_folders(["test1/1.jpg", "test2/2.jpg"]).samples] == [
        ("test1",),
        ("test2",),
    ]


def test_text_beside_images_is_ignored_and_counted() -> None:
    paths = ["daisy/1.jpg", "daisy/1.json", "rose/2.jpg", "rose/2.txt", "rose/2.xml", "LICENSE", "flowers.csv"]
    layout = from_folders(paths)
    assert [sample.path for sample in layout.samples] == ["daisy/1.jpg", "rose/2.jpg"]
    assert (layout.refused, layout.ignored) == ((), 5)


def test_one_image_that_is_nested_too_deep_is_refused_alone() -> None:
    layout = from_folders([*(f"daisy/{number}.jpg" for number in range(9)), "rose/1.jpg", "rose/old/1.jpg"])
    assert layout.refused == (Refused("rose/old/1.jpg", "nested more deeply than the class folders"),)


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("preview.jpg", "not in a class folder"),
        ("flowers/preview.jpg", "not in a class folder"),
        ("flowers/samples/1.jpg", "not in a class folder"),
    ],
)
def test_one_image_beside_splits_is_refused_alone(odd: str, reason: str) -> None:
    paths = [f"flowers/{split}/{name}/1.jpg" for split in ("train", "val", "test") for name in ("daisy", "rose")]
    layout = from_folders([*paths, odd])
    assert layout.refused == (Refused(odd, reason),) and len(layout.samples) == 6
    assert {sample.labels[0] for sample in layout.samples} == {"daisy", "rose"}
    assert {sample.split for sample in layout.samples} == set(Split)


@pytest.mark.parametrize("odd", ["all.jpg", "previews/all.jpg", "a/b/all.jpg"])
def test_an_image_beside_the_outer_folder_is_refused_alone(odd: str) -> None:
    layout = from_folders([*(f"flowers/daisy/{number}.jpg" for number in range(5)), "flowers/rose/1.jpg", odd])
    assert layout.refused == (Refused(odd, "not in a class folder"),) and len(layout.samples) == 6
    assert {sample.labels[0] for sample in layout.samples} == {"daisy", "rose"}


@pytest.mark.parametrize("folders", [("images", "masks"), ("JPEGImages", "SegmentationClass", "Annotations")])
def test_images_and_masks_are_no_classes(folders: tuple[str, ...]) -> None:
    with pytest.raises(LayoutUnknown, match="which are no classes"):
        from_folders([f"{folder}/1.png" for folder in folders])


def test_a_class_that_begins_with_a_dot_is_a_class_with_a_warning() -> None:
    layout = from_folders([".NET/1.jpg", "Java/2.jpg"])
    assert {sample.labels for sample in layout.samples} == {(".NET",), ("Java",)}
    assert "'.NET' begins with a dot" in layout.warnings[0]


@pytest.mark.parametrize(
    ("path", "data", "known"),
    [
        ("annotations/instances.json", b'{"images": [], "annotations": [], "categories": []}', "COCO"),
        ("export.json", b'[{"id": 1, "data": {"image": "1.jpg"}, "annotations": []}]', "Label Studio"),
        ("export.json", b'[{"image": "1.jpg", "choice": "cat"}]', "Label Studio"),
        ("Annotations/1.xml", b"<annotation><object/></annotation>", "Pascal VOC"),
        ("annotations.xml", b"<?xml version='1.0'?><annotations><image/></annotations>", "CVAT"),
        ("train/labels.csv", b"path,label", "Only a labels.csv at the top"),
        ("labels (1).csv", b"path,label", "Only a labels.csv at the top"),
        ("data.yaml", b"nc: 2", "YOLO"),
        ("1.json", b'{"shapes": [], "imagePath": "1.jpg"}', "Labelme"),
        ("settings.json", b'{"a": 1}', None),
        ("broken.json", b"{", None),
    ],
)
def test_formats_of_other_tools_are_named(path: str, data: bytes, known: str | None) -> None:
    named = name_format(path, data)
    assert named is None if known is None else named is not None and known in named and path in named


@pytest.mark.parametrize("outer", ["", "flowers/"])
def test_an_archive_of_test_images_alone_is_not_trained_on(outer: str) -> None:
    layout = from_folders([outer + path for path in ("test/daisy/1.jpg", "test/rose/2.jpg")])
    assert [(sample.labels, sample.split) for sample in layout.samples] == [
        (("daisy",), Split.TEST),
        (("rose",), Split.TEST),
    ]


@pytest.mark.parametrize("outer", ["", "flowers/"])
def test_a_file_at_the_root_is_refused_and_the_rest_goes_on(outer: str) -> None:
    paths = [outer + path for path in ("0.jpg", "daisy/1.jpg", "rose/2.jpg")]
    layout = from_folders(paths)
    assert layout.refused == (Refused(outer + "0.jpg", "not in a class folder"),)
    assert [sample.labels for sample in layout.samples] == [("daisy",), ("rose",)]


@pytest.mark.parametrize(
    "paths",
    [
        ["daisy/1.jpg", "rose/old/2.jpg"],
        ["flowers/daisy/1.jpg", "flowers/rose/old/2.jpg"],
        ["train/daisy/1.jpg", "test/rose/old/2.jpg"],
        ["a/b/c/1.jpg", "a/c/d/e/2.jpg"],
        ["0.jpg", "flowers/daisy/1.jpg"],
        ["test/1.jpg", *(f"data/daisy/{number}.jpg" for number in range(9))],
    ],
)
def test_folders_that_are_nested_too_deep_are_told(paths: list[str]) -> None:
    with pytest.raises(LayoutUnknown, match=r"Expected one folder per class.*which is nested more deeply"):
        from_folders(paths)


def test_files_in_no_folder_are_told() -> None:
    with pytest.raises(LayoutUnknown, match=r"Received 2 files that are not in a class folder, such as '1\.jpg'"):
        from_folders(["1.jpg", "2.jpg"])


def test_an_archive_without_files_is_told() -> None:
    with pytest.raises(LayoutUnknown, match="empty"):
        from_folders([])


LOOK_ALIKE = [
    ("Daisy", "daisy"),
    ("café", unicodedata.normalize("NFD", "café")),
    ("ﬁg", "fig"),
    ("STRASSE", "straße"),
    ("Ⅷ", "viii"),
    ("ｄaisy", "daisy"),
    ("cat", "cat "),
    ("dog", "dog\u200b"),
    ("do\u00adg", "dog"),
    ("cat dog", "cat\u00a0dog"),
]


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKE)
def test_class_names_that_look_the_same_are_refused(one: str, other: str) -> None:
    with pytest.raises(LayoutUnknown, match="differ only by case or Unicode form") as refusal:
        from_folders([f"{one}/1.jpg", f"{other}/2.jpg", "rose/3.jpg"])
    assert repr(one) in refusal.value.detail and repr(other) in refusal.value.detail
    if unicodedata.normalize("NFC", one).strip() == unicodedata.normalize("NFC", other).strip():
        return  # a table says the same of both
    with pytest.raises(LayoutUnknown, match="differ only by case or Unicode form"):
        from_labels(f"path,label\n1.jpg,{one}\n2.jpg,{other}\n".encode(), "labels.csv", ["1.jpg", "2.jpg"])


def test_class_names_that_differ_are_allowed() -> None:
    check_class_names(["daisy", "daisies", "dai sy", "1", "l", "rosé", "rose"])
    check_class_names([])


def test_litter_does_not_hide_the_layout(tmp_path: Path) -> None:
    files = ["flowers/daisy/1.jpg", "flowers/rose/2.jpg", "flowers/rose/Thumbs.db", "flowers/.DS_Store", ".DS_Store"]
    files += ["__MACOSX/flowers/._daisy", "__MACOSX/flowers/daisy/._1.jpg"]
    (tmp_path / "archive").write_bytes(zipped(dict.fromkeys(files, b"data")))
    archive = open_archive(tmp_path / "archive", ArchiveLimits())
    layout = from_folders([entry.path for entry in archive.entries])
    assert labels_of(layout) == {"flowers/daisy/1.jpg": ("daisy",), "flowers/rose/2.jpg": ("rose",)}
    assert (layout.refused, archive.ignored) == ((), 5)


PARTS = st.sampled_from(["train", "test", "val", "daisy", "rose", "Daisy", "1.jpg", "2.jpg", "labels.csv"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), max_size=8, unique=True))
def test_every_file_is_a_sample_or_refused_or_the_layout_is_unknown(paths: list[str]) -> None:
    try:
        layout = from_folders(paths)
    except LayoutUnknown:
        return
    found = [sample.path for sample in layout.samples] + [file.path for file in layout.refused]
    assert len(found) + layout.ignored == len(paths) and set(found) <= set(paths)
    assert all(sample.labels == (sample.path.split("/")[-2],) for sample in layout.samples)


# --- labels.csv ------------------------------------------------------------------------------------------------------

PATHS = ["1.png", "images/2.png", "images/3.png", "labels.csv"]


def read(text: str, paths: Sequence[str] = PATHS, encoding: str = "utf-8") -> Layout:
    found = labels_file(paths)
    assert found is not None
    return from_labels(text.encode(encoding), found, paths)


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["labels.csv", "1.png"], "labels.csv"),
        (["data/labels.csv", "data/1.png"], "data/labels.csv"),
        (["data/labels.csv", "data/images/1.png"], "data/labels.csv"),
        (["data/images/labels.csv", "data/images/1.png"], None),
        (["data/labels.csv", "1.png"], None),
        (["a/labels.csv", "b/1.png"], None),
        (["Labels.csv", "labels.csv.txt", "daisy/1.png"], "Labels.csv"),
        (["data/LABELS.CSV", "data/1.png", "README.txt"], "data/LABELS.CSV"),
        (["metadata.jsonl", "1.png"], "metadata.jsonl"),
        (["labels.csv.txt", "daisy/1.png"], None),
        ([], None),
    ],
)
def test_the_labels_file_is_at_the_top_or_below_the_one_outer_folder(paths: list[str], found: str | None) -> None:
    assert labels_file(paths) == found
    assert labels_file(iter(paths)) == found


def test_labels_groups_and_splits_are_read() -> None:
    layout = read("path,label,group,split\n1.png,daisy,tom,train\nimages/2.png,rose,ann,test\nimages/3.png,daisy,,\n")
    assert layout == Layout(
        Task.BINARY,
        (
            Sample("1.png", ("daisy",), group="tom"),
            Sample("images/2.png", ("rose",), group="ann", split=Split.TEST),
            Sample("images/3.png", ("daisy",)),
        ),
    )


def test_columns_may_stand_in_any_order_and_case() -> None:
    layout = read(" Split ,LABEL,Path\nTEST,daisy,1.png\nVal,rose,images/2.png\n,tulip,images/3.png\n")
    assert splits_of(layout) == {"1.png": Split.TEST, "images/2.png": Split.VALIDATION, "images/3.png": Split.TRAIN}
    assert layout.task is Task.MULTICLASS


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", Split.TRAIN),
        ("Training", Split.TRAIN),
        ("", Split.TRAIN),
        ("val", Split.VALIDATION),
        ("valid", Split.VALIDATION),
        ("VALIDATION", Split.VALIDATION),
        (" test ", Split.TEST),
    ],
)
def test_each_word_for_a_split_is_known(word: str, split: Split) -> None:
    assert read(f"path,label,split\n1.png,daisy,{word}\n").samples[0].split is split


@pytest.mark.parametrize("word", ["holdout", "0", "train test", "trainn"])
def test_a_word_that_is_no_split_is_told(word: str) -> None:
    with pytest.raises(LayoutUnknown, match=f"Line 3 .* expected split train, validation or test. Received '{word}'"):
        read(f"path,label,split\n1.png,daisy,train\nimages/2.png,rose,{word}\n")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_spreadsheets_write_is_read(newline: str, encoding: str) -> None:
    text = 'path,label\n"1.png","Löwe, groß"\n\nimages/2.png,"say ""hi"""\n'.replace("\n", newline)
    layout = read(text, encoding=encoding)
    assert labels_of(layout) == {"1.png": ("Löwe, groß",), "images/2.png": ('say "hi"',)}


def test_paths_may_be_written_in_several_ways() -> None:
    text = "path,label\n ./1.png,daisy\nimages\\2.png,rose\n/images//3.png,daisy\n"
    assert list(labels_of(read(text))) == ["1.png", "images/2.png", "images/3.png"]


@pytest.mark.parametrize("prefix", ["", "data/"])
def test_paths_count_from_the_top_or_from_the_labels_file(prefix: str) -> None:
    text = f"path,label\n{prefix}1.png,daisy\n{prefix}images/2.png,rose\n"
    layout = read(text, ["data/labels.csv", "data/1.png", "data/images/2.png"])
    assert list(labels_of(layout)) == ["data/1.png", "data/images/2.png"]
    assert layout.refused == ()


def test_a_file_named_twice_is_told_however_it_is_written() -> None:
    paths = ["data/labels.csv", "data/1.png"]
    for again in ("1.png", "./1.png", "data/1.png", "data\\1.png"):
        with pytest.raises(LayoutUnknown, match=r"Line 3 of labels\.csv: the file .* is listed a second time"):
            read(f"path,label\n1.png,daisy\n{again},rose\n", paths)


def test_files_that_are_missing_or_not_named_are_refused_one_by_one() -> None:
    layout = read("path,label\n1.png,daisy\nimages/9.png,rose\n../1.png,rose\nlabels.csv,daisy\n")
    assert labels_of(layout) == {"1.png": ("daisy",)}
    assert layout.refused == (
        Refused("images/9.png", "listed in labels.csv but not in the archive"),
        Refused("../1.png", "listed in labels.csv but not in the archive"),
        Refused("labels.csv", "listed in labels.csv but not in the archive"),
        Refused("images/2.png", "not listed in labels.csv"),
        Refused("images/3.png", "not listed in labels.csv"),
    )


@pytest.mark.parametrize("text", ["path,label\n", "path,label\n9.png,daisy\n", "path,target\n,1\n"])
def test_labels_for_no_file_of_the_archive_are_told(text: str) -> None:
    with pytest.raises(LayoutUnknown, match=r"lists no file of the archive.*the archive has '1\.png'"):
        read(text)


@pytest.mark.parametrize(
    "head",
    [
        "",
        "label",
        "path",
        "path,label,target",
        "path,label,label",
        "path,label,colour",
        "1.png,daisy",
        "path,group,split",
    ],
)
def test_columns_that_are_not_known_are_told(head: str) -> None:
    with pytest.raises(LayoutUnknown, match=r"Line 1 of labels.csv: expected path,label\[,group\]\[,split\]"):
        read(f"{head}\n1.png,daisy\n" if head else "")


@pytest.mark.parametrize("row", ["1.png", "1.png,daisy,tom", "1.png,Löwe, groß"])
def test_a_row_with_too_few_or_too_many_values_is_told(row: str) -> None:
    with pytest.raises(LayoutUnknown, match=r"Line 3 of labels\.csv: expected 2 values\. Received [13]"):
        read(f"path,label\nimages/2.png,rose\n{row}\n")


@pytest.mark.parametrize(
    "data",
    [
        "path,label\n1.png,daisy\n".encode("utf-16")[:-1],
        b'path,label\n1.png,"daisy\n',
        b'path,label\n1.png,"dai"sy\n',
        b"path,label\n1.png," + b"x" * 200_000,
        b"path,label\n1.png,\xed\xa0\x80\n",
        b"path,label\n1.png,\xff\0\n",
    ],
)
def test_what_is_no_csv_is_told(data: bytes) -> None:
    with pytest.raises((LayoutUnknown, ArchiveRefused), match=r"labels\.csv"):
        from_labels(data, "labels.csv", PATHS)


EXPORTS = {
    "semicolons": ("path;label\n1.png;Löwe\nimages/2.png;Katze\n".encode(), "semicolons"),
    "tabs": ("path\tlabel\n1.png\tLöwe\nimages/2.png\tKatze\n".encode(), "tabs"),
    "utf-16": ("path,label\n1.png,Löwe\nimages/2.png,Katze\n".encode("utf-16"), "UTF-16"),
    "utf-16 without a mark": ("path\tlabel\n1.png\tLöwe\nimages/2.png\tKatze\n".encode("utf-16-le"), "tabs"),
    "cp1252": ("path,label\n1.png,Löwe\nimages/2.png,Katze\n".encode("cp1252"), "read as cp1252"),
    "pandas": (",path,label\n0,1.png,Löwe\n1,images/2.png,Katze\n".encode(), "counts its rows"),
    "sep": ("sep=;\npath;label\n1.png;Löwe\nimages/2.png;Katze\n".encode(), "semicolons"),
    "other columns": (
        "file_name,class\n1.png,Löwe\nimages/2.png,Katze\n".encode(),
        "file_name as path, class as label",
    ),
    "empty columns": ("path,label,,\n1.png,Löwe,,\nimages/2.png,Katze,,\n".encode(), ""),
    "spaces before quotes": (b'path, label\n1.png, "L\xc3\xb6we"\nimages/2.png, "Katze"\n', ""),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_what_excel_and_pandas_write_is_read_and_told(export: str) -> None:
    data, told = EXPORTS[export]
    layout = from_labels(data, "labels.csv", PATHS)
    assert labels_of(layout) == {"1.png": ("Löwe",), "images/2.png": ("Katze",)}
    assert told in " ".join(layout.warnings) and bool(told) == bool(layout.warnings)


def test_numbers_as_labels_are_warned_of() -> None:
    assert "name the column target" in read("path,label\n1.png,1.37\nimages/2.png,2.74\n").warnings[0]
    assert read("path,label\n1.png,1.5\nimages/2.png,big\n").warnings == ()


def test_a_column_too_many_is_named() -> None:
    with pytest.raises(LayoutUnknown, match="Leave out or rename 'width' and 'height'"):
        read("path,label,width,height\n1.png,daisy,3,4\n")


def test_numbers_of_a_table_with_semicolons_may_have_decimal_commas() -> None:
    layout = read("path;target\n1.png;1,5\nimages/2.png;-2\n")
    assert [sample.target for sample in layout.samples] == [1.5, -2.0]


def test_labels_in_a_code_page_that_is_not_clear_are_refused_with_each_reading() -> None:
    data = "path,label\n1.png,고양이\nimages/2.png,개\n".encode("cp949")
    with pytest.raises(ArchiveRefused, match=r"values of labels\.csv.*cp949: ") as refusal:
        from_labels(data, "labels.csv", PATHS)
    assert refusal.value.extra["retry"] == "names"
    assert labels_of(from_labels(data, "labels.csv", PATHS, "cp949")) == {"1.png": ("고양이",), "images/2.png": ("개",)}


def test_metadata_of_image_folders_is_read() -> None:
    data = b'{"file_name": "1.png", "label": "sea"}\n{"file_name": "images/2.png", "label": "sky"}\n'
    layout = from_labels(data, "metadata.jsonl", ["metadata.jsonl", "1.png", "images/2.png"])
    assert labels_of(layout) == {"1.png": ("sea",), "images/2.png": ("sky",)}
    with pytest.raises(LayoutUnknown, match=r"Line 2 of metadata\.jsonl"):
        from_labels(b'{"file_name": "1.png", "label": "sea"}\nno\n', "metadata.jsonl", ["1.png"])


def test_composed_labels_name_files_of_macos() -> None:
    layout = read(unicodedata.normalize("NFD", "path,label\n사진/é.png,갈매기\n"), ["labels.csv", "사진/é.png"])
    assert labels_of(layout) == {"사진/é.png": ("갈매기",)}


@pytest.mark.parametrize("column", ["path", "label", "group"])
@pytest.mark.parametrize("text", ["a\0b", "a\x1b[2Jb", "a\x85b", '"a\nb"', "x" * 1025, "é" * 513])
def test_control_characters_and_endless_text_are_told(column: str, text: str) -> None:
    values = {"path": "images/2.png", "label": "rose", "group": "tom"} | {column: text}
    with pytest.raises(
        LayoutUnknown, match=f"Line [34] of labels.csv: expected a {column} of at most 1024 bytes"
    ) as at:
        read("path,label,group\n1.png,daisy,ann\n" + ",".join(values.values()) + "\n")
    assert at.value.detail.isprintable() and len(at.value.detail) < 1000


def test_a_path_may_be_as_long_as_an_archive_allows() -> None:
    path = "/".join(["a" * 204] * 5)
    assert labels_of(read(f"path,label\n{path},daisy\n", ["labels.csv", path])) == {path: ("daisy",)}


def test_an_empty_label_is_told() -> None:
    with pytest.raises(LayoutUnknown, match=r"Line 2 of labels.csv: expected a label, or \|"):
        read("path,label\n1.png, \n")


def test_several_labels_make_a_multilabel_task() -> None:
    layout = read("path,label\n1.png,sea| sky |sea\nimages/2.png,sky\nimages/3.png,|\n")
    assert layout.task is Task.MULTILABEL
    assert labels_of(layout) == {"1.png": ("sea", "sky"), "images/2.png": ("sky",), "images/3.png": ()}


def test_one_label_each_is_no_multilabel_task_even_with_a_bar() -> None:
    layout = read("path,label\n1.png,|sea\nimages/2.png,sky|\nimages/3.png,sun\n")
    assert layout.task is Task.MULTICLASS
    assert labels_of(layout) == {"1.png": ("sea",), "images/2.png": ("sky",), "images/3.png": ("sun",)}


def test_targets_make_a_regression() -> None:
    layout = read("path,target,group\n1.png,1.5,a\nimages/2.png,-2e3,a\nimages/3.png, 7 ,\n")
    assert layout.task is Task.REGRESSION
    assert [(sample.target, sample.labels) for sample in layout.samples] == [(1.5, ()), (-2000.0, ()), (7.0, ())]


@pytest.mark.parametrize(
    "text", ["", "daisy", "nan", "inf", "-Infinity", "1e999", "1e39", "-1e16", "1e-20", "1,5", "0x10", "1.2.3"]
)
def test_a_target_that_is_no_number_is_told(text: str) -> None:
    with pytest.raises(LayoutUnknown, match=r"Line 2 of labels\.csv: expected a target that is 0 or a number"):
        read(f'path,target\n1.png,"{text}"\n')


def test_a_group_in_two_splits_is_told() -> None:
    read("path,label,group,split\n1.png,daisy,tom,test\nimages/2.png,rose,tom,test\n")
    with pytest.raises(LayoutUnknown, match=r"The group 'tom' of labels\.csv is in two splits"):
        read("path,label,group,split\n1.png,daisy,tom,train\nimages/2.png,rose,tom,test\n")
    with pytest.raises(LayoutUnknown, match=r"The group 'tom' of labels\.csv is in two splits"):
        read("path,label,group,split\n1.png,daisy,tom,\nimages/2.png,rose,tom,val\n")


def test_rows_without_a_group_may_be_in_any_split() -> None:
    layout = read("path,label,group,split\n1.png,daisy,,train\nimages/2.png,rose, ,test\n")
    assert [sample.group for sample in layout.samples] == [None, None]


def test_a_large_labels_file_takes_no_longer_than_its_length() -> None:
    rows = [f"{number}.png" for number in range(30_000)]
    text = "path,label\n" + "".join(f"{path},{'daisy' if number % 2 else 'rose'}\n" for number, path in enumerate(rows))
    paths = ["labels.csv", *rows, *(f"more/{path}" for path in rows)]
    started = time.process_time()
    layout = read(text, paths)
    assert time.process_time() - started < 10, "the work must not grow with the square of the files"
    assert len(layout.samples) == len(layout.refused) == 30_000


WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="|"), max_size=12).map(
    lambda word: unicodedata.normalize("NFC", word)
)
ROWS = st.dictionaries(
    st.integers(0, 30).map("images/{}.png".format),
    st.tuples(WORDS, st.integers(0, 4), st.sampled_from(Split)),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.booleans())
def test_what_a_csv_writer_writes_is_read_as_it_was(rows: Mapping[str, tuple[str, int, Split]], quote: bool) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL)
    writer.writerow(["path", "label", "group", "split"])
    expected = {}
    for path, (word, number, split) in rows.items():
        label, group = f"{number}{word}".strip(), f"{split} {word}"
        writer.writerow([path, label, group, split])
        expected[path] = Sample(path, (label,), None, group.strip(), split)
    try:
        layout = from_labels(buffer.getvalue().encode(), "labels.csv", ["labels.csv", *rows])
    except LayoutUnknown:
        with pytest.raises(LayoutUnknown):
            check_class_names({sample.labels[0] for sample in expected.values()})
        return
    assert {sample.path: sample for sample in layout.samples} == expected
    assert layout.refused == ()


@given(st.binary(max_size=200) | st.text(st.sampled_from('path,label\n"1.png|\r;\0é'), max_size=60).map(str.encode))
def test_whatever_stands_in_a_labels_file_it_is_read_or_told(data: bytes) -> None:
    for start in (b"", b"path,label\n", b"path,target,split\n"):
        try:
            layout = from_labels(start + data, "labels.csv", PATHS)
        except (LayoutUnknown, ArchiveRefused):
            continue
        assert {sample.path for sample in layout.samples} <= set(PATHS) - {"labels.csv"}
