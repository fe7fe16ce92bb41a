"""docs/faults.md names the test of every fault; each must exist and run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_fault_of_the_table_has_the_tests_that_it_names() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^    ?def (test_\w+)|^def (test_\w+)", sources, re.MULTILINE))
    known = {name for pair in defined for name in pair if name}
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or row.rstrip("| ").endswith("the same"), row
        assert set(named) <= known, set(named) - known
