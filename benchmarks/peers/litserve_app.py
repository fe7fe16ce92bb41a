"""The network in LitServe, batched, as its documentation shows."""

from __future__ import annotations

import os
from typing import Any

import litserve
import network
from fastapi import UploadFile


class Classifier(litserve.LitAPI):
    """Decodes on the way in, predicts a batch."""

    def setup(self, device: str) -> None:
        """Load the network in the worker."""
        self.network = network.Network()

    def decode_request(self, request: UploadFile, **_: Any) -> Any:
        """Return the pixels of the file that was sent."""
        return network.decode(request["image"].file.read() if isinstance(request, dict) else request.file.read())

    def predict(self, x: Any, **_: Any) -> Any:
        """Return probabilities for a batch."""
        return network.Network.predict(self.network, list(x))

    def encode_response(self, output: Any, **_: Any) -> dict[str, list[float]]:
        """Return one answer."""
        return {"probabilities": [float(value) for value in output]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=network.BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
