"""Paths, modules, links, make targets and endpoints that README.md and docs/ name must exist.

The decision records are left out: they say what was true when they were written.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ROOMS = ["api", "artifacts", "benchmarks", "inference", "migrations", "models", "ops", "recipes", "tests", "training"]
ROOMS += ["worker", "deploy", "docs", "console"]
# Folders of the data folder and of examples, not of the repository.
ELSEWHERE = {"mlflow/", "logs/", "store/", "features/", "pixels/", "cache/", "signs/"}


def _code(document: str) -> list[str]:
    """Return the inline code of a document."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_folder_that_a_document_names_is_there(document: str) -> None:
    words = [word for text in _code(document) for word in text.split()]
    named = [word for word in words if re.fullmatch(r"[\w./-]+(\.(py|md|json)|/)", word)]
    here = [name for name in named if name not in ELSEWHERE and not name.startswith("/")]
    assert [name for name in here if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_a_document_names_is_there(document: str) -> None:
    pattern = rf"(?:{'|'.join(ROOMS)})(?:\.\w+)+"
    run = re.findall(r" -[mA] ([\w.]+)", (ROOT / document).read_text())
    words = {word for text in _code(document) for word in text.split()} | set(run)
    named = [word for word in words if re.fullmatch(pattern, word)]
    assert [name for name in named if not name.endswith((".py", ".md")) and not _exists(name)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_of_a_document_leads_to_a_file(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_that_a_document_names_is_there(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / document).read_text()
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_every_endpoint_that_the_readme_names_is_there() -> None:
    paths = json.loads((ROOT / "tests" / "api" / "openapi.json").read_text())["paths"]
    known = {f"{method.upper()} {_shape(path)}" for path, methods in paths.items() for method in methods}
    named = re.findall(r"`(GET|POST|PUT|DELETE) (/[\w{}/-]+)", (ROOT / "README.md").read_text())
    assert len(named) > 10
    assert {f"{method} {_shape('/api/v1' + path)}" for method, path in named} <= known


def test_the_map_of_folders_in_the_readme_is_complete() -> None:
    named = set(re.findall(r"^([a-z]+)/  ", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {room for room in ROOMS if (ROOT / room).is_dir()}


def _shape(path: str) -> str:
    """Return a path without the names of its parameters."""
    return re.sub(r"{\w+}", "{}", path)


def _exists(name: str) -> bool:
    """Return whether a dotted name is a module, or something that a module defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.is_dir() and length == len(parts):
            return True
        if path.with_suffix(".py").is_file():
            return length == len(parts) or parts[length] in _defined(path.with_suffix(".py"))
    return False


def _defined(path: Path) -> set[str]:
    """Return the names of a module's functions, classes and variables."""
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}
