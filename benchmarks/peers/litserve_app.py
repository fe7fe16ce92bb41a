"""The network in LitServe, batched, as its documentation shows."""

import os

import litserve
import network
from fastapi import Request  # LitServe reads the annotation itself, so it must not be text


class Classifier(litserve.LitAPI):
    """Decodes on the way in, predicts a batch."""

    def setup(self, device):
        """Load the network in the worker."""
        self.network = network.Network()

    def decode_request(self, request: Request):
        """Return the pixels of the file that was sent in a form."""
        return network.decode(request["image"].file.read())

    def predict(self, x):
        """Return probabilities for a batch."""
        return self.network.predict(list(x))

    def encode_response(self, output):
        """Return one answer."""
        return {"probabilities": [float(value) for value in output]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=network.BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
