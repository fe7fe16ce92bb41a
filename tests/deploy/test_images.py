"""The Dockerfiles, tested without Docker: the copied files are put into a folder, and its commands are run there."""

from __future__ import annotations

import ast
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from string import Template
from typing import Any

import pytest
from running import ROOT, free_port
from sample import coloured, zipped

IMAGES = ("api", "worker")
# What a file of theirs would import and nothing of theirs chooses: workers extract by OpenVINO.
UNUSED = {"api": set[str](), "worker": {"onnxruntime"}}
LEARNING = {"tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "mlflow", "scikit-learn", "torch"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, and the stage that contains it."""

    stage: int
    word: str
    rest: str


def dockerfile(image: str) -> list[Instruction]:
    lines = [line for line in (ROOT / f"deploy/images/{image}.Dockerfile").read_text().splitlines() if line[:1] != "#"]
    found: list[Instruction] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, rest = line.split(maxsplit=1)
            stage = (found[-1].stage if found else -1) + (word == "FROM")
            found.append(Instruction(stage, word, rest))
    return found


def final(image: str, word: str) -> list[str]:
    """Return the arguments of all instructions of one kind in the last stage."""
    instructions = dockerfile(image)
    return [line.rest for line in instructions if line.word == word and line.stage == instructions[-1].stage]


def copies(image: str) -> list[tuple[list[str], str]]:
    """Return what the last stage copies from the repository, as (sources, target)."""
    found = [rest.split() for rest in final(image, "COPY") if not rest.startswith("--from=")]
    return [(words[:-1], words[-1]) for words in found]


def copied(image: str, folder: Path) -> Path:
    """Copy the files that the image would contain into a folder."""
    for sources, target in copies(image):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (folder / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, folder / target)
    return folder


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return the environment of a process that can import modules only from this folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(folder), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **settings}


