"""The processes that work: claims jobs, runs each in a child process, keeps MLflow informed. Loads no TensorFlow."""
