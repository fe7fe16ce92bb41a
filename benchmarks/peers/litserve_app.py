"""The network in LitServe, batched, as its documentation shows."""

import base64
import os

import litserve
import network


class Classifier(litserve.LitAPI):
    """Decodes on the way in, predicts a batch."""

    def setup(self, device):
        """Load the network in the worker."""
        self.network = network.Network()

    def decode_request(self, request):
        """Return the pixels of the file that was sent as base64 in JSON."""
        return network.decode(base64.b64decode(request["image"]))

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
