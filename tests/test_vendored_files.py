from __future__ import annotations

import hashlib
import re
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "console" / "vendor"


def test_vendored_files_are_those_that_their_list_names_with_their_licences() -> None:
    rows = [line for line in (VENDOR / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {}
    for row in rows:
        name, licence = re.findall(r"`([\w.-]+)`", row)[:2]
        named[name] = re.findall(r"`([0-9a-f]{64})`", row)
        assert (VENDOR / licence).read_text().strip(), f"the licence of {name}"
        named[licence] = []
    files = {file.name: file for file in VENDOR.iterdir() if file.name != "README.md"}
    assert named.keys() == files.keys()
    for name, hashes in named.items():
        assert hashes in ([], [hashlib.sha256(files[name].read_bytes()).hexdigest()]), name
