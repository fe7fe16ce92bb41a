"""Measures how many small mistakes in the source the tests detect (mutation testing).

A mutation is a small change of the source: a reversed comparison, a number off by one, `and` instead of `or`, a negated
condition, a missing statement, or a returned `None`. The seed determines which mutations are drawn. For each mutation,
the tests of its module run. The mutation is killed if a test fails. With `--beside`, the same mutations are applied to
another checkout, which runs its own tests. Then only functions that are the same in both checkouts are mutated.

Run as `python -m benchmarks.mutations [--count 100] [--seed 1] [--beside CHECKOUT]`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import processor, report, table

ROOMS = ("api", "artifacts", "inference", "models", "recipes", "training", "worker")
_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Function:
    """A function of the source, with its file and its syntax tree."""

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def key(self) -> tuple[str, str]:
        """Name and code, which identify the same function in two checkouts, even in files with different names."""
        return self.name, ast.dump(self.node)


@dataclass(frozen=True)
class Mutation:
    """One possible change of a function.

    Attributes:
        function: the key of the function.
        number: index of the change among all possible changes of the function.
        kind: the kind of change, such as `comparison`.
    """

    function: tuple[str, str]
    number: int
    kind: str


def functions(checkout: Path) -> Iterator[Function]:
    """Yield the functions and methods of the source."""
    for room in ROOMS:
        for file in sorted((checkout / room).rglob("*.py")):
            path = file.relative_to(checkout).as_posix()
            yield from _functions_of(path, ast.parse(file.read_text()), "")


def _functions_of(path: str, tree: ast.AST, prefix: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions_of(path, node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(path, f"{prefix}{node.name}", node)


def changes(function: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the possible changes of a function: the kind, the node, and the code that replaces the node."""
    for statement in getattr(function, "body", []):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        for node in ast.walk(statement):
            yield from _changes_of(node)


