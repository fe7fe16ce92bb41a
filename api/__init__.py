"""The HTTP surface. Loads no TensorFlow and no worker: it writes rows, asks for dispatch, and answers predictions."""

from no_telemetry import turn_off_telemetry

turn_off_telemetry()
