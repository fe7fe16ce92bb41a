"""Rules for imports that import-linter cannot check: root modules, and the libraries that each process loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "api",
    "worker",
    "ops",
    "benchmarks",
    "recipes",
    "training",
    "inference",
    "models",
    "artifacts",
    "migrations",
    "broker",
    "dispatch",
    "environments",
    "settings",
    "startup",
    "logs",
}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors.py", set()),
        ("clock.py", set()),
        ("environments.py", set()),
        ("no_telemetry.py", set()),
        ("logs.py", set()),
        ("settings.py", {"artifacts", "recipes"}),
        ("startup.py", {"artifacts", "models", "settings"}),
        ("broker.py", set()),
        ("dispatch.py", {"broker", "models"}),
    ],
)
def test_a_leaf_module_imports_only_what_it_may(module: str, allowed: set[str]) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported & ROOMS <= allowed


@pytest.mark.parametrize("process", ["api.app", "worker.app", "worker.child.__main__"])
def test_a_process_starts_without_tensorflow(process: str) -> None:
    code = f"import sys, {process}; print(*sorted({{'tensorflow', 'keras', 'mlflow'}} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == ""
