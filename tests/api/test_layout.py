"""A rule that import-linter cannot express: which names of SQLAlchemy the API may import."""

from __future__ import annotations

import ast

import pytest
from running import ROOT

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "api").rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_the_api_passes_sessions_on_and_leaves_queries_to_the_models(file: str) -> None:
    used = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            used |= {name.name for name in node.names if name.name.split(".")[0] in ("sqlalchemy", "alembic")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("sqlalchemy", "alembic"):
            used |= {f"{node.module}.{name.name}" for name in node.names}
    assert used <= {"sqlalchemy.orm.Session"}
