"""Serves the network with LitServe and its batching, as LitServe's documentation shows."""

import base64
import os

import litserve
import network


class Classifier(litserve.LitAPI):
    """Decodes on the way in, predicts a batch."""

    def setup(self, device):
        """Load a network for each model, in the worker process."""
        self.networks = [network.Network() for _ in range(network.MODELS)]

    def decode_request(self, request):
        """Return the model and the pixels of the file that was sent as base64 in JSON."""
        return request.get("model", 0), network.decode(base64.b64decode(request["image"]))

    def batch(self, inputs):
        """Return the batch unchanged, because its rows may belong to several models."""
        return inputs

    def predict(self, x):
        """Return probabilities for a batch, model by model."""
        found = [None] * len(x)
        for model in {model for model, _ in x}:
            rows = [row for row, (of, _) in enumerate(x) if of == model]
            for row, output in zip(rows, self.networks[model].predict([x[row][1] for row in rows]), strict=True):
                found[row] = output
        return found

    def encode_response(self, output):
        """Return one answer."""
        return {"probabilities": [float(value) for value in output]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=network.BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
