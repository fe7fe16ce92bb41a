"""Serves the network with BentoML and its batching, as BentoML's documentation shows.

Run as `bentoml serve bentoml_app:Classifier`.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
import network


@bentoml.service(traffic={"timeout": 120}, workers=1)
class Classifier:
    """Predicts a batch of files."""

    def __init__(self) -> None:
        self.network = network.Network()

    @bentoml.api(batchable=True, max_batch_size=network.BATCH, max_latency_ms=60_000)
    def predict(self, images: list[Path]) -> list[list[float]]:
        """Return probabilities for each file."""
        pixels = [network.decode(Path(image).read_bytes()) for image in images]
        return [[float(value) for value in row] for row in self.network.predict(pixels)]
