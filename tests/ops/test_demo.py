from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample
from running import ROOT, free_port

from artifacts.images import ImageLimits, inspect
from ops.demo import HELD_OUT, Files, digits, hold_out, read_images
from startup import CannotStart


def test_the_digits_are_real_images_in_a_folder_each() -> None:
    files = digits()
    assert len(files.contents) == 1797
    assert {path.split("/")[0] for path in files.contents} == set("0123456789")
    facts = inspect(files.contents["7/0007.png"], ImageLimits())
    assert (facts.width, facts.height, facts.format) == (32, 32, "PNG")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_users_images_are_read_from_a_folder_or_an_archive(tmp_path: Path, kind: str) -> None:
    wanted = sample.coloured(per_class=3)
    if kind == "folder":
        place = tmp_path / "My Images"
        for path, data in wanted.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(data)
        (place / ".DS_Store").write_bytes(b"litter")
    else:
        place = tmp_path / f"My Images.{kind}"
        place.write_bytes(sample.zipped(wanted) if kind == "zip" else sample.tarred(wanted))
    files = read_images(place)
    assert files.name == "my-images"
    assert files.contents == wanted


def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="a folder or an archive"):
        read_images(tmp_path / "nowhere.zip")


def test_images_are_held_out_evenly_and_not_uploaded() -> None:
    files = digits()
    rest, held = hold_out(files, HELD_OUT)
    assert [image.truth for image in held].count("3") == 2 and len(held) == HELD_OUT
    assert rest.contents.keys() | {image.path for image in held} == files.contents.keys()
    assert not rest.contents.keys() & {image.path for image in held}


def test_a_small_class_gives_at_most_a_fifth() -> None:
    files = read_files(sample.coloured(per_class=4, classes=2) | {f"red/{i}.png": sample.png(i) for i in range(10)})
    _, held = hold_out(files, HELD_OUT)
    assert [image.truth for image in held] == ["red", "red"]


def test_grouped_images_are_not_held_out_and_labels_lose_the_lines_of_those_that_are() -> None:
    contents = {f"{i}.png": sample.png(i) for i in range(20)}
    lines = ["path,label,group", *(f"{i}.png,{'ab'[i % 2]},{'g' if i < 10 else ''}" for i in range(20))]
    files = read_files({"labels.csv": "\n".join(lines).encode(), **contents})
    rest, held = hold_out(files, 2)
    assert len(held) == 2 and all(int(image.path.split(".")[0]) >= 10 for image in held)
    kept = rest.contents["labels.csv"].decode()
    assert all(f"{image.path}," not in kept for image in held) and len(kept.splitlines()) == 19


def read_files(contents: dict[str, bytes]) -> Files:
    return Files("x", contents)


def test_numbers_and_several_labels_are_held_out_too() -> None:
    numbers = read_files(sample.labelled("target", [str(n / 2) for n in range(20)]))
    rest, held = hold_out(numbers, 3)
    assert [image.truth for image in held] == ["9.5", "9", "8.5"]
    assert len(rest.contents["labels.csv"].splitlines()) == 18
    labels = read_files(sample.labelled("label", ["a|b"] * 10 + ["|"] * 10))
    _, held = hold_out(labels, 4)
    assert [image.truth for image in held] == ["a + b", "none of the labels"] * 2


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end_on_a_users_archive(tmp_path: Path) -> None:
    archive = tmp_path / "colours.zip"
    archive.write_bytes(sample.zipped(sample.coloured(per_class=12)))
    environment = os.environ | {
        "CI": "1",
        "ESPALIER_VAR": str(tmp_path / "var"),
        "ESPALIER_API_PORT": str(free_port()),
        "ESPALIER_MLFLOW_PORT": str(free_port()),
        "ESPALIER_WEIGHTS_URL": "http://127.0.0.1:9",
        "ESPALIER_WEIGHTS_CACHE": str(tmp_path),
        "ESPALIER_FREE_DISK_BYTES": "1000000",
    }
    arguments = ["--data", str(archive), "--backbone", "vgg16", "--features-from", "block1", "--image-size", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "ops.demo", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in ("ImageNet weights are not available", "Accuracy", "Confusion matrix", "6 right", "/docs", "curl"):
        assert shown in done.stdout
