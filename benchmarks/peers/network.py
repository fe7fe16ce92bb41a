"""The network that the peers serve: a Keras backbone with preprocessing, average pooling and a dense head.

Imports nothing from Espalier, because it runs in another environment, as a user of LitServe or BentoML would write it.
"""

from __future__ import annotations

import io
import os

import keras
import numpy as np
import numpy.typing as npt
from PIL import Image

SIZE = int(os.environ["PEER_SIZE"])
BATCH = int(os.environ["PEER_BATCH"])
CLASSES = 10
MODELS = int(os.environ.get("PEER_MODELS", "1"))

_NETWORKS = {
    "vgg16": (keras.applications.VGG16, keras.applications.vgg16.preprocess_input),
    "resnet50": (keras.applications.ResNet50, keras.applications.resnet.preprocess_input),
    "xception": (keras.applications.Xception, keras.applications.xception.preprocess_input),
}


class Network:
    """A classifier with a TensorFlow graph that is compiled once, for batches of any size."""

    def __init__(self) -> None:
        import tensorflow as tf

        base, self._preprocess = _NETWORKS[os.environ["PEER_NETWORK"]]
        body = base(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg")
        model = keras.Sequential([body, keras.layers.Dense(CLASSES, activation="softmax")])
        shape = tf.TensorSpec((None, SIZE, SIZE, 3), tf.float32)
        self._graph = tf.function(lambda images: model(images, training=False), input_signature=[shape])
        self.predict([np.zeros((SIZE, SIZE, 3), np.float32)])

    def predict(self, images: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """Return probabilities [N, classes] for images [H, W, 3]."""
        return np.asarray(self._graph(self._preprocess(np.stack(images).astype(np.float32))))


def decode(file: bytes) -> npt.NDArray[np.float32]:
    """Return the pixels of an image file, float32 [SIZE, SIZE, 3]."""
    picture = Image.open(io.BytesIO(file)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float32)
