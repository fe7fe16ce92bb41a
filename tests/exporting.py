"""Networks that are exported once for all tests of a session, whichever of its processes needs one first."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from recipes.catalogue import CATALOGUE, BackboneName
from training.networks import backbones
from training.networks.export import ExportedNetwork, export


class Exports:
    """Backbones with random weights at their smallest sizes; `folder` may be shared by several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: BackboneName, cut: str) -> ExportedNetwork:
        """Return a network up to a cut; it is exported if nobody has done so."""
        onnx, facts, lock = (self._folder / f"{name.value}-{cut}.{kind}" for kind in ("onnx", "json", "lock"))
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not facts.exists():
                size = CATALOGUE[name].minimum_size
                exported = export(backbones.build_backbone(name, cut, size, backbones.random_weights(name)), threads=2)
                onnx.write_bytes(exported.onnx)
                facts.write_text(json.dumps(exported.facts()))
        return ExportedNetwork(onnx=onnx.read_bytes(), **json.loads(facts.read_text()))
