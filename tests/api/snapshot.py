"""Writes the reviewed OpenAPI snapshot anew: python tests/api/snapshot.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from api.app import create_app
from settings import Settings

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        document = create_app(Settings(var=Path(folder))).openapi()
    target = Path(__file__).with_name("openapi.json")
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