def _changes_of(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.Compare(ops=[op]):
            turned = ast.Compare(node.left, [_TURNED[type(op)]()], node.comparators)
            yield "comparison", node, f"({ast.unparse(turned)})"
        case ast.BinOp() if type(node.op) in _SWAPPED:
            swapped = ast.BinOp(node.left, _SWAPPED[type(node.op)](), node.right)
            yield "arithmetic", node, f"({ast.unparse(swapped)})"
        case ast.BoolOp():
            other = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield "and/or", node, f"({ast.unparse(other)})"
        case ast.UnaryOp(op=ast.Not()):
            yield "not", node, f"(bool({ast.unparse(node.operand)}))"
        case ast.If() | ast.While() | ast.IfExp():
            yield "condition", node.test, f"(not ({ast.unparse(node.test)}))"
        case ast.Constant(value=bool()):
            yield "constant", node, str(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", node, f"({node.value!r} + 1)"
        case ast.Return(value=ast.expr()) if not _is_none(node.value):
            yield "return None", node, "return None"
        case ast.Expr(value=ast.Call()) if not ast.unparse(node).startswith(("log.", "logger.", "_log.")):
            yield "left out", node, "pass"


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def draw(checkouts: list[Path], count: int, seed: int) -> list[Mutation]:
    """Return `count` random mutations that are possible in all checkouts. The seed determines them."""
    shared = set.intersection(*({function.key for function in functions(one)} for one in checkouts))
    seen: set[tuple[str, str]] = set()
    found: list[Mutation] = []
    for function in functions(checkouts[0]):
        if function.key in shared and function.key not in seen:
            seen.add(function.key)
            found += [Mutation(function.key, number, kind) for number, (kind, *_) in enumerate(changes(function.node))]
    random.Random(seed).shuffle(found)
    return found[:count]


def mutate(source: str, node: ast.AST, text: str) -> str:
    """Return the source with a node replaced by other code."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
    whole = source.encode()
    return (whole[:first] + text.encode() + whole[last:]).decode()


def tests_of(checkout: Path, path: str) -> list[str]:
    """Return the test files for a module: the one with its name, then those in its folder that import the module."""
    file = Path(path)
    stem = file.parent.name if file.stem in ("__init__", "__main__") else file.stem
    every = sorted((checkout / "tests").rglob("test_*.py"))
    mirrors = [test for test in every if test.name == f"test_{stem}.py" and file.parts[0] in test.parts]
    word = re.compile(rf"^(from|import) .*\b{re.escape(stem)}\b", re.MULTILINE)
    room = checkout / "tests" / file.parts[0]
    others = [test for test in every if room in test.parents and test not in mirrors and word.search(test.read_text())]
    found = [*mirrors, *others] or [test for test in every if room in test.parents]
    return [test.relative_to(checkout).as_posix() for test in found]


class Tree:
    """A temporary copy of a checkout, in which files are mutated."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.name = checkout.name
        self.root = folder
        ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "var", "__pycache__")
        shutil.copytree(checkout, folder, ignore=ignored, symlinks=True)
        self._functions = {function.key: function for function in functions(folder)}

    def find(self, mutation: Mutation) -> tuple[Path, ast.AST, str]:
        """Return the file of a mutation, the node to replace, and the code that replaces it."""
        function = self._functions[mutation.function]
        _, node, text = list(changes(function.node))[mutation.number]
        return self.root / function.path, node, text

    def is_killed(self, mutation: Mutation, limit_s: float) -> tuple[bool, str, float]:
        """Run the tests with a mutation. Return whether a test failed, which one, and the seconds that this took."""
        file, node, text = self.find(mutation)
        source = file.read_text()
        tests = tests_of(self.root, file.relative_to(self.root).as_posix())
        started = time.monotonic()
        file.write_text(mutate(source, node, text))
        try:
            code, said = self._run(tests, limit_s)
        finally:
            file.write_text(source)
        assert code in (0, 1, 2, 5), said
        return code in (1, 2), said, time.monotonic() - started

    def _run(self, tests: list[str], limit_s: float) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return 1, "took too long"
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return process.returncode, failed[0] if failed else said.strip().splitlines()[-1]


def main() -> None:
    """Draw mutations, test each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=600, help="a suite that takes longer counts as one that fails")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--beside", type=Path, help="another checkout that gets the same mutations")
    parser.add_argument("--only", type=int, choices=(0, 1), help="run the tests of one of the two checkouts alone")
    wanted = parser.parse_args()
    checkouts = [wanted.checkout.resolve(), *([wanted.beside.resolve()] if wanted.beside else [])]
    mutations = draw(checkouts, wanted.count, wanted.seed)
    tried = checkouts if wanted.only is None else [checkouts[wanted.only]]
    killed = {checkout.name: 0 for checkout in tried}
    with tempfile.TemporaryDirectory(prefix="espalier-mutations-") as folder:
        trees = [Tree(checkout, Path(folder) / str(number)) for number, checkout in enumerate(tried)]
        for number, mutation in enumerate(mutations):
            for tree in trees:
                file, node, text = tree.find(mutation)
                is_killed, said, seconds = tree.is_killed(mutation, wanted.limit_s)
                killed[tree.name] += is_killed
                place = f"{file.relative_to(tree.root)}:{node.lineno} {mutation.function[0]}"  # type: ignore[attr-defined]
                line = {
                    "number": number,
                    "checkout": tree.name,
                    "place": place,
                    "kind": mutation.kind,
                    "written": text,
                    "killed": is_killed,
                    "by": said,
                    "seconds": round(seconds, 1),
                }
                print(json.dumps(line), flush=True)
    report("mutations", {"seed": wanted.seed, "tried": len(mutations), "killed": killed})
    table(
        [(f"mutations killed by {name}", f"{found} of {len(mutations)}", "") for name, found in killed.items()],
        processor(),
    )


if __name__ == "__main__":
    main()
