"""The HTTP surface. Loads no TensorFlow and no worker: it writes rows, rings a bell, and answers predictions."""
