"""Exported networks that all processes of a test session share. The first process that needs one makes it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.catalogue import CATALOGUE, BackboneName
from training.networks import backbones
from training.networks.export import ExportedNetwork, export


class Exports:
    """Backbones with random weights for the smallest image size. Several processes may use one `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: BackboneName, cut: str) -> ExportedNetwork:
        """Return a backbone up to a cut point; export it if no process has done so."""
        onnx, facts = (self._folder / f"{name.value}-{cut}.{kind}" for kind in ("onnx", "json"))
        with self._locked(f"{name.value}-{cut}"):
            if not facts.exists():
                weights = self.weights(name).read_bytes()
                model = backbones.build_backbone(name, cut, CATALOGUE[name].minimum_size, weights)
                exported = export(model, threads=2)
                onnx.write_bytes(exported.onnx)
                facts.write_text(json.dumps(exported.facts()))
        return ExportedNetwork(onnx=onnx.read_bytes(), **json.loads(facts.read_text()))

    def weights(self, name: BackboneName) -> Path:
        """Return the file of random weights of a network."""
        file = self._folder / f"{name.value}.safetensors"
        with self._locked(name.value):
            if not file.exists():
                file.write_bytes(backbones.random_weights(name))
        return file

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._folder / f"{name}.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
