"""The HTTP API. It writes jobs to the database and answers predictions. Loads no TensorFlow and no worker."""
