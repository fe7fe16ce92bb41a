"""The HTTP surface. Loads no TensorFlow and no worker: it writes rows, asks for dispatch, and answers predictions."""