def run(folder: Path, *command: str, **settings: str) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(folder, **settings), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- how they are built --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
def test_every_stage_stands_on_the_same_exact_python(image: str) -> None:
    bases = {line.rest.split()[0] for name in IMAGES for line in dockerfile(name) if line.word == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.(11|12|13)\.\d+-slim-[a-z]+", bases.pop())
    assert dockerfile(image)[-1].stage == 1


@pytest.mark.parametrize("image", IMAGES)
def test_packages_come_with_hashes_and_only_as_wheels(image: str) -> None:
    given = dict(line.rest.split("=", 1) for line in dockerfile(image) if line.word == "ARG" and "=" in line.rest)
    build = Template(" ".join(line.rest for line in dockerfile(image) if line.stage == 0)).safe_substitute(given)
    assert f"requirements/{image}.txt" in build
    assert "--require-hashes" in build
    assert "--only-binary=:all:" in build
    assert all("pip" not in rest for rest in final(image, "RUN"))


@pytest.mark.parametrize("image", IMAGES)
def test_nobody_is_root(image: str) -> None:
    (user,) = final(image, "USER")
    uid, gid = user.split(":")
    assert int(uid) > 0 < int(gid)
    (made,) = [rest for rest in final(image, "RUN") if "useradd" in rest]
    assert f"--uid {uid}" in made
    assert f"--gid {gid}" in made
    assert f"--owner={uid} --group={gid}" in made
    assert "/var/lib/espalier" in made


def test_both_images_write_as_the_same_user() -> None:
    assert final("api", "USER") == final("worker", "USER")


def test_the_api_image_installs_nothing_that_learns() -> None:
    packages = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/api.txt").read_text(), re.MULTILINE)
    assert len(packages) > 20
    assert not LEARNING & set(packages)
    assert not {"training", "worker"} & {source for sources, _ in copies("api") for source in sources}


def test_what_is_copied_reaches_docker_and_secrets_do_not() -> None:
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    let_in = {line.removeprefix("!").rstrip("/") for line in rest if line.startswith("!")}
    needed = {source.split("/")[0] for image in IMAGES for sources, _ in copies(image) for source in sources}
    assert let_in == needed | {"requirements"}
    assert all(line.startswith(("!", "**/")) for line in rest)


# --- what they hold ------------------------------------------------------------------------------------------------


def imported(file: Path) -> Iterator[str]:
    """Yield every module that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_module(folder: Path, name: str) -> bool:
    place = folder.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


@pytest.mark.parametrize("image", IMAGES)
def test_whatever_its_files_import_is_in_the_image(image: str, tmp_path: Path) -> None:
    folder = copied(image, tmp_path)
    files = list(folder.rglob("*.py"))
    missing = {
        (str(file.relative_to(folder)), name)
        for file in files
        for name in imported(file)
        if is_module(ROOT, name) and not is_module(folder, name)
    }
    assert files
    assert not missing


@pytest.mark.parametrize("image", IMAGES)
def test_whatever_its_files_import_is_in_its_requirements(image: str, tmp_path: Path) -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / f"requirements/{image}.txt").read_text(), re.MULTILINE))
    providers = packages_distributions()
    folder = copied(image, tmp_path)
    foreign = {name.split(".")[0] for file in folder.rglob("*.py") for name in imported(file)}
    foreign = {name for name in foreign if not is_module(ROOT, name)} - sys.stdlib_module_names - UNUSED[image]
    missing = {
        name for name in foreign if not locked & {re.sub("[-_.]+", "-", p).lower() for p in providers.get(name, [name])}
    }
    assert "sqlalchemy" in foreign
    assert not missing


def test_the_api_starts_from_its_files_without_tensorflow(tmp_path: Path) -> None:
    folder = copied("api", tmp_path)
    code = "import sys, api.app, ops.migrate; print(*{name.split('.')[0] for name in sys.modules})"
    assert not {"tensorflow", "keras", "mlflow", "training", "worker"} & set(run(folder, "-c", code).split())
    run(folder, "-m", "ops.migrate", ESPALIER_VAR=str(tmp_path / "var"))  # finds its scripts by path
    assert (tmp_path / "var" / "espalier.db").is_file()


@pytest.mark.slow
def test_the_worker_loads_from_its_files_with_all_that_learns(tmp_path: Path) -> None:
    run(
        copied("worker", tmp_path),
        "-c",
        "import worker.app, worker.child.__main__, ops.collect, ops.weights, training.experiment, mlflow",
    )


@contextmanager
def started(image: str, folder: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the image's command in its folder; at the end it must stop by itself."""
    (line,) = final(image, "CMD")
    program, *arguments = json.loads(line)
    command = {"python": [sys.executable], "celery": [sys.executable, "-m", "celery"]}[program]
    process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment(folder, **settings))
    try:
        yield process
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(60)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except OSError:
        return 0, None
    finally:
        connection.close()


def until(port: int, path: str, is_so: Any, within_s: float = 180) -> Mapping[str, Any]:
    deadline = time.monotonic() + within_s
    while True:
        status, found = ask(port, "GET", path)
        if status and is_so(found):
            return dict(found)
        assert time.monotonic() < deadline, f"{path}: {status} {found}"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_two_images_take_a_data_set_in_together(tmp_path: Path, redis_url: str) -> None:
    port = free_port()
    shared = {"ESPALIER_VAR": str(tmp_path / "var"), "REDIS_URL": redis_url, "ESPALIER_API_PORT": str(port)}
    api, worker = (copied(image, tmp_path / image) for image in IMAGES)
    run(api, "-m", "ops.migrate", **shared)
    with started("api", api, **shared), started("worker", worker, **shared):
        ready = until(port, "/readyz", lambda found: all(check["ok"] for check in found["checks"].values()))
        assert ready["ready"]
        status, dataset = ask(port, "POST", "/api/v1/datasets?name=colours", zipped(coloured(per_class=4)))
        assert status == 202, dataset
        address = f"/api/v1/datasets/{dataset['id']}"
        settled = until(port, address, lambda found: found["state"] in ("ready", "rejected"))
        assert settled["state"] == "ready", settled
