"""The processes that work: claims jobs, runs each in a child process, keeps MLflow informed. Loads no TensorFlow."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
